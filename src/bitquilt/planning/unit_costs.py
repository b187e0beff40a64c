"""`Units`: the parts of a model that get bits as one, what each width of them takes and what it loses.

A unit is a column group (one channel, for recipes that work channel by channel) of one layer, or of several tied
layers. A choice is a position in `palette`, one per unit.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bitquilt.allocation.path import Ints
from bitquilt.core.packing import storage_bits
from bitquilt.core.recipe import Plannable
from bitquilt.core.types import LayerPlan, Layout
from bitquilt.engines.engine import Engine
from bitquilt.errors import UserError
from bitquilt.planning.interaction import interaction_factors
from bitquilt.planning.sensitivities import Sensitivities


class Units:
    """The units of a model. `costs`: bits, fp32 `[units, palette]`.

    `slices`: the units of each layer, or of each set of tied layers by its first; `members`: the layers of each set.
    """

    def __init__(
        self,
        recipe: Plannable,
        shapes: Mapping[str, tuple[int, int]],
        ties: Sequence[Sequence[str]] = (),
        palette: Sequence[int] = (),
        engine: Engine | None = None,
    ) -> None:
        """`shapes`: `[out, in]` by path; `palette`: by default all widths of the recipe. `engine`: the widths are those
        that it has too, and whole layers take what they take in its files.

        Raises UserError if layers of different widths are tied.
        """
        self.recipe, self.shapes = recipe, dict(shapes)
        self.group_size = recipe.plan_terms.unit_columns
        self._group(ties)
        every = {bits for rows, _ in self.shapes.values() for bits in recipe.widths(rows)}
        self._engine = engine
        self.palette = tuple(palette) or tuple(sorted(every if engine is None else every & set(engine.bits)))
        self.costs = np.zeros((self.count, len(self.palette)), dtype=np.float32)
        prices = {shape: self._prices(*shape) for shape in set(self.shapes.values())}
        for head, tied in self.members.items():
            for name in tied:
                self.costs[self.slices[head]] += prices[self.shapes[name]]

    def _group(self, ties: Sequence[Sequence[str]]) -> None:
        leader = {name: tie[0] for tie in ties for name in tie if name in self.shapes and tie[0] in self.shapes}
        self.members: dict[str, list[str]] = {}
        for name in self.shapes:
            self.members.setdefault(leader.get(name, name), []).append(name)
        self.slices: dict[str, slice] = {}
        start = 0
        for head, tied in self.members.items():
            widths = {self.shapes[name][1] for name in tied}
            if len(widths) > 1:
                raise UserError(f"{' and '.join(tied)} are tied and have {sorted(widths)} inputs; wanted equal widths")
            count = -(-self.shapes[tied[0]][1] // self.group_size)
            self.slices[head] = slice(start, start + count)
            start += count
        self.count = start

    def _prices(self, rows: int, width: int) -> NDArray[np.float32]:
        """Bits of each group of a layer at each width. Widths that the layer cannot use are priced like its widest."""
        groups = -(-width // self.group_size)
        last = width - self.group_size * (groups - 1)
        widest = max(self.recipe.widths(rows))

        def price(columns: int, bits: int) -> float:
            if self.group_size % 8 == 0:
                return storage_bits(self.bare(rows, columns, min(bits, widest)))
            # one more channel among many: a lone channel would pay for whole bytes per row and for a shared table
            more, fewer = (storage_bits(self.bare(rows, count * columns, min(bits, widest))) for count in (16, 8))
            return (more - fewer) / 8

        table = np.array([[price(min(self.group_size, width), b) for b in self.palette]], dtype=np.float32)
        table = np.repeat(table, groups, axis=0)
        table[-1] = [price(last, b) for b in self.palette]
        return table

    def bare(self, rows: int, columns: int, bits: int) -> Layout:
        """Layout of one group by itself, without map and outliers."""
        layout = self.recipe.layout(rows, columns, LayerPlan((bits,) * -(-columns // self.group_size), self.group_size))
        return Layout(rows, columns, layout.segments)

    def losses(self, known: Sensitivities | None) -> NDArray[np.float32]:
        """Losses `[units, palette]` by the measured tables; zeros without tables.

        Widths that a layer cannot use gain nothing over its widest one, so they are never chosen. Raises UserError if
        the tables do not fit the layers.
        """
        losses = np.zeros((self.count, len(self.palette)), dtype=np.float32)
        if known is not None:
            for head, tied in self.members.items():
                for name in tied:
                    losses[self.slices[head]] += self._table(name, known)
        return losses

    def _table(self, name: str, found: Sensitivities) -> NDArray[np.float32]:
        if name not in found.losses:
            raise UserError(f"the sensitivities have no table for {name}; measure again with the same --skip")
        widths, table = found.widths[name], found.losses[name]
        groups = -(-self.shapes[name][1] // self.group_size)
        if found.group_size != self.group_size or len(table) != groups:
            raise UserError(
                f"the sensitivities of {name} are for {len(table)} groups of {found.group_size}; wanted {groups} of "
                f"{self.group_size}; measure again"
            )
        if missing := set(self.recipe.widths(self.shapes[name][0])) - set(widths):
            raise UserError(f"the sensitivities of {name} lack {min(missing)} bits; measure again")
        column = [widths.index(min(b, max(widths))) if b >= min(widths) else 0 for b in self.palette]
        return table[:, column] * np.array(interaction_factors([widths[i] for i in column]), dtype=np.float32)

    def assumed_losses(self) -> NDArray[np.float32]:
        """Losses `[units, palette]` when none were measured: all weights alike, each bit leaving a quarter."""
        left = 0.25 ** np.asarray(self.palette, dtype=np.float32)
        weights = self.nominal()[:, :1] / np.float32(self.palette[0])
        return np.asarray(weights * left, dtype=np.float32)

    def layer_costs(self) -> NDArray[np.float64]:
        """Bits `[layers, palette]` of each layer or tied set where all of its units have one width."""
        engine, middle = self._engine, getattr(self.recipe, "zeros", None) == "middle"
        size = storage_bits if engine is None else lambda layout: engine.storage_bits(layout, middle)
        known = {
            shape: [size(self.bare(*shape, min(b, max(self.recipe.widths(shape[0]))))) for b in self.palette]
            for shape in set(self.shapes.values())
        }
        return np.array(
            [np.sum([known[self.shapes[n]] for n in tied], axis=0) for tied in self.members.values()], float
        )

    @property
    def members_units(self) -> list[Ints]:
        """Units of each layer or tied set, in column order."""
        return [np.arange(part.start, part.stop, dtype=np.int32) for part in self.slices.values()]

    @property
    def weights(self) -> list[float]:
        """Number of weights of each layer or tied set."""
        return [sum(float(np.prod(self.shapes[name])) for name in tied) for tied in self.members.values()]

    def nominal(self) -> NDArray[np.float32]:
        """Bits of the codes alone `[units, palette]`."""
        costs = np.zeros((self.count, len(self.palette)), dtype=np.float32)
        for head, tied in self.members.items():
            width = self.shapes[tied[0]][1]
            columns = np.full(-(-width // self.group_size), min(self.group_size, width))
            columns[-1] = width - self.group_size * (len(columns) - 1)
            for name in tied:
                bits = np.minimum(self.palette, max(self.recipe.widths(self.shapes[name][0])))
                costs[self.slices[head]] += self.shapes[name][0] * columns[:, None] * bits[None, :]
        return costs

    def layouts(self, choices: Ints) -> dict[str, Layout]:
        """Layout of every layer. Layers of one shape and the same bits share one: most do during a search."""
        bits = np.asarray(self.palette, dtype=np.int8)[choices]
        found: dict[str, Layout] = {}
        known: dict[tuple[tuple[int, int], bytes], Layout] = {}
        for head, tied in self.members.items():
            mine = bits[self.slices[head]]
            for name in tied:
                key = self.shapes[name], mine.tobytes()
                if key not in known:
                    plan = LayerPlan(mine, self.group_size)  # type: ignore[arg-type]
                    known[key] = self.recipe.layout(*self.shapes[name], plan)
                found[name] = known[key]
        return {name: found[name] for name in self.shapes}

    def plans(self, choices: Ints) -> dict[str, LayerPlan]:
        """Plan of every layer."""
        bits = np.asarray(self.palette)[choices]
        found = {}
        for head, tied in self.members.items():
            for name in tied:
                capped = np.minimum(bits[self.slices[head]], max(self.recipe.widths(self.shapes[name][0])))
                found[name] = LayerPlan(tuple(capped.tolist()), self.group_size)
        return {name: found[name] for name in self.shapes}
