"""Bits per unit of one layer with the least tabulated error within a budget: `best_bits`.

`least_error` is the exact dynamic program over summed bits, `least_error_relaxed` follows the steepest path for many
equal units, and `repair` brings any map to its budget. Costs are whole bits x columns. numpy only, no tensors.

`exact.py` solves the same problem for costs of any size, which this program's states cannot count (stored bits of whole
layers, up to 1e9). It cannot replace this one: it stops within a gap of 1e-5 and chooses freely among equal maps. Here
the optimum is exact, fewer bits win a tie, and the same table gives the same map with any version of the solver.
"""

from collections.abc import Sequence
from math import gcd

import numpy as np

from bitquilt.allocation.path import steepest

Table = Sequence[Sequence[float]]
"""Error of each unit (rows) at each width of the palette (columns)."""
# units x choices x budget states of the exact program: 4096 columns at 3 bits and 4 widths take 2e8 and 0.6 s.
_EXACT_STEPS = 10**9


def best_bits(
    table: Table, palette: Sequence[int], widths: Sequence[int], budget: int, exact: bool | None = None
) -> tuple[int, ...]:
    """Return bits per unit with the least total error, sum_j widths[j] * b_j being within `budget`.

    `table[j][i]` is the error of unit j at `palette[i]` bits. `exact` None solves exactly where that is affordable.
    Raises ValueError if an error is not finite or the budget is below the smallest width everywhere.
    """
    errors = non_increasing(table, palette)
    steps = len(errors) * len(palette) * (budget // gcd(*widths) + 1)
    if exact or (exact is None and steps <= _EXACT_STEPS):
        return least_error(errors.tolist(), palette, widths, budget)
    check_reachable(palette, widths, budget)
    prices = np.outer(widths, palette).astype(np.float64)
    path = steepest(errors, prices)
    choice = path.at(path.within(budget - float(prices[:, 0].sum())))
    return repair([palette[i] for i in choice], table, palette, widths, budget)


def least_error(table: Table, palette: Sequence[int], widths: Sequence[int], budget: int) -> tuple[int, ...]:
    """Return the exact optimum of `best_bits`, errors taken as they are. Fewer bits win a tie."""
    errors = _checked(table, palette)
    check_reachable(palette, widths, budget)
    unit_size = gcd(*widths)
    sizes = [width // unit_size for width in widths]
    states = budget // unit_size + 1
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


def least_error_relaxed(table: Table, costs: Sequence[int], budget: float) -> tuple[int, ...]:
    """Return one choice per unit for many units of equal size, the sum of `costs[i]` being within `budget`.

    `costs` ascend. The steepest path is optimal for what it spends; the best single steps that fit then spend the rest,
    even where they gain nothing. The result misses the optimum by at most the worth of one step.
    Raises ValueError if an error is not finite or the cheapest choice everywhere exceeds the budget.
    """
    prices = np.asarray(costs, dtype=np.float64)
    errors = np.minimum.accumulate(_checked(table, range(len(prices)), "choice {}"), axis=1)
    base = float(prices[0]) * len(errors)
    if base > budget:
        raise ValueError(f"budget {budget:g} is below {prices[0]:g} for each of {len(errors)} units")
    path = steepest(errors, np.broadcast_to(prices, errors.shape))
    choice = path.at(path.within(budget - base))
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


def repair(
    bits: Sequence[int],
    table: Table,
    palette: Sequence[int],
    widths: Sequence[int],
    budget: int,
    *,
    exchange: bool = True,
) -> tuple[int, ...]:
    """Return the map brought within `budget`, with the rest of the budget spent.

    While over budget, take the step down that adds the least error per bit freed. Then take the best drop of error per
    bit that fits. With `exchange`, also swap one step up for one step down until no swap lowers the error; swaps erase
    most of the map they start from. The first unit wins a tie. Raises ValueError as `best_bits` does.
    """
    errors = non_increasing(table, palette)
    check_reachable(palette, widths, budget)
    prices = np.outer(widths, palette)
    choice = np.asarray([list(palette).index(b) for b in bits])
    spare = budget - sum(width * b for width, b in zip(widths, bits, strict=True))
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
    """Total error of a map by the table."""
    position = {b: i for i, b in enumerate(palette)}
    return float(sum(row[position[b]] for row, b in zip(table, bits, strict=True)))


def non_increasing(table: Table, palette: Sequence[int]) -> np.ndarray:
    """Return the running minimum over ascending bits, fp64 `[units, choices]`: unused extra bits never hurt.

    Raises ValueError for an error that is not finite or a palette that does not ascend.
    """
    if list(palette) != sorted(set(palette)):
        raise ValueError(f"palette is {tuple(palette)}; wanted ascending bits, each once")
    return np.minimum.accumulate(_checked(table, palette), axis=1)


def check_reachable(palette: Sequence[int], widths: Sequence[int], budget: int) -> None:
    """Raise ValueError if the budget is below the smallest width everywhere."""
    if budget < min(palette) * sum(widths):
        raise ValueError(f"budget {budget} is below {min(palette)} bits for each of {sum(widths)} columns")


def _checked(table: Table, palette: Sequence[int], spelled: str = "{} bits") -> np.ndarray:
    errors = np.asarray(table, dtype=np.float64)
    if not np.isfinite(errors).all():
        unit, choice = np.argwhere(~np.isfinite(errors))[0]
        raise ValueError(f"error of unit {unit} at {spelled.format(palette[choice])} is {errors[unit, choice]}")
    return errors


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
    """The two best moves at each price: two, because a pair needs different units."""
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
