"""`Planner(...).plan(budget)`: the bits of every column group of the whole model within a budget, as a `Planned`.

One planner serves all budgets of a model and a recipe; `check` refuses a budget that no plan can meet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from bitquilt.allocation.path import Ints
from bitquilt.core.budget import Budget, Scope
from bitquilt.core.plan_file import OuterBits, plan_json
from bitquilt.core.recipe import Plannable, Recipe
from bitquilt.core.types import LayerPlan, Layout
from bitquilt.engines.engine import Container
from bitquilt.engines.known import engine_named
from bitquilt.errors import UserError, not_plannable
from bitquilt.model.config import total_bpw, total_nominal_bits
from bitquilt.model.free_tables import Table
from bitquilt.model.memory import Memory, memory_bytes
from bitquilt.model.replace import table_path
from bitquilt.model.structure import Skeleton
from bitquilt.model.ties import tied_layers
from bitquilt.planning.exported_size import ExportedSize
from bitquilt.planning.folder_size import FolderSize, Sizes, json_bytes
from bitquilt.planning.interaction import LossPrediction, predict
from bitquilt.planning.search import Search
from bitquilt.planning.sensitivities import Sensitivities
from bitquilt.planning.unit_costs import Units
from bitquilt.stream.embedding_and_head import RoundedTable, config_changes
from bitquilt.stream.run_report import recipe_json


class UnreachableError(UserError):
    """No plan is within the budget. `reach`: least and most that plans take, in the unit of `budget`; `reach_bytes`:
    the same for the whole folder."""

    def __init__(
        self, message: str, budget: Budget, reach: tuple[float, float], reach_bytes: tuple[float, float]
    ) -> None:
        super().__init__(message)
        self.budget, self.reach, self.reach_bytes = budget, reach, reach_bytes


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan and everything known about it before a weight is read.

    `spent` of the budget in the budget's own unit; `reach`: least and most that plans take in that unit. `prediction`:
    None without sensitivities. `table_rows`: bits of every row of embedding and head, where they share the budget.
    `exported_bytes`: the folder for the planner's engine, where it has one.
    """

    plans: dict[str, LayerPlan]
    layouts: dict[str, Layout]
    size: FolderSize
    prediction: LossPrediction | None
    spent: float
    reach: tuple[float, float]
    scope: Scope
    table_rows: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    exported_bytes: int | None = None

    @property
    def bpw(self) -> float:
        """True bits per weight."""
        return total_bpw(self.layouts)

    @property
    def nominal_bits(self) -> float:
        """Mean code width."""
        return total_nominal_bits(self.layouts)

    @property
    def loss(self) -> float | None:
        """Predicted KL of the whole model in nats per token."""
        return None if self.prediction is None else self.prediction.kl


class Planner:
    """Everything about a model and a recipe that does not depend on the budget, worked out once."""

    def __init__(
        self,
        skeleton: Skeleton,
        recipe: Recipe,
        shapes: Mapping[str, tuple[int, int]],
        *,
        ties: Sequence[Sequence[str]] = (),
        outer: Sequence[RoundedTable] = (),
        tables: Sequence[Table] = (),
        engine: str | None = None,
    ) -> None:
        """`shapes`: `[out, in]` of the layers to quantize, by path; `ties`: layers that share their bits; `outer`:
        embedding and head in few bits, which count although the plan does not allocate them; `tables`: those whose rows
        share the budget; `engine`: the name of another engine, whose widths and files count instead of ours.

        Raises UserError if the recipe cannot be planned, layers of different widths are tied, or the engine cannot hold
        a layer.
        """
        if not isinstance(recipe, Plannable):
            raise not_plannable(recipe.name)
        self.engine = None if engine is None else engine_named(engine)
        if self.engine is not None and self.engine.alike == "fused":
            ties = tied_layers(skeleton.model, shapes)
        # a recipe that fixes its zeros there; others may need a wider form
        self.middle = self.engine is not None and recipe.plan_terms.zeros == "middle"
        self.units, self.ties = Units(recipe, shapes, ties, tables=tables, engine=self.engine), ties
        self.skeleton, self.shapes, self.recipe, self.outer = skeleton, self.units.shapes, recipe, tuple(outer)
        self.tables = tuple(tables)
        self.outer_bits = OuterBits(**{table.kind: table.bits for table in outer})
        self.sizes = self._sizes()
        self.exported = None
        if self.engine is not None:
            self.exported = ExportedSize(skeleton, self.engine, self.sizes, config_changes(outer))
            self.held(self.layouts(np.zeros(self.units.count, np.int8)))
        self._reached: dict[tuple[str, int | None], tuple[float, float]] = {}

    def _sizes(self) -> Sizes:
        group_size = self.units.group_size
        digits = sum(-(-width // group_size) for _, width in self.shapes.values())
        empty = {name: LayerPlan((), group_size) for name in self.shapes}
        rows = {table.path: np.full(table.rows, 8, np.uint8) for table in self.tables}
        text = json_bytes(plan_json(recipe_json(self.recipe), empty, self.outer_bits, rows)) + digits
        layers = [*self.shapes, *(table.path for table in self.outer)]
        changed = config_changes([*self.outer, *self.tables])
        tables = [table.path for table in self.tables]
        return Sizes(self.skeleton, layers, plan_text=text, digits=digits, tables=tables, config=changed)

    def layouts(self, choices: Ints) -> dict[str, Layout]:
        """Layouts of every layer for choices per unit, and of embedding and head."""
        return self.with_outer(self.units.layouts(choices))

    def with_outer(self, layouts: Mapping[str, Layout]) -> dict[str, Layout]:
        """These layouts of the layers, and those of embedding and head."""
        return {**layouts, **{table.path: table.layout for table in self.outer}}

    def spent(self, budget: Budget, layouts: Mapping[str, Layout]) -> float:
        """Size of these layouts in the budget's unit."""
        if budget.kind == "bits":
            return total_nominal_bits(layouts)
        if budget.kind == "bpw":
            return self.bpw(layouts)
        if budget.kind in ("size", "total-bpw"):
            exported = self.exported_bytes(layouts)
            total = self.sizes.of(layouts).total if exported is None else exported
            return total if budget.kind == "size" else 8 * total / self.skeleton.checkpoint.weights
        assert budget.ctx is not None
        return self.memory(layouts, budget.ctx).total

    def bpw(self, layouts: Mapping[str, Layout]) -> float:
        """True bits per weight, in the engine's files where there is one."""
        if self.engine is None:
            return total_bpw(layouts)
        held = self.held(layouts)
        specs = [self.engine.layer_specs(layout, held=held[path]) for path, layout in layouts.items()]
        return 8 * sum(spec.nbytes for found in specs for spec in found.values()) / self._own_weights

    def held(self, layouts: Mapping[str, Layout]) -> dict[str, Container]:
        """Forms of the layers in the engine's files. Raises UserError for a layer that it cannot hold."""
        assert self.engine is not None
        middle = self.shapes if self.middle else ()
        return self.engine.containers(layouts, middle, self.ties, [table.path for table in self.outer])

    def exported_bytes(self, layouts: Mapping[str, Layout]) -> int | None:
        """Bytes of the folder for the engine, None without one."""
        return None if self.exported is None else self.exported.of(layouts, self.held(layouts))

    def memory(self, layouts: Mapping[str, Layout], ctx: int) -> Memory:
        """Memory that the model takes while it runs with `ctx` tokens."""
        looked_up = [table.path for table in self.outer if table.looked_up]
        single = {table.path for table in self.tables if table.looked_up}
        looked_up += [name for name, layout in layouts.items() if layout.of_rows and table_path(name) in single]
        return memory_bytes(self.skeleton, layouts, ctx, looked_up)

    def reach(self, budget: Budget) -> tuple[float, float]:
        """Least and most that plans take, in the budget's unit."""
        key = (budget.kind, budget.ctx)
        if key not in self._reached:
            count = self.units.count
            ends = (np.zeros(count, np.int8), np.full(count, len(self.units.palette) - 1, np.int8))
            least, most = (self.spent(budget, self.layouts(choices)) for choices in ends)
            self._reached[key] = (least, most)
        return self._reached[key]

    def check(self, budget: Budget) -> tuple[float, float]:
        """Return the reach. Raises UnreachableError for a budget below it, or for bits per weight above it."""
        least, most = self.reach(budget)
        if budget.value < least or (budget.value > most and not budget.in_bytes):
            raise UnreachableError(
                f"the budget is {budget}; this model reaches {_range_text(budget, least, most)} with this recipe; "
                "change the budget, the recipe or its group size",
                budget,
                (least, most),
                self.reach(Budget("size", 1.0)),
            )
        return least, most

    def plan(self, budget: Budget, scope: Scope = "global", known: Sensitivities | None = None) -> Planned:
        """Return the plan of least predicted loss within the budget.

        Without sensitivities every layer gets the same bits; the scope "layers" then fills the budget layer by layer.
        Raises UnreachableError where no plan is within the budget, UserError where sensitivities do not fit the layers.
        """
        reach, units = self.check(budget), self.units
        losses = units.losses(known)
        if known is None and scope == "layers":
            losses = units.assumed_losses()
        elif known is None:
            scope = "uniform"
        search = Search(
            units,
            losses,
            costs=units.nominal() if budget.kind == "bits" else units.costs,
            exact=lambda choices: self.spent(budget, self.layouts(choices)),
            target=budget.value,
            unit=1 / 8 if budget.in_bytes else 1.0 / self._weights(budget),
            estimates=budget.kind != "bits",
        )
        choices = search.choices(scope)
        layouts, plans, rows = self.layouts(choices), units.plans(choices), units.table_rows(choices, known)
        prediction = predict(known, plans, self.recipe, self.outer_bits, rows)
        size, spent, exported = self.sizes.of(layouts), self.spent(budget, layouts), self.exported_bytes(layouts)
        return Planned(plans, layouts, size, prediction, spent, reach, scope, table_rows=rows, exported_bytes=exported)

    def plan_own(self, budget: Budget, scope: Scope, known: Sensitivities | None = None) -> Planned:
        """Return the plan within a recipe's own bits, which do not count embedding and head; the size does."""
        alone = Planner(self.skeleton, self.recipe, self.shapes, ties=self.ties).plan(budget, scope, known)
        layouts = self.with_outer(alone.layouts)
        prediction = predict(known, alone.plans, self.recipe, self.outer_bits)
        exported = self.exported_bytes(layouts)
        size = self.sizes.of(layouts)
        return replace(alone, layouts=layouts, size=size, prediction=prediction, exported_bytes=exported)

    def _weights(self, budget: Budget) -> int:
        """Number of weights over which bits per weight are a mean."""
        return self.skeleton.checkpoint.weights if budget.kind == "total-bpw" else self._own_weights

    @property
    def _own_weights(self) -> int:
        own = sum(rows * width for rows, width in self.shapes.values())
        return own + sum(table.weights for table in self.outer)


def _range_text(budget: Budget, least: float, most: float) -> str:
    if not budget.in_bytes:
        return f"{least:.4g} to {most:.4g}"
    return f"{least:.0f} to {most:.0f} bytes ({least / 2**30:.3g} to {most / 2**30:.3g} GiB)"
