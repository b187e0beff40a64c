"""Bits per channel for a fractional mean: `spread_bits` ranks channels by activation norm.

CMPQ (arXiv 2410.13056, section 3.1): channels with a larger norm get more bits. Two adjacent widths reach every mean
exactly. `largest_within` finds the largest sum of bits that an exact size allows. Pure Python, no tensors.
"""

import math
from collections.abc import Callable, Sequence

from bitquilt.core.types import MAX_BITS, MIN_BITS

FULL_PALETTE = tuple(range(MIN_BITS, MAX_BITS + 1))


def spread_bits(norms: Sequence[float], total: int, palette: Sequence[int] = FULL_PALETTE) -> tuple[int, ...]:
    """Return bits per channel that sum to `total`, larger norms first; the earlier channel wins a tie.

    Raises ValueError if a width is outside the palette or a norm is not finite.
    """
    count = len(norms)
    for channel, norm in enumerate(norms):
        if not math.isfinite(norm):
            raise ValueError(f"the activation norm of channel {channel} is {norm}; wanted a finite number")
    low, higher = divmod(total, count)
    bits = [low] * count
    for j in sorted(range(count), key=lambda j: -norms[j])[:higher]:
        bits[j] += 1
    if min(bits) < min(palette) or max(bits) > max(palette):
        raise ValueError(
            f"channels would get {min(bits)} to {max(bits)} bits, the palette is {min(palette)} to {max(palette)}"
        )
    return tuple(bits)


def check_palette(palette: Sequence[int]) -> None:
    """Raise ValueError if the palette is empty, leaves 1 .. 8, or has a hole."""
    if not palette or list(palette) != sorted(set(palette)):
        raise ValueError(f"palette is {list(palette)}; wanted ascending widths such as [2, 3, 4]")
    if palette[0] < MIN_BITS or palette[-1] > MAX_BITS:
        raise ValueError(f"palette is {list(palette)}; wanted widths from {MIN_BITS} to {MAX_BITS}")
    missing = sorted(set(range(palette[0], palette[-1] + 1)) - set(palette))
    if missing:
        raise ValueError(
            f"palette {list(palette)} has a hole at {missing[0]}; wanted adjacent widths, which reach every mean"
        )


def check_budget(bits: float, palette: Sequence[int]) -> None:
    """Raise ValueError if no mix of the palette's widths has the mean `bits`."""
    check_palette(palette)
    if not palette[0] <= bits <= palette[-1]:
        raise ValueError(f"bits is {bits}; the palette reaches means from {palette[0]} to {palette[-1]}")


def largest_within(size: Callable[[int], int], low: int, high: int, target: float, further: Sequence[int] = ()) -> int:
    """Return the largest of low .. high whose size is within `target`; `low` if none is.

    Sizes need not grow at every step: after the bisection the next 32 values and those in `further` are tried too.
    """
    first, last = low, high
    while first < last:
        middle = (first + last + 1) // 2
        if size(middle) <= target:
            first = middle
        else:
            last = middle - 1
    nearby = next((n for n in range(min(high, first + 32), first, -1) if size(n) <= target), first)
    return max([nearby, *(n for n in further if size(n) <= target)])
