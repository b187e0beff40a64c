"""SliM-LLM's salience-determined allocation: `pair_candidates` lists the bit maps, `cheapest_within` chooses one.

In each candidate the p least salient column groups give one bit to the p most salient ones, so the mean stays
(arXiv 2405.14917, section 3.2). Pure Python, no tensors.
"""

from collections.abc import Sequence

from bitquilt.allocation.fractional import spread_bits
from bitquilt.core.types import MAX_BITS, MIN_BITS, Cost, LayerPlan


def pairs(salience: Sequence[float]) -> list[tuple[int, int]]:
    """Return (p-th least, p-th most salient group) for p = 1 .. floor(K / 2); ties go in column order."""
    order = sorted(range(len(salience)), key=lambda k: salience[k])
    return [(order[p], order[-1 - p]) for p in range(len(order) // 2)]


def raised_map(salience: Sequence[float], bits: int, raised: int) -> tuple[int, ...]:
    """Return `bits` for every group and one more for the `raised` most salient ones; the earlier wins a tie."""
    return spread_bits(salience, bits * len(salience) + raised)


def spread_evenly(count: int, bits: int, raised: int) -> tuple[int, ...]:
    """Return `bits` for `count` groups and one more for `raised` of them, spread evenly over the columns."""
    return tuple(bits + ((k + 1) * raised // count > k * raised // count) for k in range(count))


def pair_candidates(salience: Sequence[float], bits: int, base: Sequence[int] | None = None) -> list[tuple[int, ...]]:
    """Return bit maps `[K]` for p = 0 .. floor(K / 2) pairs, changed from `base` (default: `bits` everywhere).

    Where bits - 1 or bits + 1 is outside 1 .. 8, the only map is that of p = 0.
    """
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
    """Whether the bits summed over columns stay within bits * in_features; a narrower last group can break this."""
    spent = sum(width * b for width, b in zip(plan.widths(in_features), plan.bits, strict=True))
    return spent <= bits * in_features + 1e-6


def cheapest_within(cost: Cost, in_features: int, bits: float) -> LayerPlan:
    """Return the plan of least loss that is `within_budget`; the earliest wins a tie.

    Raises ValueError if a loss is not finite or no plan fits.
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
