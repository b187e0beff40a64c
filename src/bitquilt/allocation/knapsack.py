"""Bits per unit of one layer within a budget of bits x columns: `best_bits` is exact, `greedy_bits` near it.

`repair` brings any map to its budget; `spend_all` serves layers of many equal units. The solvers are `exact.py` and
`path.py`; here are palettes instead of choices, and whole columns. numpy only, no tensors.
"""

from collections.abc import Sequence

import numpy as np

from bitquilt.allocation.exact import exact_choices
from bitquilt.allocation.path import steepest

Table = Sequence[Sequence[float]]
"""Error of each unit (rows) at each width of the palette (columns)."""


def best_bits(table: Table, palette: Sequence[int], widths: Sequence[int], budget: int) -> tuple[int, ...]:
    """Return bits per unit with the least total error, sum_j widths[j] * b_j being within `budget`.

    `table[j][i]` is the error of unit j at `palette[i]` bits. Fewer bits win a tie.
    Raises ValueError if an error is not finite, the palette does not ascend or the budget is below its smallest width
    everywhere.
    """
    errors = _checked(table, palette)
    _check_reachable(palette, widths, budget)
    return tuple(palette[i] for i in exact_choices(errors, np.outer(widths, palette).astype(np.float64), budget))


def greedy_bits(table: Table, palette: Sequence[int], widths: Sequence[int], budget: int) -> tuple[int, ...]:
    """Return bits per unit as `best_bits` does, by the steepest path and `repair`: what a Lagrange multiplier finds."""
    errors = non_increasing(table, palette)
    _check_reachable(palette, widths, budget)
    prices = np.outer(widths, palette).astype(np.float64)
    path = steepest(errors, prices)
    choice = path.at(path.within(budget - float(prices[:, 0].sum())))
    return repair([palette[i] for i in choice], table, palette, widths, budget)


def spend_all(table: Table, costs: Sequence[int], budget: float) -> tuple[int, ...]:
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
    _check_reachable(palette, widths, budget)
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
    return np.minimum.accumulate(_checked(table, palette), axis=1)


def _check_reachable(palette: Sequence[int], widths: Sequence[int], budget: int) -> None:
    """Raise ValueError if the budget is below the smallest width everywhere."""
    if budget < min(palette) * sum(widths):
        raise ValueError(f"budget {budget} is below {min(palette)} bits for each of {sum(widths)} columns")


def _checked(table: Table, palette: Sequence[int], spelled: str = "{} bits") -> np.ndarray:
    if list(palette) != sorted(set(palette)):
        raise ValueError(f"palette is {tuple(palette)}; wanted ascending bits, each once")
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
