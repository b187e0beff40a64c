"""Uniform grids: `fit` finds the scale and zero of a column group, `UniformGrid` rounds to it.

Every function fits all rows of one column group at once: one scale and one zero per row. Scales and zeros are
rounded to their storage type BEFORE codes are chosen, so the stored grid is the solved grid. SliM-LLM
(arXiv 2405.14917): group quantizer with range search, and one-bit groups as two levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from bitquilt.core.types import Format, Segment
from bitquilt.layer.grids.grid import Grid

OneBitRule = Literal["symmetric", "code"]
ZeroRule = Literal["fitted", "stored", "middle", "blocks"]
"""Zeros of groups of two and more bits, for recipes that export to other engines: as the recipe fits them; integers in
every group; 2^(bits - 1) in every group. "blocks": no groups, but llama.cpp's block types with what they have in place
of zeros (`grids.blocks`)."""
# fp16 steps below 2^-14 lose digits and above 2^15 may overflow: such layers keep bfloat16 scales.
_FP16_SAFE = (2.0**-11, 2.0**14)


@dataclass(frozen=True)
class RangeSearch:
    """Candidates for the range multiplier tau, and the exponent q of the error that judges them.

    Default: 1, then 71 points in [0.4, 1.1]; for a Gaussian group the best tau is 0.60 / 0.80 / 0.93 at 2 / 3 / 4
    bits, so [0.9, 1.1], as published, misses it. `zeros`: also try the two zeros next to the nearest (2 bits: all).
    `middle`: the zero is 2^(bits - 1), as engines have it that store none.
    """

    taus: tuple[float, ...] = (1.0, *(round(0.4 + 0.01 * i, 2) for i in range(71)))
    exponent: float = 2.0
    zeros: bool = False
    middle: bool = False


MIN_MAX = RangeSearch(taus=(1.0,))
# The public implementation: 1, then 1.002 .. 1.100 and 0.998 .. 0.900 in steps of 0.002, exponent 2.4.
_FIFTY = range(1, 51)
PUBLISHED_SEARCH = RangeSearch(
    (1.0, *(round(1 + 0.002 * i, 3) for i in _FIFTY), *(round(1 - 0.002 * i, 3) for i in _FIFTY)), exponent=2.4
)


def zeros_at(search: RangeSearch, rule: ZeroRule) -> RangeSearch:
    """Return the search with the zeros that `rule` asks for."""
    return replace(search, middle=rule == "middle")


@dataclass(frozen=True, eq=False)
class UniformGrid(Grid):
    """Equal steps. `bits` >= 2: scale * (code - zero), zero an integer in 0 .. 2^bits - 1. `bits` = 1: zero + scale *
    code. `zero` None: scale * (code - (2^bits - 1) / 2).

    `scale`, `zero`: `[out, 1]`, in storage precision (`zero` uint8 from 2 bits on).
    """

    bits: int
    scale: Tensor
    zero: Tensor | None

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes of `[out, n]` as float."""
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

    @classmethod
    def segment(cls, grids: Sequence[Self], codes: Tensor, group_size: int) -> Segment:
        """Neighbouring groups as stored: scales and zeros `[out, groups]`, symmetric where no group has a zero."""
        zeros = [grid.zero for grid in grids if grid.zero is not None]
        scale = torch.cat([grid.scale for grid in grids], dim=1)
        form = Format(grids[0].bits, group_size, "uniform", scale.dtype, symmetric=not zeros)
        return Segment(form, codes, scale, torch.cat(zeros, dim=1) if zeros else None)

    @classmethod
    def of_segment(cls, segment: Segment, columns: slice) -> Self:
        """The grid of one group of a segment."""
        k = columns.start // segment.format.group_size
        zero = None if segment.zero is None else segment.zero[:, k : k + 1]
        return cls(segment.format.bits, segment.scale[:, k : k + 1], zero)


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
    """Fit the grid of the group `weight` fp32 `[out, n]`; `importance` `[n]` weighs the errors, None = 1.

    `symmetric`: groups of two and more bits store no zero."""
    if bits == 1:
        return fit_two_levels(weight, importance, rule=one_bit, scale_dtype=scale_dtype)
    return fit_range(weight, bits, importance, search=search, symmetric=symmetric, scale_dtype=scale_dtype)


def fit_range(
    weight: Tensor,
    bits: int,
    importance: Tensor | None = None,
    *,
    search: RangeSearch = MIN_MAX,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> UniformGrid:
    """Fit a min-max grid, its range times the tau with the least sum of importance * |error|^q per row.

    The range passes through 0. The zero is computed once, at tau = 1, where it never leaves 0 .. 2^bits - 1, and
    searched only on request. A later tau wins only when strictly better.
    `symmetric`: the range is the largest |w| on both sides of zero, with no level at it, so that no zero is stored. For
    groups of 32 Gaussian weights the error is 0.108 of the variance at 2 bits, with a zero 0.112; at 3 bits 0.0293 and
    0.0258: more levels prefer a zero.
    """
    levels = 2**bits - 1
    if symmetric:
        full = weight.abs().amax(dim=1, keepdim=True) * (2 / levels)
        zeros = [full]
    elif search.middle:
        full = weight.abs().amax(dim=1, keepdim=True) * (2 / levels)
        full = full.masked_fill(full == 0, 1.0)
        zeros = [torch.full_like(full, 2 ** (bits - 1))]
    else:
        low = weight.amin(dim=1, keepdim=True).clamp_(max=0)
        high = weight.amax(dim=1, keepdim=True).clamp_(min=0)
        empty = low == high
        low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
        full = (high - low) / levels
        zeros = _zeros(torch.round(-low / full), levels, search.zeros)
    errors = _RangeErrors(weight, importance, levels, search.exponent, symmetric)
    scale, zero = errors.best(full, zeros, search.taus, scale_dtype)
    return UniformGrid(bits, scale.to(scale_dtype), None if symmetric else zero.to(torch.uint8))


def _zeros(nearest: Tensor, levels: int, searched: bool) -> list[Tensor]:
    """The nearest zero, and if `searched` its neighbours behind it, or all zeros at 2 bits."""
    if not searched:
        return [nearest]
    if levels == 3:
        return [nearest, *(torch.full_like(nearest, zero) for zero in range(4))]
    return [nearest, (nearest - 1).clamp_min(0), (nearest + 1).clamp_max(levels)]


@dataclass(frozen=True, eq=False)
class _RangeErrors:
    """The errors of a group `weight` `[out, n]` on `levels` + 1 equal steps around a zero; `symmetric`: around none."""

    weight: Tensor
    importance: Tensor | None
    levels: int
    exponent: float
    symmetric: bool

    def best(
        self, full: Tensor, zeros: Sequence[Tensor], taus: Sequence[float], scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The scale tau * `full` and the zero with the least loss per row, `[out, 1]`; the earlier one wins a tie."""
        best_scale, best_zero = _stored(full * taus[0], scale_dtype), zeros[0]
        if len(taus) * len(zeros) == 1:
            return best_scale, best_zero
        least: Tensor | None = None
        work = (torch.empty_like(self.weight), torch.empty_like(self.weight))
        for zero in zeros:
            for tau in taus:
                scale = _stored(full * tau, scale_dtype)
                loss = self.loss(scale, zero, work)
                if least is None:
                    least = loss
                    continue
                better = loss < least
                least = torch.where(better, loss, least)
                best_scale = torch.where(better, scale, best_scale)
                if len(zeros) > 1:
                    best_zero = torch.where(better, zero, best_zero)
        return best_scale, best_zero

    def loss(self, scale: Tensor, zero: Tensor, work: tuple[Tensor, Tensor]) -> Tensor:
        """sum_j importance_j * |w_j - q_j|^exponent per row, `[out, 1]`; `work`: two scratch tensors like `weight`.

        In units of the scale, so that no pass multiplies by it: six passes over the group instead of eight.
        """
        exact, error = work
        torch.div(self.weight, scale, out=exact)
        if self.symmetric:
            torch.floor(exact, out=error)
            torch.clamp(error, -(self.levels + 1) / 2, (self.levels - 1) / 2, out=error)
            error.sub_(exact).add_(0.5)
        else:
            torch.round(exact, out=error)
            # clamp(round(w/s) + z, 0, levels) - z, without adding z twice: exact, all terms are small integers
            torch.clamp(error, -zero, self.levels - zero, out=error)
            error.sub_(exact)
        return self._weighted(error) * scale**self.exponent

    def _weighted(self, error: Tensor) -> Tensor:
        """sum_j importance_j |error_j|^exponent per row, `[out, 1]`; overwrites `error`."""
        if self.exponent == 2.0:
            error.square_()
        else:
            error.abs_().pow_(self.exponent)
        if self.importance is None:
            return error.sum(dim=1, keepdim=True)
        return torch.mv(error, self.importance).unsqueeze(1)


def fit_two_levels(
    weight: Tensor,
    importance: Tensor | None = None,
    *,
    rule: OneBitRule = "symmetric",
    scale_dtype: torch.dtype = torch.float16,
) -> UniformGrid:
    """Fit one bit per weight: two levels per row.

    symmetric: +- the importance-weighted mean |w|, the least-squares pair around zero; stores no offset.
    code (the public implementation of SliM-LLM): mean +- mean |w|.
    """
    size = weight.abs()
    if rule == "symmetric":
        if importance is None:
            level = size.mean(dim=1, keepdim=True)
        else:
            mass = importance.expand_as(size)
            level = (size * mass).sum(dim=1, keepdim=True) / mass.sum(dim=1, keepdim=True).clamp_min(1e-30)
        return UniformGrid(1, _stored(2 * level, scale_dtype).to(scale_dtype), None)
    centre, spread = weight.mean(dim=1, keepdim=True), size.mean(dim=1, keepdim=True)
    offset = (centre - spread).to(scale_dtype)
    step = (centre + spread - offset.float()).to(scale_dtype)
    return UniformGrid(1, step, offset)


def scale_dtype_for(weight: Tensor) -> torch.dtype:
    """float16, or bfloat16 where the layer's magnitudes would overflow float16 or lose its digits."""
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    in_range = largest == 0.0 or _FP16_SAFE[0] <= largest <= _FP16_SAFE[1]
    return torch.float16 if in_range else torch.bfloat16


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a scale to its storage type, never to zero, because weights are divided by it."""
    info = torch.finfo(dtype)
    return scale.clamp(info.tiny * info.eps, info.max).to(dtype).float()
