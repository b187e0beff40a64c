"""`TableUnits`: blocks of rows of an embedding or a head, which get bits like the column groups of layers.

Rows go into blocks in the order of their importance, so a block has rows that matter alike. The rows of one width
become a part with a layout of its own.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitquilt.allocation.path import Ints
from bitquilt.core.packing import storage_bits
from bitquilt.core.types import Layout
from bitquilt.errors import UserError
from bitquilt.model.free_tables import Table, part_layout
from bitquilt.planning.sensitivities import Sensitivities

_BLOCKS = 192  # blocks of SmolLM2's 49,152 rows; the curve of importance over rank is smooth
_LEAST, _MOST = 8, 256  # rows of a block, unless there are more than a thousand blocks
_MANY = 1024


@dataclass(frozen=True, eq=False)
class TableUnits:
    """The units of one table: its rows in `count` blocks of `block` rows."""

    table: Table

    @property
    def block(self) -> int:
        """Rows of a block; the last may have fewer."""
        rows = self.table.rows
        size = min(max(rows // _BLOCKS, _LEAST), _MOST)
        return -(-max(size, -(-rows // _MANY)) // _LEAST) * _LEAST

    @property
    def count(self) -> int:
        """Number of blocks."""
        return -(-self.table.rows // self.block)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of every block."""
        sizes = np.full(self.count, self.block)
        sizes[-1] = self.table.rows - self.block * (self.count - 1)
        return sizes

    def costs(self, palette: tuple[int, ...]) -> NDArray[np.float32]:
        """Bits `[blocks, palette]`."""
        own = self.table.widths(palette)
        each = [storage_bits(part_layout(1, self.table.columns, bits)) for bits in own]
        return (self.sizes[:, None] * np.array(each)[None, :]).astype(np.float32)

    def losses(self, palette: tuple[int, ...], known: Sensitivities) -> NDArray[np.float32]:
        """Losses `[blocks, palette]`. Raises UserError if the tables do not fit."""
        found = known.tables.get(self.table.path)
        if found is None or len(found.order) != self.table.rows:
            raise UserError(
                f"the sensitivities have no losses for the rows of {self.table.path}; measure again, or leave it in 16 "
                "bits with --keep-embedding"
            )
        own = self.table.widths(palette)
        if missing := set(own) - set(found.widths):
            raise UserError(f"the sensitivities of {self.table.path} lack {min(missing)} bits; measure again")
        rows = found.expected(own)[found.order]
        return np.add.reduceat(rows, np.arange(0, len(rows), self.block), axis=0, dtype=np.float64).astype(np.float32)

    def parts(self, bits: Ints) -> dict[str, Layout]:
        """Layouts of the parts for `bits` `[blocks]`, by path."""
        return self.table.parts(np.bincount(bits, weights=self.sizes))

    def rows(self, bits: Ints, known: Sensitivities | None) -> NDArray[np.uint8]:
        """Bits of every row `[rows]` in the table's own order, for `bits` `[blocks]`."""
        by_rank = np.repeat(bits, self.sizes).astype(np.uint8)
        if known is None:
            return by_rank
        found = np.empty_like(by_rank)
        found[known.tables[self.table.path].order] = by_rank
        return found
