"""Where does a budget cut a path when the true size is not the sum of the steps? cut(path, exact, ...) -> steps;
spend_rest(choices, ...) for what is left.

Maps, headers and the config are nobody's own, so a size is asked for, not added up. numpy only, no tensors.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bitquilt.allocation.path import Ints, Path

_EVALUATIONS = 64  # exact sizes computed for one cut; interpolation takes about five
_FAR_UNITS, _CLOSE = 100_000, 1e-5  # of so many units one is far below this share of a budget
_HEADER_BITS = 8 * 2048  # what a width that vanishes from a layer gives back at most


def cut(path: Path, exact: Callable[[int], float], target: float, base: float, unit: float, units: int) -> int:
    """The most steps whose exact size is within `target`.

    The exact size is the separable one plus what nearly does not change (maps, headers): interpolate, then bisect;
    at last look a little further, because a width that no group of a layer has any more takes its header with it.
    """
    low, high = 0, len(path)
    at_low = exact(0)
    if high and exact(high) <= target:
        return high

    def separable(steps: int) -> float:
        return base + (float(path.cost[steps - 1]) if steps else 0.0)

    for attempt in range(_EVALUATIONS):
        if high - low <= 1 or (units > _FAR_UNITS and 0 <= target - at_low <= _CLOSE * target):
            break
        overhead = at_low / unit - separable(low)
        guess = path.within(target / unit - overhead - base) if attempt % 3 < 2 else (low + high) // 2
        guess = min(max(guess + attempt % 3, low + 1), high - 1)
        size = exact(guess)
        if size <= target:
            low, at_low = guess, size
        else:
            high = guess
    if units <= _FAR_UNITS:
        further = path.within(separable(low) - base + (target - at_low) / unit + _HEADER_BITS)
        for steps in range(min(further, low + _EVALUATIONS), low, -1):
            if exact(steps) <= target:
                return steps
    return low


def spend_rest(
    choices: Ints,
    losses: NDArray[np.float32],
    costs: NDArray[np.float32],
    exact: Callable[[Ints], float],
    target: float,
) -> Ints:
    """Spend what is left of `target`: single units go up by one width, the most gain per cost first, where it fits.

    A step that opens a width in a layer costs its header too; on a model of 100 kB the next step of the path may not
    fit by 0.6 % of the budget where others do. `losses`, `costs` `[units, widths]`.
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
