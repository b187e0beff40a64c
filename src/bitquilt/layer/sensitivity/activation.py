"""Bits of input channels by their magnitude: `partition` orders the channels and cuts them into parts of 4, 6 and 8.

MicroMix (arXiv 2508.02343): an element of a token may be rounded to n bits where the format's worst error stays within
that of per-token INT8, M_t / 254 with M_t the token's largest magnitude. Shares of elements give the sizes of the FP4,
FP6 and FP8 parts; the channels are ordered by their mean magnitude.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_INT8_ERROR = 1 / 254  # of the token's largest magnitude
_WIDTHS = (4, 6, 8)


@dataclass(frozen=True, eq=False)
class Partition:
    """`order` int64 `[in]`: channels by ascending magnitude; `sizes`: of the 4-, 6- and 8-bit parts, in that order.
    `shares` of the elements, before rounding to whole blocks; `multiplier` of the thresholds. `smaller`: the sizes and
    multipliers of all partitions with larger multipliers, by falling bits."""

    order: Tensor
    sizes: tuple[int, int, int]
    shares: tuple[float, float, float]
    multiplier: float
    smaller: tuple[tuple[tuple[int, int, int], float], ...] = ()

    def bits(self, block: int) -> tuple[int, ...]:
        """The bits of every `block` channels by falling magnitude; all but the last part are multiples of it."""
        four, six, eight = self.sizes
        starts = range(0, four + six + eight, block)
        return tuple(8 if start < eight else 6 if start < eight + six else 4 for start in starts)


def published_threshold(bits: int, largest: float, exponent: int) -> float:
    """T(n) / M_t = 2^c 2^(n - 1) / qmax / 254: 0.010499 for E2M1, 0.035996 for E3M2."""
    return 2.0**exponent * 2 ** (bits - 1) / largest * _INT8_ERROR


def partition(
    sample: Tensor,
    thresholds: tuple[float, float],
    *,
    target: float | None = None,
    multiplier: float = 1.0,
    runs: int = 1,
    alignment: int = 128,
    smaller: bool = False,
) -> Partition:
    """Split the channels of `sample` `[T, in]`, tokens in order.

    `thresholds` (T(4), T(6)) / M_t are multiplied by `multiplier`, or by the least factor that keeps the mean
    4 p4 + 6 p6 + 8 p8 at or below `target`. `runs`: channels are ranked by the largest of that many runs' mean
    magnitudes (1: by the mean of all). `smaller`: also find the partitions of larger multipliers. Tokens that are all
    zero do not count. Raises ValueError if a value is not finite.
    """
    if not bool(torch.isfinite(sample).all()):
        raise ValueError("the layer's input holds NaN or Inf")
    ratios = _ratios(sample)
    if target is not None:
        multiplier = _multiplier(ratios, thresholds, target)
    shares = _shares(ratios, thresholds, multiplier)
    means = [part.abs().mean(dim=0) for part in torch.tensor_split(sample, max(1, min(runs, len(sample))))]
    order = torch.argsort(torch.stack(means).amax(dim=0), stable=True)
    sizes = part_sizes(sample.shape[1], shares, alignment)
    menu = _smaller(ratios, thresholds, sizes, multiplier, alignment) if smaller else ()
    return Partition(order, sizes, shares, multiplier, menu)


def part_sizes(in_features: int, shares: Sequence[float], alignment: int = 128) -> tuple[int, int, int]:
    """The number of channels at 4, 6 and 8 bits: the wide parts are rounded up to multiples of `alignment` (of 32 where
    the layer is no multiple of it), the rest has 4 bits."""
    if in_features % alignment:
        alignment = 32
    left, sizes = in_features, []
    for share in (shares[2], shares[1]):
        wanted = math.ceil(share * in_features / alignment - 1e-9) * alignment  # 0.3 of 1280 is no more than 384
        sizes.append(min(max(wanted, 0), left))
        left -= sizes[-1]
    return left, sizes[1], sizes[0]


def _smaller(
    ratios: Tensor, thresholds: tuple[float, float], sizes: tuple[int, int, int], multiplier: float, alignment: int
) -> tuple[tuple[tuple[int, int, int], float], ...]:
    """The partitions of larger multipliers, by bisection: sizes change at a few multipliers only, and never grow."""
    in_features = sum(sizes)

    def at(power: float) -> tuple[int, int, int]:
        return part_sizes(in_features, _shares(ratios, thresholds, 2.0**power), alignment)

    top = math.log2(1.01 / min(thresholds))  # all elements take 4 bits
    start = min(math.log2(multiplier) if multiplier else -40.0, top)
    found: list[tuple[tuple[int, int, int], float]] = []

    def between(low: float, first: tuple[int, int, int], high: float, last: tuple[int, int, int]) -> None:
        if first == last:
            return
        if high - low < 1e-3:
            found.append((last, 2.0**high))
            return
        middle = (low + high) / 2
        here = at(middle)
        between(low, first, middle, here)
        between(middle, here, high, last)

    between(start, sizes, top, at(top))
    return tuple(found)


def _ratios(sample: Tensor) -> Tensor:
    """abs(x) / M_t of every element of every token that is not all zero, flat and sorted, fp64."""
    size = sample.double().abs()
    largest = size.amax(dim=1, keepdim=True)
    alive = largest.squeeze(1) > 0
    return (size[alive] / largest[alive]).flatten().sort().values


def _shares(ratios: Tensor, thresholds: tuple[float, float], multiplier: float) -> tuple[float, float, float]:
    if len(ratios) == 0:  # nothing but zeros: any format holds them
        return 1.0, 0.0, 0.0
    limits = torch.tensor([multiplier * t for t in thresholds], dtype=torch.float64, device=ratios.device)
    four, six = (torch.searchsorted(ratios, limits, right=True).double() / len(ratios)).tolist()
    six = max(four, six)
    return four, six - four, 1 - six


def _mean(shares: tuple[float, float, float]) -> float:
    return sum(width * share for width, share in zip(_WIDTHS, shares, strict=True))


def _multiplier(ratios: Tensor, thresholds: tuple[float, float], target: float) -> float:
    """The least multiplier whose mean is at most `target`: the mean falls as it grows."""
    low, high = 0.0, 1.01 / min(thresholds)  # every ratio is at most 1: all elements take 4 bits
    if _mean(_shares(ratios, thresholds, low)) <= target:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        if _mean(_shares(ratios, thresholds, middle)) > target:
            low = middle
        else:
            high = middle
    return high
