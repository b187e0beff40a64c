"""Which layers get the higher of two widths? by_trace(sensitivities, sizes, ...) -> bits by layer. Pure Python.

APTQ's rule (arXiv 2402.14866, as far as published): layers in falling sensitivity take the higher width while it lasts.
"""

from collections.abc import Mapping

from bitquilt.allocation.lagrange import best_bits


def by_trace(
    sensitivities: Mapping[str, float], sizes: Mapping[str, int], target: float, low: int, high: int
) -> dict[str, int]:
    """`high` bits down the ranking while the weights so far stay within (target - low) / (high - low) of all; from the
    first layer that does not fit on, `low`. Equal sensitivities in order of their names. The mean never exceeds
    `target`. Raises ValueError if `target` is not within low .. high or a sensitivity is not a finite number."""
    _check(sensitivities, target, low, high)
    limit = (target - low) / (high - low) * sum(sizes.values()) if high > low else 0.0
    bits, spent, open_ = dict.fromkeys(sensitivities, low), 0, True
    for name in sorted(sensitivities, key=lambda n: (-sensitivities[n], n)):
        open_ = open_ and spent + sizes[name] <= limit + 1e-9
        if open_:
            bits[name] = high
            spent += sizes[name]
    return bits


def by_weighted_error(
    errors: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], target: float, palette: tuple[int, ...]
) -> dict[str, int]:
    """Least sum of errors[layer][bits] within `target` bits per weight, exact where affordable (HAWQ-V2's form).

    Raises ValueError as `by_trace`.
    """
    _check({name: sum(row.values()) for name, row in errors.items()}, target, palette[0], palette[-1])
    names = sorted(errors)
    table = [[errors[name][b] for b in palette] for name in names]
    budget = int(target * sum(sizes.values()) + 1e-6)
    return dict(zip(names, best_bits(table, palette, [sizes[n] for n in names], budget), strict=True))


def _check(values: Mapping[str, float], target: float, low: int, high: int) -> None:
    if not low <= target <= high:
        raise ValueError(f"bits is {target:g}; widths of {low} to {high} reach {low} to {high}")
    for name, value in values.items():
        if not abs(value) < float("inf"):
            raise ValueError(f"the sensitivity of {name} is {value}")
