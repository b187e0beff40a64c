"""The relaxed optimum: `steepest` sorts all steps by gain per cost, so that every budget takes the first n of them.

`fill` and `cut` stop the path at a budget, by summed costs or by an exact size; `spend_rest` spends what is left.

A unit is what gets one width: a column group, a channel, a layer, or several tied layers. Along the lower convex hull
of a unit's (cost, loss) points the gain per cost falls. The steps of all units, sorted by gain per cost, are therefore
the optima of the Lagrangian for every multiplier at once. numpy only, no tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Path:
    """Steps in the order in which they are taken, from `start` `[units]`, the cheapest choice of each unit.

    Step i moves `unit[i]` to `choice[i]` and lowers the loss by `gains[i]`; `cost[i]` (fp64) is the cost of all steps
    up to it, without the start.
    """

    start: Ints
    unit: Ints
    choice: Ints
    cost: NDArray[np.float64]
    gains: Floats

    @property
    def gain(self) -> NDArray[np.float64]:
        """Total fall of the loss after each step."""
        return np.cumsum(self.gains, dtype=np.float64)

    def __len__(self) -> int:
        return len(self.unit)

    def at(self, steps: int) -> Ints:
        """Choices `[units]` after `steps` steps."""
        chosen = self.start.copy()
        # assignment goes in order: the last of several steps of one unit stands
        chosen[self.unit[:steps]] = self.choice[:steps]
        return chosen

    def within(self, budget: float) -> int:
        """Most steps that together cost at most `budget`."""
        return int(np.searchsorted(self.cost, budget, side="right"))


def steepest(losses: Floats, costs: Floats) -> Path:
    """Return the path of steepest descent for `losses` and `costs` `[units, choices]`.

    Costs ascend in every row; equal rows of costs may be broadcast. Steps that do not lower the loss are left out.
    Raises ValueError if a loss is not finite.
    """
    check_losses(losses)
    count, width = losses.shape
    start = np.zeros(count, dtype=np.int8)
    # the hull from the left: the next corner is the steepest descent from the last one
    at = np.zeros(count, dtype=np.int8)
    unit: list[Ints] = []
    choice: list[Ints] = []
    slope: list[Floats] = []
    price: list[Floats] = []
    active = np.arange(count, dtype=np.int32)
    while len(active) and width > 1:
        here = at[active]
        base, paid = losses[active, here][:, None], costs[active, here][:, None]
        more = costs[active] - paid
        gains = base - losses[active]
        dear = more > 0
        np.divide(gains, more, out=gains, where=dear)
        gains[~dear] = -np.inf
        del more, dear
        best = gains.argmax(axis=1)
        steep = gains[np.arange(len(active)), best]
        useful = steep > 0
        active, best, steep = active[useful], best[useful], steep[useful]
        if len(active):
            unit.append(active)
            choice.append(best.astype(np.int8))
            slope.append(steep)
            price.append(costs[active, best] - costs[active, at[active]])
            at[active] = best
    if not unit:
        return Path(start, np.empty(0, np.int32), np.empty(0, np.int8), np.empty(0), np.empty(0, np.float32))
    # there may be tens of millions of steps, so each list is freed as soon as it is joined
    steepness = np.concatenate(slope)
    slope.clear()
    # stable sort: among equal slopes lower units go first, and the steps of one unit keep their order
    order = np.argsort(-steepness, kind="stable")
    steepness = steepness[order]
    prices = np.concatenate(price)[order]
    price.clear()
    steps = np.concatenate(unit)[order]
    unit.clear()
    to = np.concatenate(choice)[order]
    del order
    cost: NDArray[np.float64] = np.cumsum(prices, dtype=np.float64)
    return Path(start, steps, to, cost, steepness * prices)


def steepest_up_to(widest: int, losses: Floats, costs: Floats) -> Path:
    """Return `steepest`, except that no unit passes the choice `widest` before all units have reached it.

    Use it where a rare wide choice has a cost that `costs` do not show, such as one more table in each layer.
    """
    low = steepest(losses[:, : widest + 1], costs[:, : widest + 1])
    high = steepest(losses[:, widest:], costs[:, widest:])
    paid = low.cost[-1] if len(low) else 0.0
    return Path(
        low.start,
        np.concatenate([low.unit, high.unit]),
        np.concatenate([low.choice, high.choice + np.int8(widest)]),
        np.concatenate([low.cost, paid + high.cost]),
        np.concatenate([low.gains, high.gains]),
    )


def check_losses(losses: Floats) -> None:
    """Raise ValueError naming the first loss that is not finite."""
    if not np.isfinite(losses).all():
        unit, choice = np.argwhere(~np.isfinite(losses))[0]
        raise ValueError(f"the loss of unit {unit} at choice {choice} is {losses[unit, choice]}")


def fill(path: Path, budget: float) -> Ints:
    """Return choices that cost at most `budget` above the start: the longest prefix, then every later step that fits.

    A unit whose step did not fit takes none of its later steps. More budget never means more loss: where two budgets
    first differ, the larger one takes a step that beats anything the smaller one can put in its place.
    """
    position = path.within(budget)
    chosen = path.at(position)
    prices = np.diff(path.cost, prepend=0.0)
    left = budget - (path.cost[position - 1] if position else 0.0)
    blocked = np.zeros(len(path.start), dtype=bool)
    while True:
        unit = path.unit[position:]
        fits = prices[position:] <= left
        too_dear = np.flatnonzero(~fits)
        first_dear = np.full(len(blocked), len(unit))
        np.minimum.at(first_dear, unit[too_dear], too_dear)
        open_steps = fits & ~blocked[unit] & (np.arange(len(unit)) < first_dear[unit])
        if not open_steps.any():
            return chosen
        taken = int(open_steps.argmax())
        blocked[unit[:taken][~fits[:taken]]] = True
        chosen[unit[taken]] = path.choice[position + taken]
        left -= prices[position + taken]
        position += taken + 1


_EVALUATIONS = 64  # exact sizes computed for one cut; interpolation takes about five
_FAR_UNITS, _CLOSE = 100_000, 1e-5  # with that many units one step is far below this share of a budget
_HEADER_BITS = 8 * 2048  # most that a layer saves when one of its widths disappears


def cut(path: Path, exact: Callable[[int], float], target: float, base: float, unit: float) -> int:
    """Return how many steps fit: the most whose exact size is within `target`.

    With more than 100,000 units, the search ends within 1e-5 of the target.

    `exact(steps)` is the separable size plus parts that hardly change, such as maps and headers. `base`: the cost of
    the start; `unit`: size per cost. The search interpolates, then bisects, then looks a little further, because a
    width that no group of a layer uses any more takes its header with it.
    """
    many = len(path.start) > _FAR_UNITS
    low, high = 0, len(path)
    at_low = exact(0)
    if high and exact(high) <= target:
        return high

    def separable(steps: int) -> float:
        return base + (float(path.cost[steps - 1]) if steps else 0.0)

    for attempt in range(_EVALUATIONS):
        if high - low <= 1 or (many and 0 <= target - at_low <= _CLOSE * target):
            break
        overhead = at_low / unit - separable(low)
        guess = path.within(target / unit - overhead - base) if attempt % 3 < 2 else (low + high) // 2
        guess = min(max(guess + attempt % 3, low + 1), high - 1)
        size = exact(guess)
        if size <= target:
            low, at_low = guess, size
        else:
            high = guess
    if not many:
        further = path.within(separable(low) - base + (target - at_low) / unit + _HEADER_BITS)
        for steps in range(min(further, low + _EVALUATIONS), low, -1):
            if exact(steps) <= target:
                return steps
    return low


def spend_rest(choices: Ints, losses: Floats, costs: Floats, exact: Callable[[Ints], float], target: float) -> Ints:
    """Return `choices` with single units raised by one width, the most gain per cost first, while `target` allows.

    `losses` and `costs` are `[units, widths]`. A step that opens a width in a layer costs its header too: in a model of
    100 kB the next step of the path may exceed the budget by 0.6 % where other steps still fit.
    """
    choices = choices.copy()
    units = np.flatnonzero(choices < losses.shape[1] - 1)
    here = choices[units]
    gain = losses[units, here] - losses[units, here + 1]
    price = costs[units, here + 1] - costs[units, here]
    worth = np.flatnonzero((gain > 0) & (price > 0))
    for unit in units[worth[np.argsort(-gain[worth] / price[worth], kind="stable")]][:_EVALUATIONS]:
        choices[unit] += 1
        if exact(choices) > target:
            choices[unit] -= 1
    return choices
