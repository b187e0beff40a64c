"""`order_steps` returns the path of a scope, the rule for which column groups may differ in bits; `paired` adds pairs;
`summed` has a row per layer, for the scope whose layers have one width each.

global:  any group of any layer; the steepest gain per bit goes first.
layers:  layers differ, the groups of one layer do not. It has no path: `allocation.exact` chooses a width per layer.
layer:   every layer has the same bits per weight; inside a layer the steepest gain goes first.
pairs:   every layer has the same bits; inside a layer N-1, N and N+1 bits in pairs, as SliM-LLM publishes.
uniform: every layer has the same bits, its wider groups spread evenly over the columns; needs no losses.

numpy only. `members[l]`: the units of layer l in column order; `weights[l]`: its number of weights.
"""

from collections.abc import Sequence

import numpy as np

from bitquilt.allocation.path import Floats, Ints, Path, steepest
from bitquilt.core.budget import Scope

_GOLDEN = (5**0.5 - 1) / 2


def order_steps(scope: Scope, losses: Floats, costs: Floats, members: Sequence[Ints], weights: Sequence[float]) -> Path:
    """Return the path of `scope` for `losses` and `costs` `[units, choices]`, costs ascending.

    "pairs" has the steps of "uniform"; `paired` then changes its choices. "layers" has no steps. Raises ValueError if
    a loss is not finite.
    """
    if scope == "global":
        return steepest(losses, costs)
    parts = [
        steepest(losses[units], costs[units]) if scope == "layer" else _even(losses[units], costs[units])
        for units in members
    ]
    key = np.concatenate([part.cost / size for part, size in zip(parts, weights, strict=True)])
    order = np.argsort(key, kind="stable")
    unit = np.concatenate([units[part.unit] for part, units in zip(parts, members, strict=True)])
    choice = np.concatenate([part.choice for part in parts])
    return _path(len(losses), unit[order], choice[order], losses, costs)


def _even(losses: Floats, costs: Floats) -> Path:
    """Raise every unit by one width before any goes further; multiples of the golden ratio spread any share evenly."""
    count, width = losses.shape
    order = np.argsort(np.arange(count) * _GOLDEN % 1.0, kind="stable")
    unit = np.tile(order, width - 1)
    choice = np.repeat(np.arange(1, width, dtype=np.int8), count)
    return _path(count, unit, choice, losses, costs)


def _path(count: int, unit: Ints, choice: Ints, losses: Floats, costs: Floats) -> Path:
    """Return the path that takes the given steps in their order."""
    order = np.lexsort((np.arange(len(unit)), unit))
    before = np.zeros(len(unit), dtype=np.int8)
    same = unit[order][1:] == unit[order][:-1]
    before[order[1:]] = np.where(same, choice[order][:-1], 0)
    price = (costs[unit, choice] - costs[unit, before]).astype(np.float64)
    gains = losses[unit, before] - losses[unit, choice]
    return Path(np.zeros(count, dtype=np.int8), unit, choice, np.cumsum(price), gains)


def summed(table: Floats, members: Sequence[Ints]) -> Floats:
    """Return the sums `[layers, choices]` of `table` `[units, choices]` over the units of each layer, in fp64."""
    return np.stack([table[units].sum(axis=0, dtype=np.float64) for units in members])


def paired(choices: Ints, losses: Floats, costs: Floats, members: Sequence[Ints]) -> Ints:
    """Return `choices` with the p least sensitive groups of each layer one width lower and the p most sensitive higher.

    p is the number of least loss that costs no more; the smallest wins a tie. `losses`, `costs`: `[units, widths]`.
    """
    found = choices.copy()
    for units in members:
        low, high = _ranked(units, choices, losses)
        here, there = choices[low], choices[high]
        room = (here > 0) & (there < losses.shape[1] - 1)
        last = len(room) if room.all() else int(room.argmin())
        low, high, here, there = low[:last], high[:last], here[:last], there[:last]
        change = losses[low, here - 1] - losses[low, here] + losses[high, there + 1] - losses[high, there]
        price = costs[low, here - 1] - costs[low, here] + costs[high, there + 1] - costs[high, there]
        total = np.concatenate([[0.0], np.cumsum(change, dtype=np.float64)])
        total[1:][np.cumsum(price, dtype=np.float64) > 0] = np.inf
        count = int(total.argmin())
        found[low[:count]] -= 1
        found[high[:count]] += 1
    return found


def _ranked(units: Ints, choices: Ints, losses: Floats) -> tuple[Ints, Ints]:
    """Return the units that lose least and those that lose most, each in order from the extreme inwards."""
    order = units[np.argsort(losses[units, choices[units]], kind="stable")]
    half = len(units) // 2
    return order[:half], order[::-1][:half]
