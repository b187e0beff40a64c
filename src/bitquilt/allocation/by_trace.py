"""One width per layer: `by_trace` ranks layers for the higher of two widths, `by_weighted_error` minimises an error.

`by_trace` is APTQ's rule (arXiv 2402.14866, as far as published): in falling sensitivity, layers take the higher width
while the budget lasts. The caller decides what a cost counts, codes alone or everything stored. No tensors.
"""

from collections.abc import Mapping

import numpy as np

from bitquilt.allocation.exact import exact_choices

Costs = Mapping[str, Mapping[int, int]]
"""Cost by layer and width; widths ascend and are the same for all layers."""


def by_trace(sensitivities: Mapping[str, float], costs: Costs, budget: float) -> dict[str, int]:
    """Return bits by layer: the higher width down the ranking until a layer does not fit, then the lower width.

    Equal sensitivities go in the order of their names. Raises ValueError if the lower width does not fit everywhere or
    a sensitivity is not finite.
    """
    _check(sensitivities, costs, budget)
    low, high = _widths(costs)
    bits, open_ = dict.fromkeys(sensitivities, low), True
    left = budget - sum(cost[low] for cost in costs.values())
    for name in sorted(sensitivities, key=lambda n: (-sensitivities[n], n)):
        price = costs[name][high] - costs[name][low]
        open_ = open_ and price <= left + 1e-9 * budget
        if open_:
            bits[name] = high
            left -= price
    return bits


def by_weighted_error(errors: Mapping[str, Mapping[int, float]], costs: Costs, budget: float) -> dict[str, int]:
    """Return bits by layer with the least sum of errors[layer][bits] within `budget` (the form of HAWQ-V2).

    Raises ValueError as `by_trace` does.
    """
    least = _check({name: sum(row.values()) for name, row in errors.items()}, costs, budget)
    names, widths = sorted(errors), _widths(costs)
    losses = np.asarray([[errors[name][b] for b in widths] for name in names], dtype=np.float64)
    prices = np.asarray([[costs[name][b] for b in widths] for name in names], dtype=np.float64)
    chosen = exact_choices(losses, prices, max(budget + 1e-6, least))
    return {name: widths[i] for name, i in zip(names, chosen.tolist(), strict=True)}


def _widths(costs: Costs) -> tuple[int, ...]:
    return tuple(sorted(next(iter(costs.values()))))


def _check(values: Mapping[str, float], costs: Costs, budget: float) -> int:
    """Return the least cost of all layers."""
    least = sum(min(cost.values()) for cost in costs.values())
    if least > budget * (1 + 1e-9):
        raise ValueError(f"a budget of {budget:g} bits is below {least:g}, the lowest width everywhere")
    for name, value in values.items():
        if not abs(value) < float("inf"):
            raise ValueError(f"the sensitivity of {name} is {value}; wanted a finite number")
    return least
