"""The exact optimum: `exact_choices` solves one choice per unit within a budget (the multiple-choice knapsack).

A dynamic program over the units keeps, for each prefix, the (cost, loss) states that no cheaper state beats. States
that cannot reach the loss of `path.fill`, even with the relaxed optimum of the remaining units, are dropped: a few
thousand remain at once. 512 units of 8 choices take 0.1 s on one core, 2000 take 1 s. numpy only, no tensors.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitquilt.allocation.path import Floats, Ints, Path, check_losses, fill, steepest

_Numbers = NDArray[np.float64]
_MOST_STATES = 1 << 24  # of all prefixes together: 256 MB. 4000 units of 8 choices may need six times as many.
_ROUNDING = 1e-12  # of the summed losses: sums in two orders differ by less, so no optimal state is dropped


@dataclass(frozen=True, eq=False)
class _States:
    """Best states of a prefix of the units, `cost` ascending and `loss` falling."""

    cost: _Numbers
    loss: _Numbers


def exact_choices(losses: Floats, costs: Floats, budget: float) -> Ints:
    """Return choices `[units]` with the least summed loss whose summed cost is within `budget`.

    `losses` and `costs` are `[units, choices]`; costs ascend in each row. The lower choice wins a tie, the last unit
    first. Where the states would take more than 256 MB, the result is that of `path.fill`.

    Raises ValueError if a loss is not finite or the cheapest choices together exceed the budget.
    """
    check_losses(losses)
    values = np.asarray(losses, dtype=np.float64)
    prices = np.broadcast_to(np.asarray(costs, dtype=np.float64), values.shape)
    least = float(prices[:, 0].sum())
    if least > budget:
        raise ValueError(f"budget {budget:g} is below {least:g}, the cheapest choice everywhere")
    reached = _least_losses(values, prices)
    path = steepest(reached, prices)
    start = fill(path, budget - least)
    most = float(reached[np.arange(len(start)), start].sum()) + _ROUNDING * float(np.abs(values).max(axis=1).sum())
    stages = [_States(np.zeros(1), np.zeros(1))]
    for unit in range(len(values)):
        stages.append(_next_states(stages[-1], unit, values, prices, budget, _Relaxed(path, reached[:, 0], most)))
        if not 0 < len(stages[-1].cost) <= _MOST_STATES // len(values):
            return start
    return _traced(stages, values, prices, budget)


def _least_losses(losses: _Numbers, costs: _Numbers) -> _Numbers:
    """Return the least loss `[units, choices]` that each choice's cost buys."""
    least = np.minimum.accumulate(losses, axis=1)
    for choice in range(losses.shape[1] - 2, -1, -1):
        same = costs[:, choice] == costs[:, choice + 1]
        least[same, choice] = least[same, choice + 1]
    return least


@dataclass(frozen=True, eq=False)
class _Relaxed:
    """Lower bounds of what the remaining units lose, by their relaxed optimum. `most`: the loss to beat."""

    path: Path
    cheapest: _Numbers
    most: float

    def losses(self, rooms: _Numbers, first: int) -> _Numbers:
        """Least loss of the units from `first` on, for each room above their cheapest choices."""
        later = self.path.unit >= first
        spent = np.cumsum(np.diff(self.path.cost, prepend=0.0)[later])
        gained = np.cumsum(self.path.gains[later], dtype=np.float64)
        return self.cheapest[first:].sum() - np.interp(rooms, np.append(0.0, spent), np.append(0.0, gained))


def _next_states(
    states: _States, unit: int, losses: _Numbers, costs: _Numbers, budget: float, rest: _Relaxed
) -> _States:
    cost = (states.cost + costs[unit][:, None]).ravel()
    loss = (states.loss + losses[unit][:, None]).ravel()
    rooms = budget - cost - costs[unit + 1 :, 0].sum()
    kept = (rooms >= 0) & (loss + rest.losses(rooms, unit + 1) <= rest.most)
    order = np.lexsort((loss[kept], cost[kept]))
    cost, loss = cost[kept][order], loss[kept][order]
    better = np.append(True, loss[1:] < np.minimum.accumulate(loss)[:-1])[: len(loss)]
    return _States(cost[better], loss[better])


def _traced(stages: list[_States], losses: _Numbers, costs: _Numbers, budget: float) -> Ints:
    """Return the choices that lead to the best final state."""
    chosen = np.zeros(len(losses), dtype=np.int8)
    wanted = stages[-1].loss[-1]
    for unit in range(len(losses) - 1, -1, -1):
        before = stages[unit]
        for choice, (loss, cost) in enumerate(zip(losses[unit], costs[unit], strict=True)):
            place = int(np.searchsorted(before.cost + cost, budget, side="right")) - 1
            if place >= 0 and before.loss[place] + loss == wanted:
                chosen[unit], wanted = choice, before.loss[place]
                budget = max(budget - cost, before.cost[place])
                break
    return chosen
