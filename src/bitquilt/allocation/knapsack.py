"""Which bits per group give the least total error within a budget? least_error(table, palette, widths, budget).

Exact dynamic programming over the summed bits, for separable errors; `least_error_relaxed` for many equal units, such
as channels. numpy only, no tensors.
"""

from collections.abc import Sequence
from math import gcd

import numpy as np


def least_error(
    table: Sequence[Sequence[float]], palette: Sequence[int], widths: Sequence[int], budget: int
) -> tuple[int, ...]:
    """Bits per unit minimising sum_j table[j][b_j] subject to sum_j widths[j] * b_j <= budget (in bits x columns).

    `table[j][i]` is the error of unit j at `palette[i]` bits. Fewer bits win a tie. Raises ValueError if an error
    is not finite or the budget is below the smallest palette entry everywhere.
    """
    errors = np.asarray(table, dtype=np.float64)
    if not np.isfinite(errors).all():
        unit, choice = np.argwhere(~np.isfinite(errors))[0]
        raise ValueError(f"error of unit {unit} at {palette[choice]} bits is {errors[unit, choice]}")
    unit_size = gcd(*widths)
    sizes = [width // unit_size for width in widths]
    states = budget // unit_size + 1
    if states <= sum(sizes) * min(palette):
        raise ValueError(f"budget {budget} is below {min(palette)} bits for each of {sum(widths)} columns")
    order = sorted(range(len(palette)), key=lambda i: palette[i])
    best = np.zeros(states)
    choices = np.zeros((len(sizes), states), dtype=np.int8)
    for j, size in enumerate(sizes):
        candidates = np.full((len(palette), states), np.inf)
        for rank, i in enumerate(order):
            cost = size * palette[i]
            if cost < states:
                candidates[rank, cost:] = best[: states - cost] + errors[j, i]
        choices[j] = candidates.argmin(axis=0)
        best = candidates.min(axis=0)
    left = states - 1
    bits: list[int] = []
    for j in reversed(range(len(sizes))):
        chosen = palette[order[choices[j, left]]]
        bits.append(chosen)
        left -= sizes[j] * chosen
    return tuple(reversed(bits))


def least_error_relaxed(table: Sequence[Sequence[float]], costs: Sequence[int], budget: float) -> tuple[int, ...]:
    """Choice per unit for many units of equal size: least sum of table[j][i] with the sum of costs[i] within `budget`.

    `costs` ascending. Lagrange multiplier by bisection (optimal for what it spends), then the rest of the budget by
    the best single step that fits, also where it gains nothing. Never below the optimum by more than one step is
    worth. Raises ValueError if an error is not finite or the cheapest choice everywhere exceeds the budget.
    """
    errors = np.asarray(table, dtype=np.float64)
    prices = np.asarray(costs, dtype=np.float64)
    if not np.isfinite(errors).all():
        unit, choice = np.argwhere(~np.isfinite(errors))[0]
        raise ValueError(f"error of unit {unit} at choice {choice} is {errors[unit, choice]}")
    if prices[0] * len(errors) > budget:
        raise ValueError(f"budget {budget:g} is below {prices[0]:g} for each of {len(errors)} units")
    if len(prices) == 1:
        return (0,) * len(errors)
    errors = np.minimum.accumulate(errors, axis=1)  # more bits never hurt: at worst they are not used

    def chosen_at(multiplier: float) -> np.ndarray:
        return (errors + multiplier * prices).argmin(axis=1)

    low, high = 0.0, 1.0 + float((errors[:, 0] - errors[:, -1]).max()) / float(np.diff(prices).min())
    for _ in range(80):
        middle = (low + high) / 2
        if prices[chosen_at(middle)].sum() > budget:
            low = middle
        else:
            high = middle
    choice = chosen_at(high)
    spent = float(prices[choice].sum())
    units = np.arange(len(errors))
    while True:
        raised = np.minimum(choice + 1, len(prices) - 1)
        price = prices[raised] - prices[choice]
        fits = (price > 0) & (spent + price <= budget)
        if not fits.any():
            return tuple(choice.tolist())
        gain = (errors[units, choice] - errors[units, raised]) / np.maximum(price, 1.0)
        best = int(np.where(fits, gain, -1.0).argmax())
        spent += float(price[best])
        choice[best] = raised[best]
