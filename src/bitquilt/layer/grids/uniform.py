"""Which uniform grid represents a column group best? fit(weight [out, n], importance, bits, ...) -> UniformGrid.

Every function fits all rows of one column group at once: one scale and one zero per row. Scales and zeros are
rounded to their storage type BEFORE codes are chosen, so the stored grid is the solved grid. SliM-LLM
(arXiv 2405.14917): group quantizer with range search, and one-bit groups as two levels.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

OneBitRule = Literal["symmetric", "two_level", "centered", "code", "paper"]
# fp16 steps below 2^-14 lose digits and above 2^15 may overflow: such layers keep bfloat16 scales.
_FP16_SAFE = (2.0**-11, 2.0**14)


@dataclass(frozen=True)
class RangeSearch:
    """Candidates for the range multiplier tau and the exponent q of the error they are judged by.

    Default: 1, then 71 points in [0.4, 1.1]; for a Gaussian group the best tau is 0.60 / 0.80 / 0.93 at 2 / 3 / 4
    bits, so [0.9, 1.1], as published, misses it. `zeros`: try the zeros beside the nearest one too (2 bits: all).
    """

    taus: tuple[float, ...] = (1.0, *(round(0.4 + 0.01 * i, 2) for i in range(71)))
    exponent: float = 2.0
    zeros: bool = False


MIN_MAX = RangeSearch(taus=(1.0,))
# The public implementation: 1, then 1.002 .. 1.100 and 0.998 .. 0.900 in steps of 0.002, exponent 2.4.
PUBLISHED_SEARCH = RangeSearch(
    taus=(
        1.0,
        *(round(1 + 0.002 * i, 3) for i in range(1, 51)),
        *(round(1 - 0.002 * i, 3) for i in range(1, 51)),
    ),
    exponent=2.4,
)


@dataclass(frozen=True, eq=False)
class UniformGrid:
    """`bits` >= 2: scale * (code - zero), zero an integer in 0 .. 2^bits - 1.  `bits` = 1: zero + scale * code.

    `zero` None: scale * (code - (2^bits - 1) / 2).
    `scale`, `zero`: `[out, 1]`, in storage precision (`zero` uint8 from 2 bits on).
    """

    bits: int
    scale: Tensor
    zero: Tensor | None

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes of `[out, n]` as float (a sweep works in floats; `.to(uint8)` stores them)."""
        scale, top = self.scale.float(), 2**self.bits - 1
        if self.zero is None:
            return torch.floor(weight / scale + (top + 1) / 2).clamp_(0, top)
        zero = self.zero.float()
        if self.bits == 1:
            return (weight >= zero + 0.5 * scale).float()
        return (torch.round(weight / scale) + zero).clamp_(0, top)

    def decode(self, codes: Tensor) -> Tensor:
        """fp32 values of float codes `[out, n]`."""
        scale = self.scale.float()
        if self.zero is None:
            return scale * (codes - (2**self.bits - 1) / 2)
        zero = self.zero.float()
        return zero + scale * codes if self.bits == 1 else scale * (codes - zero)

    def quantize(self, weight: Tensor) -> Tensor:
        """`[out, n]` rounded to the grid."""
        return self.decode(self.encode(weight))


def fit(
    weight: Tensor,
    bits: int,
    importance: Tensor | None = None,
    *,
    search: RangeSearch = MIN_MAX,
    one_bit: OneBitRule = "symmetric",
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> UniformGrid:
    """Grid of the group `weight` fp32 `[out, n]`; `importance` `[n]` or `[out, n]` weighs the errors, None = 1.

    `symmetric`: groups of two and more bits store no zero."""
    if bits == 1:
        return fit_two_levels(weight, importance, rule=one_bit, scale_dtype=scale_dtype)
    if symmetric:
        return fit_symmetric(weight, bits, importance, search=search, scale_dtype=scale_dtype)
    return fit_range(weight, bits, importance, search=search, scale_dtype=scale_dtype)


def fit_range(
    weight: Tensor,
    bits: int,
    importance: Tensor | None = None,
    *,
    search: RangeSearch = MIN_MAX,
    scale_dtype: torch.dtype = torch.float16,
) -> UniformGrid:
    """Min-max grid through 0, its range times the tau with the least sum of importance * |error|^q per row.

    The zero is computed once, at tau = 1, where it never leaves 0 .. 2^bits - 1, and searched only on request. A later
    tau wins only when strictly better.
    """
    levels = 2**bits - 1
    low = weight.amin(dim=1, keepdim=True).clamp_(max=0)
    high = weight.amax(dim=1, keepdim=True).clamp_(min=0)
    empty = low == high
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    full = (high - low) / levels
    zero = torch.round(-low / full)
    best_scale, best_zero = _stored(full * search.taus[0], scale_dtype), zero
    if len(search.taus) > 1 or search.zeros:
        best_loss: Tensor | None = None
        work = (torch.empty_like(weight), torch.empty_like(weight))
        for candidate in _zeros(zero, levels) if search.zeros else [zero]:
            for tau in search.taus:
                scale = _stored(full * tau, scale_dtype)
                loss = _range_loss(weight, scale, candidate, levels, importance, search.exponent, work)
                if best_loss is None:
                    best_loss = loss
                    continue
                better = loss < best_loss
                best_loss = torch.where(better, loss, best_loss)
                best_scale = torch.where(better, scale, best_scale)
                best_zero = torch.where(better, candidate, best_zero)
    return UniformGrid(bits, best_scale.to(scale_dtype), best_zero.to(torch.uint8))


def _zeros(nearest: Tensor, levels: int) -> list[Tensor]:
    """The nearest zero first, then its neighbours; at 2 bits every one."""
    if levels == 3:
        return [nearest, *(torch.full_like(nearest, zero) for zero in range(4))]
    return [nearest, (nearest - 1).clamp_min(0), (nearest + 1).clamp_max(levels)]


def fit_symmetric(
    weight: Tensor,
    bits: int,
    importance: Tensor | None = None,
    *,
    search: RangeSearch = MIN_MAX,
    scale_dtype: torch.dtype = torch.float16,
) -> UniformGrid:
    """Levels on both sides of zero and none at it: no zero to store.

    The range is tau times the largest |w|, tau searched as in `fit_range`. For groups of 32 Gaussian weights the error
    is 0.108 of the variance at 2 bits, with a zero 0.112; at 3 bits 0.0293 and 0.0258: more levels prefer a zero.
    """
    top = 2**bits - 1
    full = weight.abs().amax(dim=1, keepdim=True) * (2 / top)
    best_scale, best_loss = _stored(full * search.taus[0], scale_dtype), None
    work = (torch.empty_like(weight), torch.empty_like(weight))
    for tau in search.taus if len(search.taus) > 1 else ():
        scale = _stored(full * tau, scale_dtype)
        loss = _symmetric_loss(weight, scale, top, importance, search.exponent, work)
        better = loss < best_loss if best_loss is not None else torch.ones_like(loss, dtype=torch.bool)
        best_loss = torch.where(better, loss, best_loss) if best_loss is not None else loss
        best_scale = torch.where(better, scale, best_scale)
    return UniformGrid(bits, best_scale.to(scale_dtype), None)


def symmetric_widths(rule: OneBitRule) -> set[int]:
    """The widths whose groups store no offset by this rule: one bit, or none."""
    return {1} if rule in ("symmetric", "paper") else set()


def fit_two_levels(
    weight: Tensor,
    importance: Tensor | None = None,
    *,
    rule: OneBitRule = "symmetric",
    scale_dtype: torch.dtype = torch.float16,
) -> UniformGrid:
    """One bit per weight: two levels per row.

    symmetric: +- the importance-weighted mean |w|, the least-squares pair around zero; stores no offset.
    paper (Eq. 2): the same with equal weights.
    two_level: the split of the sorted row and the two means with the least sum of importance * error^2, exact.
    centered: mean +- mean |w - mean|.  code (public implementation): mean +- mean |w|.
    """
    if symmetric_widths(rule):
        size = weight.abs()
        if importance is None or rule == "paper":
            level = size.mean(dim=1, keepdim=True)
        else:
            mass = importance.expand_as(size)
            level = (size * mass).sum(dim=1, keepdim=True) / mass.sum(dim=1, keepdim=True).clamp_min(1e-30)
        return UniformGrid(1, _stored(2 * level, scale_dtype).to(scale_dtype), None)
    if rule == "two_level":
        low, high = _best_two_levels(weight, importance)
    else:
        centre = weight.mean(dim=1, keepdim=True)
        spread = (weight - centre if rule == "centered" else weight).abs().mean(dim=1, keepdim=True)
        low, high = centre - spread, centre + spread
    offset = low.to(scale_dtype)
    step = (high - offset.float()).to(scale_dtype)
    return UniformGrid(1, step, offset)


def scale_dtype_for(weight: Tensor) -> torch.dtype:
    """float16 unless the layer's magnitudes would overflow it or lose its digits, then bfloat16."""
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    in_range = largest == 0.0 or _FP16_SAFE[0] <= largest <= _FP16_SAFE[1]
    return torch.float16 if in_range else torch.bfloat16


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the storage type, never to zero: a zero scale would divide by zero."""
    info = torch.finfo(dtype)
    return scale.clamp(info.tiny * info.eps, info.max).to(dtype).float()


def _range_loss(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor,
    levels: int,
    importance: Tensor | None,
    exponent: float,
    work: tuple[Tensor, Tensor],
) -> Tensor:
    """sum_j importance_j * |w_j - q_j|^exponent per row, `[out, 1]`; `work`: two scratch tensors shaped like `weight`.

    In units of the scale, so that no pass multiplies by it: six passes over the group instead of eight.
    """
    exact, error = work
    torch.div(weight, scale, out=exact)
    torch.round(exact, out=error)
    # clamp(round(w/s) + z, 0, levels) - z, without adding z twice: exact, all terms are small integers
    torch.clamp(error, -zero, levels - zero, out=error)
    error.sub_(exact)
    return _weighted(error, importance, exponent) * scale**exponent


def _symmetric_loss(
    weight: Tensor,
    scale: Tensor,
    top: int,
    importance: Tensor | None,
    exponent: float,
    work: tuple[Tensor, Tensor],
) -> Tensor:
    """As `_range_loss`, levels at (code - top / 2) scale."""
    exact, error = work
    torch.div(weight, scale, out=exact)
    torch.floor(exact, out=error)
    torch.clamp(error, -(top + 1) / 2, (top - 1) / 2, out=error)
    error.sub_(exact).add_(0.5)
    return _weighted(error, importance, exponent) * scale**exponent


def _weighted(error: Tensor, importance: Tensor | None, exponent: float) -> Tensor:
    """sum_j importance_j |error_j|^exponent per row, `[out, 1]`; `error` is used up."""
    if exponent == 2.0:
        error.square_()
    else:
        error.abs_().pow_(exponent)
    if importance is None:
        return error.sum(dim=1, keepdim=True)
    if importance.dim() == 1:
        return torch.mv(error, importance).unsqueeze(1)
    return error.mul_(importance).sum(dim=1, keepdim=True)


def _best_two_levels(weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    values, order = weight.double().sort(dim=1)
    if importance is None:
        mass = torch.ones_like(values)
    else:
        mass = importance.double().expand_as(values).gather(1, order)
    # importance 0 (a dead column) must not make both sides of a split weightless
    mass = mass + mass.mean(dim=1, keepdim=True) * 1e-12 + 1e-300
    count, first = mass.cumsum(1), (mass * values).cumsum(1)
    rest_count, rest_first = count[:, -1:] - count, first[:, -1:] - first
    # error = sum m w^2 - left^2/left mass - right^2/right mass: the first term is the same for every split
    gain = first.square() / count
    gain[:, :-1] += rest_first[:, :-1].square() / rest_count[:, :-1]
    split = gain.argmax(dim=1, keepdim=True)
    low = first.gather(1, split) / count.gather(1, split)
    right = rest_count.gather(1, split)
    high = torch.where(split == values.shape[1] - 1, low, rest_first.gather(1, split) / right.clamp(min=1e-300))
    return low.float(), high.float()
