"""`Search(...).choices(scope)`: the choices of least loss whose exact size is within a budget.

Separable costs order the steps (`allocation.scopes`). Where the order is cut is decided by the exact size, so that a
plan never exceeds its budget. Layers of one width are chosen exactly; a step is then a whole layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bitquilt.allocation.exact import exact_choices
from bitquilt.allocation.path import Floats, Ints, Path, cut, spend_rest, steepest_up_to
from bitquilt.allocation.scopes import order_steps, paired, summed
from bitquilt.core.budget import Scope
from bitquilt.planning.unit_costs import Units

# In narrow layers a width that only few channels have costs more in tables and maps than it gains. Up to this many
# units every widest width is tried: cmpq at 2.96 bpw on stories260k (3,600 channels of 64 and 172) is predicted to lose
# 5 % less with nothing beyond 4 bits than with channels of up to 8; on the demo model it is 2 %.
_FEW_UNITS = 30_000
# Below this share of the budget, single steps fill it, which large models never need.
_NEAR = 0.998
# Up to so many widths of layers, headers are counted with them: in a folder of 270 kB they are 0.06 % of it.
_FEW_WIDTHS = 1024
# Up to so many losses, the exact optimum over all units refines the path. Beyond, it gains less than 1e-4.
_FEW_LOSSES = 4096
# Solutions tried for layers of one width; two or three are enough, because headers differ by a few bytes.
_TRIES = 8


@dataclass(frozen=True, eq=False)
class Search:
    """One budget over the units of a model. `losses` and `costs`: `[units, palette]`.

    `exact(choices)`: the size in the budget's unit; `target`: the most it may be; `unit`: budget units per cost.
    `estimates`: whether costs are estimates of the size, which a rare width then exceeds.
    """

    units: Units
    losses: Floats
    costs: Floats
    exact: Callable[[Ints], float]
    target: float
    unit: float
    estimates: bool

    def choices(self, scope: Scope) -> Ints:
        """Best choices found for the scope."""
        units = self.units
        if scope == "layers":
            return self._whole_layers()
        path = order_steps(scope, self.losses, self.costs, units.members_units, units.weights)
        if scope != "global":
            return self._within(path, pairs=scope == "pairs")
        choices = self._filled(self._refined(self._within(path)))
        few = self.estimates and units.count <= _FEW_UNITS
        for widest in range(int(choices.max()) - 1 if few else 0, 0, -1):
            other = self._filled(self._within(steepest_up_to(widest, self.losses, self.costs)))
            choices = min(choices, other, key=self._loss)
        return choices

    def _whole_layers(self) -> Ints:
        """Return one choice for all units of a layer: the exact optimum over layers, by what whole layers take.

        Blocks of rows of an embedding or head are chosen one by one.

        Costs may leave out some bytes of headers that depend on the choices. So the room for costs is what remains with
        those of the last solution, until a solution comes again; the best one that fits stands.
        """
        losses = summed(self.losses, self.units.wholes)
        costs = self._layer_costs()
        rows, sizes = np.arange(len(costs)), [len(units) for units in self.units.wholes]
        best = found = np.zeros(len(costs), dtype=np.int8)
        seen = {found.tobytes()}
        for _ in range(_TRIES):
            cost = float(costs[rows, found].sum())
            room = cost + (self.target - self.exact(np.repeat(found, sizes))) / self.unit
            if room < float(costs[:, 0].sum()):
                break
            found = exact_choices(losses, costs, room * (1 + 1e-12)).astype(np.int8)
            if found.tobytes() in seen:
                break
            seen.add(found.tobytes())
            fits = self.exact(np.repeat(found, sizes)) <= self.target
            if fits and losses[rows, found].sum() < losses[rows, best].sum():
                best = found
        return np.repeat(best, sizes)

    def _layer_costs(self) -> Floats:
        """Costs `[layers, palette]` of whole layers, in small models with the bytes that their headers take."""
        members, widths = self.units.wholes, len(self.units.palette)
        if not self.estimates:
            return summed(self.costs, members)
        costs = self.units.layer_costs()
        if costs.size <= _FEW_WIDTHS:
            narrow = np.zeros(self.units.count, dtype=np.int8)
            least = self.exact(narrow)
            for layer, units in enumerate(members[: len(self.units.slices)]):  # a block of rows shares its headers
                for width in range(1, widths):
                    wide = narrow.copy()
                    wide[units] = width
                    costs[layer, width] = costs[layer, 0] + (self.exact(wide) - least) / self.unit
        return np.maximum.accumulate(costs, axis=1)

    @property
    def _base(self) -> float:
        return float(self.costs[:, 0].sum(dtype=np.float64))

    def _loss(self, choices: Ints) -> float:
        return float(self.losses[np.arange(len(choices)), choices].sum(dtype=np.float64))

    def _within(self, path: Path, pairs: bool = False) -> Ints:
        def after(steps: int) -> Ints:
            choices = path.at(steps)
            return paired(choices, self.losses, self.costs, self.units.members_units) if pairs else choices

        return after(cut(path, lambda steps: self.exact(after(steps)), self.target, self._base, self.unit))

    def _filled(self, choices: Ints) -> Ints:
        if self.exact(choices) >= _NEAR * self.target:
            return choices
        return spend_rest(choices, self.losses, self.costs, self.exact, self.target)

    def _refined(self, choices: Ints) -> Ints:
        """Return the exact optimum where there are few losses and it is better.

        Its budget is what remains when everything that belongs to no unit (maps, headers) is as large as it can be, so
        that any choice fits.
        """
        if self.losses.size > _FEW_LOSSES:
            return choices
        rows = np.arange(self.units.count)

        def overhead(choices: Ints) -> float:
            return self.exact(choices) / self.unit - float(self.costs[rows, choices].sum(dtype=np.float64))

        most = overhead((rows[::-1] % len(self.units.palette)).astype(np.int8))
        room = self.target / self.unit - most - 0.01 * abs(most - overhead(choices))
        if room <= self._base:
            return choices
        found = exact_choices(self.losses, self.costs, room)
        better = self._loss(found) < self._loss(choices) and self.exact(found) <= self.target
        return found if better else choices
