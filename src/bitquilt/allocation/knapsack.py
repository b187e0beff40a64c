"""Which bits per group give the least total error within a budget? least_error(table, palette, widths, budget).

Exact dynamic programming over the summed bits, for separable errors. numpy only, no tensors.
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
