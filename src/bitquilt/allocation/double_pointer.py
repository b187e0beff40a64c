"""Which bit maps does salience allow? pair_candidates(salience, bits) -> maps, p = 0, 1, ... pairs each.

SliM-LLM's salience-determined allocation (arXiv 2405.14917, section 3.2): the p least salient column groups give
one bit to the p most salient ones, the mean stays. Pure Python: no tensors.
"""

from collections.abc import Sequence

from bitquilt.core.types import MAX_BITS, MIN_BITS, Cost, LayerPlan


def pairs(salience: Sequence[float]) -> list[tuple[int, int]]:
    """(p-th least, p-th most salient group) for p = 1 .. floor(K / 2); equal saliences in column order."""
    order = sorted(range(len(salience)), key=lambda k: salience[k])
    return [(order[p], order[-1 - p]) for p in range(len(order) // 2)]


def raised_map(salience: Sequence[float], bits: int, raised: int) -> tuple[int, ...]:
    """A fractional mean: `bits` everywhere, one more for the `raised` most salient groups; the earlier wins a tie."""
    order = sorted(range(len(salience)), key=lambda k: -salience[k])
    top = set(order[:raised])
    return tuple(bits + (k in top) for k in range(len(salience)))


def spread_evenly(count: int, bits: int, raised: int) -> tuple[int, ...]:
    """`bits` for `count` groups, one more for `raised` of them, as evenly over the columns as can be."""
    return tuple(bits + ((k + 1) * raised // count > k * raised // count) for k in range(count))


def pair_candidates(salience: Sequence[float], bits: int, base: Sequence[int] | None = None) -> list[tuple[int, ...]]:
    """Bit maps `[K]` for p = 0 .. floor(K / 2), from `base` (default: `bits` everywhere); only p = 0 where bits - 1 or
    bits + 1 leaves 1 .. 8. With a base that raises some groups, the least salient lose one bit of theirs and the most
    salient gain one on theirs."""
    maps = [tuple(base) if base is not None else (bits,) * len(salience)]
    if not MIN_BITS < bits < MAX_BITS or max(maps[0]) >= MAX_BITS:
        return maps
    for low, high in pairs(salience):
        changed = list(maps[-1])
        changed[low] -= 1
        changed[high] += 1
        maps.append(tuple(changed))
    return maps


def within_budget(plan: LayerPlan, in_features: int, bits: float) -> bool:
    """Whether the width-weighted bits do not exceed bits * in_features: it matters when the last group is narrower."""
    spent = sum(width * b for width, b in zip(plan.widths(in_features), plan.bits, strict=True))
    return spent <= bits * in_features + 1e-6


def cheapest_within(cost: Cost, in_features: int, bits: float) -> LayerPlan:
    """The plan of least loss whose width-weighted bits do not exceed bits * in_features; the earliest wins a tie.

    Raises ValueError if a loss is not a finite number, or if no plan fits.
    """
    best: tuple[float, LayerPlan] | None = None
    for plan, loss in zip(cost.plans, cost.losses, strict=True):
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise ValueError(f"the objective of candidate {plan.bits} is {loss}")
        if within_budget(plan, in_features, bits) and (best is None or loss < best[0]):
            best = (loss, plan)
    if best is None:
        raise ValueError(f"no candidate fits {bits:g} bits per weight over {in_features} columns")
    return best[1]
