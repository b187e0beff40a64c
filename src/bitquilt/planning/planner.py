"""Which bits does every column group of the whole model get within a budget? Planner(...).plan(budget) -> Planned.

Separable costs order the steps (`allocation.scopes`); where the order is cut is decided by the exact size, so that a
plan never exceeds its budget and leaves less than one step of it. Without sensitivities every layer gets the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitquilt.allocation.exact import MAX_VARIABLES, exact_choices
from bitquilt.allocation.path import Ints, Path, cut, spend_rest, steepest_up_to
from bitquilt.allocation.scopes import order_steps, paired
from bitquilt.core.budget import Budget, Scope
from bitquilt.core.plan_file import OuterBits, plan_json
from bitquilt.core.recipe import Plannable, Recipe
from bitquilt.core.types import LayerPlan, Layout
from bitquilt.errors import UserError
from bitquilt.model.config import total_bpw, total_nominal_bits
from bitquilt.model.memory import Memory, memory_bytes
from bitquilt.model.structure import Skeleton
from bitquilt.planning.folder_size import FolderSize, Sizes, json_bytes
from bitquilt.planning.interaction import together
from bitquilt.planning.sensitivities import Sensitivities
from bitquilt.planning.unit_costs import Units
from bitquilt.stream.embedding_and_head import RoundedTable

# Where layers are narrow, a width that only few channels of a layer have costs more in tables and maps than it brings:
# up to here every widest width is tried. cmpq at 2.96 bpw on stories260k (3,600 channels of 64 and 172): nothing beyond
# 4 bits is predicted to lose 5 % less than channels of up to 8; on the demo model it is 2 %.
_FEW_UNITS = 30_000
# Of a budget: below, single steps fill it; larger models never are. Where layers have one width, below the second only.
_NEAR, _NEAR_LAYERS = 0.998, 0.995


class UnreachableError(UserError):
    """No plan is within the budget. `reach`: least and most that plans take, in the unit of `budget`; `reach_bytes`:
    the same plans' whole folders."""

    def __init__(
        self, message: str, budget: Budget, reach: tuple[float, float], reach_bytes: tuple[float, float]
    ) -> None:
        super().__init__(message)
        self.budget, self.reach, self.reach_bytes = budget, reach, reach_bytes


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan and all that is known of it before a weight is read. `losses`: predicted per layer, empty without
    sensitivities; `spent` of `budget` in the budget's own unit; `reach`: its least and most."""

    plans: dict[str, LayerPlan]
    layouts: dict[str, Layout]
    size: FolderSize
    losses: dict[str, float]
    spent: float
    reach: tuple[float, float]
    scope: Scope

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
        """Predicted increase of the final loss, all layers."""
        return sum(self.losses.values()) if self.losses else None


class Planner:
    """Everything about a model and a recipe that does not depend on the budget, worked out once."""

    def __init__(
        self,
        skeleton: Skeleton,
        recipe: Plannable,
        recipe_values: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, int]],
        sensitivities: Sensitivities | None = None,
        *,
        ties: Sequence[Sequence[str]] = (),
        tables: Sequence[RoundedTable] = (),
    ) -> None:
        """`shapes`: `[out, in]` of the layers to quantize, by path; `ties`: layers that share their bits; `tables`:
        embedding and head in few bits, which are not the plan's to give out, but count.

        Raises UserError if the sensitivities do not fit the layers, or layers of different widths are tied.
        """
        self.units = Units(recipe, shapes, sensitivities, ties)
        self.skeleton, self.shapes, self.sensitivities = skeleton, self.units.shapes, sensitivities
        self.tables = tuple(tables)
        group_size = self.units.group_size
        digits = sum(-(-width // group_size) for _, width in shapes.values())
        empty = {name: LayerPlan((), group_size) for name in shapes}
        outer = OuterBits(**{table.kind: table.bits for table in tables})
        text = json_bytes(plan_json(recipe_values, empty, outer)) + digits
        layers = [*shapes, *(table.path for table in tables)]
        changed = {key: value for table in tables for key, value in table.config.items()}
        self.sizes = Sizes(skeleton, layers, plan_text=text, digits=digits, config=changed)
        self._reached: dict[tuple[str, int | None], tuple[float, float]] = {}

    # what a choice is worth

    def layouts(self, choices: Ints) -> dict[str, Layout]:
        """Of every layer, from choices per unit, and of the tables."""
        return {**self.units.layouts(choices), **{table.path: table.layout for table in self.tables}}

    def spent(self, budget: Budget, layouts: Mapping[str, Layout]) -> float:
        """What these layouts take, in the unit of the budget's value."""
        if budget.kind == "bits":
            return total_nominal_bits(layouts)
        if budget.kind == "bpw":
            return total_bpw(layouts)
        if budget.kind == "size":
            return self.sizes.of(layouts).total
        assert budget.ctx is not None
        return self.memory(layouts, budget.ctx).total

    def memory(self, layouts: Mapping[str, Layout], ctx: int) -> Memory:
        """What the model takes while it runs."""
        looked_up = [table.path for table in self.tables if table.looked_up]
        return memory_bytes(self.skeleton, layouts, ctx, looked_up)

    def reach(self, budget: Budget) -> tuple[float, float]:
        """The least and the most that plans take, in the budget's unit."""
        key = (budget.kind, budget.ctx)
        if key not in self._reached:
            count = self.units.count
            ends = (np.zeros(count, np.int8), np.full(count, len(self.units.palette) - 1, np.int8))
            least, most = (self.spent(budget, self.layouts(choices)) for choices in ends)
            self._reached[key] = (least, most)
        return self._reached[key]

    def check(self, budget: Budget) -> tuple[float, float]:
        """The reach. Raises UnreachableError for a budget below the least; one above the most is the most."""
        least, most = self.reach(budget)
        if budget.value < least or (budget.value > most and budget.kind in ("bits", "bpw")):
            shown = _shown(budget, least, most)
            raise UnreachableError(
                f"the budget is {budget}; this model reaches {shown} with this recipe; change the "
                "budget, the recipe or its group size",
                budget,
                (least, most),
                self.reach(Budget("size", 1.0)),
            )
        return least, most

    def plan(self, budget: Budget, scope: Scope = "global") -> Planned:
        """The plan of least predicted loss within the budget. Raises UnreachableError where there is none."""
        reach = self.check(budget)
        units, losses = self.units, self.units.losses
        if self.sensitivities is None and scope != "layers":
            scope = "uniform"
        elif self.sensitivities is None:
            losses = units.alike()
        costs = units.nominal() if budget.kind == "bits" else units.costs
        unit = 1.0 / self._weights() if budget.kind in ("bits", "bpw") else 1 / 8
        base = float(costs[:, 0].sum(dtype=np.float64))

        def exact(choices: Ints) -> float:
            return self.spent(budget, self.layouts(choices))

        def within(path: Path) -> Ints:
            def after(steps: int) -> Ints:
                choices = path.at(steps)
                return paired(choices, units.losses, costs, units.members_units) if scope == "pairs" else choices

            return after(cut(path, lambda steps: exact(after(steps)), budget.value, base, unit))

        def filled(choices: Ints) -> Ints:
            enough = exact(choices) >= (_NEAR_LAYERS if scope == "layers" else _NEAR) * budget.value
            return choices if enough else spend_rest(choices, losses, costs, exact, budget.value)

        choices = within(order_steps(scope, losses, costs, units.members_units, units.weights))
        if scope == "global":
            choices = filled(self._refine(choices, costs, budget, base, unit, exact))
            few = budget.kind != "bits" and units.count <= _FEW_UNITS
            for widest in range(int(choices.max()) - 1 if few else 0, 0, -1):
                other = filled(within(steepest_up_to(widest, units.losses, costs)))
                choices = min(choices, other, key=self._loss)
        elif scope == "layers":
            choices = filled(choices)
        return self._planned(choices, budget, reach, scope)

    def _loss(self, choices: Ints) -> float:
        return float(self.units.losses[np.arange(self.units.count), choices].sum(dtype=np.float64))

    def _weights(self) -> int:
        own = sum(rows * width for rows, width in self.shapes.values())
        return own + sum(table.weights for table in self.tables)

    def _refine(
        self,
        choices: Ints,
        costs: NDArray[np.float32],
        budget: Budget,
        base: float,
        unit: float,
        exact: Callable[[Ints], float],
    ) -> Ints:
        """Of few choices the exact optimum, where it is better. Its budget is what is left when everything that is
        no unit's own (maps, headers) is as large as it can be: then it fits whatever it chooses."""
        losses = self.units.losses
        if losses.size > MAX_VARIABLES:
            return choices
        rows = np.arange(self.units.count)

        def overhead(choices: Ints) -> float:
            return exact(choices) / unit - float(costs[rows, choices].sum(dtype=np.float64))

        most = overhead((rows[::-1] % len(self.units.palette)).astype(np.int8))
        room = budget.value / unit - most - 0.01 * abs(most - overhead(choices))
        if room <= base:
            return choices
        found = exact_choices(losses, costs, room)
        return found if self._loss(found) < self._loss(choices) and exact(found) <= budget.value else choices

    def _planned(self, choices: Ints, budget: Budget, reach: tuple[float, float], scope: Scope) -> Planned:
        layouts, plans = self.layouts(choices), self.units.plans(choices)
        losses = {}
        if self.sensitivities is not None and self.sensitivities.method == "kfac":
            losses = predicted_losses(self.sensitivities, plans, self.units.recipe)
        return Planned(plans, layouts, self.sizes.of(layouts), losses, self.spent(budget, layouts), reach, scope)


def predicted_losses(sensitivities: Sensitivities, plans: Mapping[str, LayerPlan], recipe: Recipe) -> dict[str, float]:
    """Per layer, in nats per token, everything quantized at once by `recipe`; a layer whose plan leaves its table
    (edited by hand) is left out."""
    losses, repaired = {}, recipe.needs.drift
    for name, plan in plans.items():
        widths, table = sensitivities.widths.get(name, ()), sensitivities.losses.get(name)
        if table is None or len(table) != len(plan.bits) or not set(plan.bits) <= set(widths):
            continue
        column = np.searchsorted(widths, plan.bits)
        factors = np.array(together(widths, repaired))[column]
        losses[name] = float((factors * table[np.arange(len(column)), column]).sum(dtype=np.float64))
    return losses


def _shown(budget: Budget, least: float, most: float) -> str:
    if budget.kind in ("bits", "bpw"):
        return f"{least:.4g} to {most:.4g}"
    return f"{least:.0f} to {most:.0f} bytes ({least / 2**30:.3g} to {most / 2**30:.3g} GiB)"
