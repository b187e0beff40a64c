"""`Grid`, the protocol through which solvers, assembly and trainer use the levels of a few neighbouring columns.

A grid rounds (`encode`, `decode`, `quantize`) and knows how it is stored: `segment` puts the grids of neighbouring
groups and their codes into one `Segment`, and `of_segment` takes the grid of some columns out of it again.
"""

from collections.abc import Sequence
from typing import Protocol, Self

from torch import Tensor

from bitquilt.core.types import Segment


class Grid(Protocol):
    """The levels of `n` neighbouring columns, in the precision in which they are stored. Grids subclass it."""

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes of `weight` fp32 `[out, n]`, as float: a sweep works in floats, `.to(uint8)` stores them."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """fp32 values of float codes `[out, n]`."""
        ...

    def quantize(self, weight: Tensor) -> Tensor:
        """`weight` `[out, n]` rounded to the grid."""
        return self.decode(self.encode(weight))

    @classmethod
    def segment(cls, grids: Sequence[Self], codes: Tensor, group_size: int) -> Segment:
        """One stored segment of neighbouring groups of `group_size` columns, with `codes` uint8 `[out, width]`.

        All grids have one format; the last group may be narrower.
        """
        ...

    @classmethod
    def of_segment(cls, segment: Segment, columns: slice) -> Self:
        """The grid of some columns of a segment: of one of its groups, whole."""
        ...
