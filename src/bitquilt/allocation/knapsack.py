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


Table = Sequence[Sequence[float]]
# units x choices x budget states of the exact program: 4096 columns at 3 bits and 4 widths take 2e8 and 0.6 s.
_EXACT_STEPS = 10**9


def best_bits(
    table: Table, palette: Sequence[int], widths: Sequence[int], budget: int, exact: bool | None = None
) -> tuple[int, ...]:
    """Bits per unit with the least total error within `budget`; `exact` None = wherever that is affordable.

    Raises ValueError if an error is not finite or the budget is below the smallest width everywhere.
    """
    errors = non_increasing(table, palette)
    steps = len(errors) * len(palette) * (budget // gcd(*widths) + 1)
    if exact or (exact is None and steps <= _EXACT_STEPS):
        return least_error(errors.tolist(), palette, widths, budget)
    return repair(lagrangian(table, palette, widths, budget)[0], table, palette, widths, budget)


def non_increasing(table: Table, palette: Sequence[int]) -> np.ndarray:
    """Running minimum over ascending bits, fp64 `[units, choices]`: more bits never hurt, at worst they stay unused.

    Raises ValueError naming the unit whose error is not finite.
    """
    errors = np.asarray(table, dtype=np.float64)
    if list(palette) != sorted(set(palette)):
        raise ValueError(f"palette is {tuple(palette)}; wanted ascending bits, each once")
    if not np.isfinite(errors).all():
        unit, choice = np.argwhere(~np.isfinite(errors))[0]
        raise ValueError(f"error of unit {unit} at {palette[choice]} bits is {errors[unit, choice]}")
    return np.minimum.accumulate(errors, axis=1)


def at_multiplier(table: Table, palette: Sequence[int], widths: Sequence[int], multiplier: float) -> tuple[int, ...]:
    """argmin_b e_j(b) + multiplier * n_j * b per unit; fewer bits win a tie. The optimum for the bits it spends."""
    prices = np.outer(widths, palette)
    chosen = (np.asarray(table, dtype=np.float64) + multiplier * prices).argmin(axis=1)
    return tuple(palette[i] for i in chosen)


def lagrangian(
    table: Table, palette: Sequence[int], widths: Sequence[int], budget: int
) -> tuple[tuple[int, ...], float]:
    """The map of the smallest multiplier that stays within `budget`, and that multiplier, by bisection.

    Where the table is not convex it may leave budget unspent: no multiplier gives some totals. `repair` spends it.
    Raises ValueError if an error is not finite or the budget is below the smallest width everywhere.
    """
    errors = non_increasing(table, palette)
    _check_budget(palette, widths, budget)

    def spent(multiplier: float) -> int:
        return _spent(at_multiplier(errors.tolist(), palette, widths, multiplier), widths)

    if spent(0.0) <= budget or len(palette) == 1:
        return at_multiplier(errors.tolist(), palette, widths, 0.0), 0.0
    # per bit and column no step can gain more than this
    low, high = 0.0, 1.0 + float((errors[:, 0] - errors[:, -1]).max()) / min(widths)
    for _ in range(80):
        middle = (low + high) / 2
        if spent(middle) > budget:
            low = middle
        else:
            high = middle
    return at_multiplier(errors.tolist(), palette, widths, high), high


def repair(
    bits: Sequence[int],
    table: Table,
    palette: Sequence[int],
    widths: Sequence[int],
    budget: int,
    *,
    exchange: bool = True,
) -> tuple[int, ...]:
    """The map brought within `budget` and its rest spent: single moves, then exchanges of one up for one down.

    While over budget, the move down of least error per bit freed; then the best drop per bit that fits; then, with
    `exchange`, pairs until none lowers the error: that forgets most of the map it is given.
    The first unit wins a tie. Raises ValueError as `lagrangian`.
    """
    errors = non_increasing(table, palette)
    _check_budget(palette, widths, budget)
    prices = np.outer(widths, palette)
    choice = np.asarray([list(palette).index(b) for b in bits])
    spare = budget - _spent(bits, widths)
    while spare < 0:
        rise, cost = _moves(errors, prices, choice)
        unit, target = _first_best(np.where(cost < 0, rise / np.maximum(-cost, 1), np.inf))
        spare -= int(cost[unit, target])
        choice[unit] = target
    while True:
        rise, cost = _moves(errors, prices, choice)
        rate = np.where((cost > 0) & (cost <= spare) & (rise < 0), rise / np.maximum(cost, 1), np.inf)
        unit, target = _first_best(rate)
        if not np.isfinite(rate[unit, target]):
            if not (exchange and _exchange(rise, cost, choice, spare)):
                return tuple(palette[i] for i in choice)
            spare = budget - int(prices[np.arange(len(choice)), choice].sum())
            continue
        spare -= int(cost[unit, target])
        choice[unit] = target


def table_error(table: Table, palette: Sequence[int], bits: Sequence[int]) -> float:
    """What a map costs by the table."""
    position = {b: i for i, b in enumerate(palette)}
    return float(sum(row[position[b]] for row, b in zip(table, bits, strict=True)))


def _exchange(rise: np.ndarray, cost: np.ndarray, choice: np.ndarray, spare: int) -> bool:
    """Make the pair of moves that lowers the error most, if there is one; at each price only the two best count."""
    least = -1e-12 * float(np.abs(rise).max(initial=0.0))
    pair: tuple[tuple[int, int], ...] = ()
    ups, downs = _candidates(rise, cost, cost > 0), _candidates(rise, cost, cost < 0)
    for up_cost, up_moves in ups.items():
        for down_cost, down_moves in downs.items():
            if up_cost + down_cost > spare:
                continue
            for up in up_moves:
                for down in down_moves:
                    change = float(rise[up] + rise[down])
                    if up[0] != down[0] and change < least:
                        least, pair = change, (up, down)
    for unit, target in pair:
        choice[unit] = target
    return bool(pair)


def _candidates(rise: np.ndarray, cost: np.ndarray, allowed: np.ndarray) -> dict[int, list[tuple[int, int]]]:
    """By price, the two units whose error changes best: two, because a pair needs different units."""
    found: dict[int, list[tuple[int, int]]] = {}
    for price in np.unique(cost[allowed]).tolist():
        places = np.argwhere(allowed & (cost == price))
        order = np.argsort(rise[places[:, 0], places[:, 1]], kind="stable")[:2]
        found[price] = [(int(places[i, 0]), int(places[i, 1])) for i in order]
    return found


def _moves(errors: np.ndarray, prices: np.ndarray, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Change of error and of bits for every unit and choice `[units, choices]`."""
    units = np.arange(len(errors))
    return errors - errors[units, choice][:, None], prices - prices[units, choice][:, None]


def _first_best(values: np.ndarray) -> tuple[int, int]:
    unit, target = np.unravel_index(int(values.argmin()), values.shape)
    return int(unit), int(target)


def _spent(bits: Sequence[int], widths: Sequence[int]) -> int:
    return sum(width * b for width, b in zip(widths, bits, strict=True))


def _check_budget(palette: Sequence[int], widths: Sequence[int], budget: int) -> None:
    if budget < min(palette) * sum(widths):
        raise ValueError(f"budget {budget} is below {min(palette)} bits for each of {sum(widths)} columns")
