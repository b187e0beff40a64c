"""Which bits does every column group of the whole model get within a budget? Planner(...).plan(budget) -> Planned.

Separable costs order the steps (`allocation.scopes`); where the order is cut is decided by the exact size, so that a
plan never exceeds its budget and leaves less than one step of it. Without sensitivities every layer gets the same.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitquilt.allocation.budget import Budget
from bitquilt.allocation.cut import cut, spend_rest
from bitquilt.allocation.exact import MAX_VARIABLES, exact_choices
from bitquilt.allocation.path import Ints, Path
from bitquilt.allocation.scopes import Scope, order_steps
from bitquilt.errors import UserError
from bitquilt.models.config import total_bpw, total_nominal_bits
from bitquilt.models.structure import Skeleton
from bitquilt.packing import storage_bits
from bitquilt.protocols import Plannable
from bitquilt.runtime.memory import memory_bytes
from bitquilt.runtime.size import FolderSize, Sizes, json_bytes
from bitquilt.runtime.tables import Sensitivities
from bitquilt.sensitivity.together import together
from bitquilt.types import LayerPlan, Layout

# One-bit groups lose far more together than the tables say: at 2.25 bpw on babyllama-1m-chars (slim-llm, groups of 128)
# KL was 2.55 with 17 one-bit groups where the tables liked them, 1.80 with 8 at four times the loss, 0.58 with none. So
# every group gets two bits before any gets three; only budgets below two bits everywhere hold one-bit groups.
_ONE_BIT_WEIGHT = 1e3

_NEAR = 0.998  # of a budget: below, single steps fill it; larger models never are


class UnreachableError(UserError):
    """No plan is within the budget. `reach`: least and most that plans take, in the budget's unit."""

    def __init__(self, message: str, reach: tuple[float, float]) -> None:
        super().__init__(message)
        self.reach = reach


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
    ) -> None:
        """`shapes`: `[out, in]` of the layers to quantize, by path; `ties`: layers that share their bits.

        Raises UserError if the sensitivities do not fit the layers, or layers of different widths are tied.
        """
        self.recipe, self.shapes, self.sensitivities = recipe, dict(shapes), sensitivities
        self.group_size = int(getattr(recipe, "group_size", 1))
        self.skeleton = skeleton
        digits = sum(-(-width // self.group_size) for _, width in shapes.values())
        empty = {name: {"group_size": self.group_size, "bits": ""} for name in shapes}
        text = json_bytes({"recipe": dict(recipe_values), "layers": empty}) + digits
        self.sizes = Sizes(skeleton, list(shapes), plan_text=text, digits=digits)
        self._reached: dict[tuple[str, int | None], tuple[float, float]] = {}
        self._group(ties)
        self._tabulate()

    def _group(self, ties: Sequence[Sequence[str]]) -> None:
        """Units: each column group of each layer, or of each set of tied layers."""
        leader = {name: tie[0] for tie in ties for name in tie if name in self.shapes and tie[0] in self.shapes}
        self.members: dict[str, list[str]] = {}
        for name in self.shapes:
            self.members.setdefault(leader.get(name, name), []).append(name)
        for tied in self.members.values():
            widths = {self.shapes[name][1] for name in tied}
            if len(widths) > 1:
                raise UserError(f"{' and '.join(tied)} are tied and have {sorted(widths)} inputs; wanted equal widths")
        self.units: dict[str, slice] = {}
        start = 0
        for head, tied in self.members.items():
            count = -(-self.shapes[tied[0]][1] // self.group_size)
            self.units[head] = slice(start, start + count)
            start += count
        self.count = start
        palettes = [set(self.recipe.widths(rows)) for rows, _ in self.shapes.values()]
        self.palette = tuple(sorted(set.union(*palettes)))

    def _tabulate(self) -> None:
        """Costs in bits and losses, fp32 `[units, palette]`. A width that a layer cannot have costs as the widest it
        has and helps no more, so no step leads there."""
        self.costs = np.zeros((self.count, len(self.palette)), dtype=np.float32)
        self.losses = np.zeros((self.count, len(self.palette)), dtype=np.float32)
        prices = {shape: self._prices(*shape) for shape in set(self.shapes.values())}
        for head, tied in self.members.items():
            for name in tied:
                self.costs[self.units[head]] += prices[self.shapes[name]]
                if self.sensitivities is not None:
                    self.losses[self.units[head]] += self._table(name)

    def _prices(self, rows: int, width: int) -> NDArray[np.float32]:
        groups = -(-width // self.group_size)
        last = width - self.group_size * (groups - 1)
        widths = self.recipe.widths(rows)

        def price(columns: int, bits: int) -> float:
            bits = min(bits, max(widths))
            if self.group_size % 8 == 0:
                return storage_bits(self._bare(rows, columns, bits))
            # one more channel among many: alone it would pay for whole bytes in every row and for a shared table
            more, fewer = (storage_bits(self._bare(rows, count * columns, bits)) for count in (16, 8))
            return (more - fewer) / 8

        table = np.array([[price(min(self.group_size, width), b) for b in self.palette]], dtype=np.float32)
        table = np.repeat(table, groups, axis=0)
        table[-1] = [price(last, b) for b in self.palette]
        return table

    def _bare(self, rows: int, columns: int, bits: int) -> Layout:
        """One group by itself: no map, no outliers."""
        layout = self.recipe.layout(rows, columns, LayerPlan((bits,) * -(-columns // self.group_size), self.group_size))
        return Layout(rows, columns, layout.segments)

    def _table(self, name: str) -> NDArray[np.float32]:
        assert self.sensitivities is not None
        found = self.sensitivities
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
        if found.method != "kfac":
            return table[:, column]
        return table[:, column] * np.array(together([widths[i] for i in column]), dtype=np.float32)

    # what a choice is worth

    def layouts(self, choices: Ints) -> dict[str, Layout]:
        """Of every layer, from choices per unit."""
        bits = np.asarray(self.palette, dtype=np.int8)[choices]
        found = {}
        for head, tied in self.members.items():
            for name in tied:
                rows, width = self.shapes[name]
                plan = LayerPlan(bits[self.units[head]], self.group_size)  # type: ignore[arg-type]
                found[name] = self.recipe.layout(rows, width, plan)
        return {name: found[name] for name in self.shapes}

    def spent(self, budget: Budget, layouts: Mapping[str, Layout]) -> float:
        """What these layouts take, in the unit of the budget's value."""
        if budget.kind == "bits":
            return total_nominal_bits(layouts)
        if budget.kind == "bpw":
            return total_bpw(layouts)
        if budget.kind == "size":
            return self.sizes.of(layouts).total
        assert budget.ctx is not None
        return memory_bytes(self.skeleton, layouts, budget.ctx).total

    def reach(self, budget: Budget) -> tuple[float, float]:
        """The least and the most that plans take, in the budget's unit."""
        key = (budget.kind, budget.ctx)
        if key not in self._reached:
            ends = (np.zeros(self.count, np.int8), np.full(self.count, len(self.palette) - 1, np.int8))
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
                (least, most),
            )
        return least, most

    def plan(self, budget: Budget, scope: Scope = "global") -> Planned:
        """The plan of least predicted loss within the budget. Raises UnreachableError where there is none."""
        reach = self.check(budget)
        if self.sensitivities is None:
            scope = "uniform"
        if budget.kind == "bits":
            factors = {name: rows * width for name, (rows, width) in self.shapes.items()}
            costs = self._nominal()
            unit = 1.0 / sum(factors.values())
        else:
            costs = self.costs
            weights = sum(rows * width for rows, width in self.shapes.values())
            unit = {"bpw": 1.0 / weights}.get(budget.kind, 1 / 8)
        path = self._path(scope, self._ranked(), costs)
        base = float(costs[:, 0].sum(dtype=np.float64))

        def exact(choices: Ints) -> float:
            return self.spent(budget, self.layouts(choices))

        choices = cut(path, lambda steps: exact(path.at(steps)), budget.value, base, unit, self.count)
        choices = self._refine(choices, costs, scope, budget, base, unit, exact)
        if scope == "global" and exact(choices) < _NEAR * budget.value:
            choices = spend_rest(choices, self._ranked(), costs, exact, budget.value)
        return self._planned(choices, budget, reach, scope)

    def _nominal(self) -> NDArray[np.float32]:
        costs = np.zeros((self.count, len(self.palette)), dtype=np.float32)
        for head, tied in self.members.items():
            width = self.shapes[tied[0]][1]
            columns = np.full(-(-width // self.group_size), min(self.group_size, width))
            columns[-1] = width - self.group_size * (len(columns) - 1)
            for name in tied:
                widest = max(self.recipe.widths(self.shapes[name][0]))
                bits = np.minimum(self.palette, widest)
                costs[self.units[head]] += self.shapes[name][0] * columns[:, None] * bits[None, :]
        return costs

    def _ranked(self) -> NDArray[np.float32]:
        """The losses that order the steps."""
        if self.palette[0] > 1 or self.sensitivities is None:
            return self.losses
        ranked = self.losses.copy()
        ranked[:, 0] *= _ONE_BIT_WEIGHT
        return ranked

    def _path(self, scope: Scope, losses: NDArray[np.float32], costs: NDArray[np.float32]) -> Path:
        members = [np.arange(s.start, s.stop, dtype=np.int32) for s in self.units.values()]
        weights = [sum(float(np.prod(self.shapes[name])) for name in tied) for tied in self.members.values()]
        return order_steps(scope, losses, costs, members, weights)

    def _refine(
        self,
        choices: Ints,
        costs: NDArray[np.float32],
        scope: Scope,
        budget: Budget,
        base: float,
        unit: float,
        exact: Callable[[Ints], float],
    ) -> Ints:
        """Of few choices the exact optimum, where it is better. Its budget is what is left when everything that is
        no unit's own (maps, headers) is as large as it can be: then it fits whatever it chooses."""
        one_bit = self.palette[0] == 1
        if scope != "global" or self.losses.size > MAX_VARIABLES or (one_bit and choices.min() == 0):
            return choices
        losses = self._ranked()
        worst = np.arange(self.count)[::-1] % len(self.palette)
        rows = np.arange(self.count)
        overhead = exact(worst.astype(np.int8)) / unit - float(costs[rows, worst].sum(dtype=np.float64))
        room = budget.value / unit - 1.01 * overhead
        if room <= base:
            return choices
        found = exact_choices(losses, costs, room)
        better = losses[rows, found].sum(dtype=np.float64) < losses[rows, choices].sum(dtype=np.float64)
        return found if better and exact(found) <= budget.value else choices

    def _planned(self, choices: Ints, budget: Budget, reach: tuple[float, float], scope: Scope) -> Planned:
        layouts = self.layouts(choices)
        bits = np.asarray(self.palette)[choices]
        plans, losses = {}, {}
        for head, tied in self.members.items():
            mine = bits[self.units[head]]
            for name in tied:
                capped = np.minimum(mine, max(self.recipe.widths(self.shapes[name][0])))
                plans[name] = LayerPlan(tuple(capped.tolist()), self.group_size)
        plans = {name: plans[name] for name in self.shapes}
        if self.sensitivities is not None and self.sensitivities.method == "kfac":
            losses = predicted_losses(self.sensitivities, plans)
        return Planned(plans, layouts, self.sizes.of(layouts), losses, self.spent(budget, layouts), reach, scope)


def predicted_losses(sensitivities: Sensitivities, plans: Mapping[str, LayerPlan]) -> dict[str, float]:
    """Per layer, in nats per token, everything quantized at once; a layer whose plan leaves its table (edited by hand)
    is left out."""
    losses = {}
    for name, plan in plans.items():
        widths, table = sensitivities.widths.get(name, ()), sensitivities.losses.get(name)
        if table is None or len(table) != len(plan.bits) or not set(plan.bits) <= set(widths):
            continue
        column = np.searchsorted(widths, plan.bits)
        factors = np.array(together(widths))[column]
        losses[name] = float((factors * table[np.arange(len(column)), column]).sum(dtype=np.float64))
    return losses


def plan_json(recipe: Mapping[str, Any], plans: Mapping[str, LayerPlan]) -> dict[str, Any]:
    """plan.json before a run, as `plans.plan_to_json` writes it after one."""
    layers = {
        name: {"group_size": plan.group_size, "bits": "".join(map(str, plan.bits))} for name, plan in plans.items()
    }
    return json.loads(json.dumps({"recipe": dict(recipe), "layers": layers}))


def _shown(budget: Budget, least: float, most: float) -> str:
    if budget.kind in ("bits", "bpw"):
        return f"{least:.4g} to {most:.4g}"
    return f"{least:.0f} to {most:.0f} bytes ({least / 2**30:.3g} to {most / 2**30:.3g} GiB)"
