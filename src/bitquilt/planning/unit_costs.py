"""`Units`: the parts of a model that get one width each, the bits that each width takes and its loss.

A unit is a column group (one channel, for recipes that work channel by channel) of one layer, or of several tied
layers, or a block of rows of an embedding or head (`table_units`). A choice is a position in `palette`, one per unit.
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
from bitquilt.model.free_tables import TABLE_WIDTHS, Table
from bitquilt.planning.interaction import interaction_factors
from bitquilt.planning.sensitivities import Sensitivities
from bitquilt.planning.table_units import TableUnits


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
        tables: Sequence[Table] = (),
        engine: Engine | None = None,
    ) -> None:
        """`shapes`: `[out, in]` by path; `palette`: by default all widths of the recipe and of `tables`, embedding and
        head, where they share the budget. `engine`: the widths are those that it has too, and whole layers take what
        they take in its files.

        Raises UserError if layers of different widths are tied.
        """
        self.recipe, self.shapes = recipe, dict(shapes)
        self.group_size = recipe.plan_terms.unit_columns
        self._group(ties)
        self.tables: list[tuple[TableUnits, slice]] = []
        for table in tables:
            units = TableUnits(table)
            self.tables.append((units, slice(self.count, self.count + units.count)))
            self.count += units.count
        every = {bits for rows, _ in self.shapes.values() for bits in recipe.widths(rows)}
        self._engine = engine
        every |= set(TABLE_WIDTHS) if tables else set()
        self.palette = tuple(palette) or tuple(sorted(every if engine is None else every & set(engine.bits)))
        self._widths: dict[int, tuple[int, ...]] = {}
        self.costs = np.zeros((self.count, len(self.palette)), dtype=np.float32)
        prices = {shape: self._prices(*shape) for shape in set(self.shapes.values())}
        for head, tied in self.members.items():
            for name in tied:
                self.costs[self.slices[head]] += prices[self.shapes[name]]
        for units, part in self.tables:
            self.costs[part] = units.costs(self.palette)

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
        """Bits of each group of a layer at each width."""
        groups = -(-width // self.group_size)
        last = width - self.group_size * (groups - 1)

        def price(columns: int, bits: int) -> float:
            if self.group_size % 8 == 0:
                return storage_bits(self.bare(rows, columns, bits))
            # one more channel among many: a lone channel would pay for whole bytes per row and for a shared table
            more, fewer = (storage_bits(self.bare(rows, count * columns, bits)) for count in (16, 8))
            return (more - fewer) / 8

        own = self._own_widths(rows)
        table = np.array([[price(min(self.group_size, width), b) for b in own]], dtype=np.float32)
        table = np.repeat(table, groups, axis=0)
        table[-1] = [price(last, b) for b in own]
        return table

    def _own_widths(self, rows: int) -> tuple[int, ...]:
        """Widths of a layer at each choice of the palette: the widest that it can have, up to that of the choice."""
        if rows not in self._widths:
            allowed = set(self.recipe.widths(rows))
            own = sorted(allowed if self._engine is None else allowed & set(self._engine.bits))
            mine = (max((bits for bits in own if bits <= choice), default=own[0]) for choice in self.palette)
            self._widths[rows] = tuple(mine)
        return self._widths[rows]

    def bare(self, rows: int, columns: int, bits: int) -> Layout:
        """Layout of a single group, without map and outliers."""
        layout = self.recipe.layout(rows, columns, LayerPlan((bits,) * -(-columns // self.group_size), self.group_size))
        return Layout(rows, columns, layout.segments)

    def losses(self, known: Sensitivities | None) -> NDArray[np.float32]:
        """Losses `[units, palette]` by the measured tables; zeros without tables.

        Widths that a layer cannot use gain nothing over its own next lower one, so they are never chosen. Raises
        UserError if the tables do not fit the layers.
        """
        losses = np.zeros((self.count, len(self.palette)), dtype=np.float32)
        if known is not None:
            for head, tied in self.members.items():
                for name in tied:
                    losses[self.slices[head]] += self._table(name, known)
            for units, part in self.tables:
                losses[part] = units.losses(self.palette, known)
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
        own = self._own_widths(self.shapes[name][0])
        return table[:, [widths.index(b) for b in own]] * np.array(interaction_factors(own), dtype=np.float32)

    def assumed_losses(self) -> NDArray[np.float32]:
        """Losses `[units, palette]` when none were measured: all weights alike, each bit leaving a quarter."""
        left = np.empty((self.count, len(self.palette)), dtype=np.float32)
        weights = np.empty((self.count, 1), dtype=np.float32)
        nominal = self.nominal()
        parts = [(self._own_widths(self.shapes[head][0]), part) for head, part in self.slices.items()]
        for own, part in [*parts, *((units.table.widths(self.palette), part) for units, part in self.tables)]:
            left[part], weights[part] = 0.25 ** np.array(own, dtype=np.float32), nominal[part, :1] / own[0]
        return weights * left

    def layer_costs(self) -> NDArray[np.float64]:
        """Bits `[wholes, palette]` of each of `wholes`."""
        engine, middle = self._engine, self.recipe.plan_terms.zeros == "middle"
        size = storage_bits if engine is None else lambda layout: engine.storage_bits(layout, middle)
        known = {
            shape: [size(self.bare(*shape, bits)) for bits in self._own_widths(shape[0])]
            for shape in set(self.shapes.values())
        }
        layers = [np.sum([known[self.shapes[n]] for n in tied], axis=0) for tied in self.members.values()]
        return np.array([*layers, *(row for _, part in self.tables for row in self.costs[part])], float)

    @property
    def members_units(self) -> list[Ints]:
        """Units of each layer or tied set, in column order, then those of each table."""
        parts = [*self.slices.values(), *(part for _, part in self.tables)]
        return [np.arange(part.start, part.stop, dtype=np.int32) for part in parts]

    @property
    def wholes(self) -> list[Ints]:
        """Units that have one width where layers do: those of each layer or tied set, and each unit of a table."""
        parts = [*self.slices.values(), *(slice(k, k + 1) for _, p in self.tables for k in range(p.start, p.stop))]
        return [np.arange(part.start, part.stop, dtype=np.int32) for part in parts]

    @property
    def weights(self) -> list[float]:
        """Number of weights of each layer or tied set, then of each table."""
        layers = [sum(float(np.prod(self.shapes[name])) for name in tied) for tied in self.members.values()]
        return [*layers, *(float(units.table.weights) for units, _ in self.tables)]

    def nominal(self) -> NDArray[np.float32]:
        """Bits of the codes alone `[units, palette]`."""
        costs = np.zeros((self.count, len(self.palette)), dtype=np.float32)
        for head, tied in self.members.items():
            width = self.shapes[tied[0]][1]
            columns = np.full(-(-width // self.group_size), min(self.group_size, width))
            columns[-1] = width - self.group_size * (len(columns) - 1)
            for name in tied:
                bits = np.array(self._own_widths(self.shapes[name][0]))
                costs[self.slices[head]] += self.shapes[name][0] * columns[:, None] * bits[None, :]
        for units, part in self.tables:
            own = np.array(units.table.widths(self.palette))
            costs[part] = units.table.columns * units.sizes[:, None] * own[None, :]
        return costs

    def layouts(self, choices: Ints) -> dict[str, Layout]:
        """Layout of every layer and of every part of a table.

        Layers of one shape and the same bits share one: most do during a search.
        """
        found: dict[str, Layout] = {}
        known: dict[tuple[tuple[int, int], bytes], Layout] = {}
        for head, tied in self.members.items():
            for name in tied:
                mine = self._layer_bits(choices, head, name)
                key = self.shapes[name], mine.tobytes()
                if key not in known:
                    plan = LayerPlan(mine, self.group_size)  # type: ignore[arg-type]
                    known[key] = self.recipe.layout(*self.shapes[name], plan)
                found[name] = known[key]
        parts = [units.parts(self._table_bits(choices, units, part)) for units, part in self.tables]
        return {name: found[name] for name in self.shapes} | {k: v for own in parts for k, v in own.items()}

    def _layer_bits(self, choices: Ints, head: str, name: str) -> Ints:
        return np.asarray(self._own_widths(self.shapes[name][0]), dtype=np.int8)[choices[self.slices[head]]]

    def _table_bits(self, choices: Ints, units: TableUnits, part: slice) -> Ints:
        return np.asarray(units.table.widths(self.palette), dtype=np.int8)[choices[part]]

    def table_rows(self, choices: Ints, known: Sensitivities | None) -> dict[str, NDArray[np.uint8]]:
        """Bits of every row of every table, by path."""
        return {
            units.table.path: units.rows(self._table_bits(choices, units, part), known) for units, part in self.tables
        }

    def plans(self, choices: Ints) -> dict[str, LayerPlan]:
        """Plan of every layer."""
        found = {}
        for head, tied in self.members.items():
            for name in tied:
                found[name] = LayerPlan(tuple(self._layer_bits(choices, head, name).tolist()), self.group_size)
        return {name: found[name] for name in self.shapes}
