"""Which few levels, shared by many columns but for a factor each? fit_table(weight [out, n], bits) -> SharedTable.

A table per column costs 16 x 2^bits / out bits per weight: nothing on 4096 rows, two bits per weight on 32. A table for
all columns of a width costs next to nothing and one float8 factor ("gain") per column 8 / out. On layers of 64 to 768
rows that is worth 0.05 to 1.6 bits per weight at equal squared error (python -m benchmarks.clustering).

The table is fitted by k-means over the columns divided by their root mean squares, then each column's gain to its
codes. Fitting both in turn again changes the squared error by less than 0.2 % (demo model, 2 to 4 bits, four rounds).
Not published: a storage format for narrow layers.
"""

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from bitquilt.layer.grids.codebook import Clustering, CodebookGrid, cluster

_REFITS = 2  # of a column's gain to its codes
# Of a large layer the table is fitted on some rows: at least so many, from which a column's root mean square is known
# to 4 %, and so many weights: sixteen times as many lower the squared error at 4 bits by 0.2 %.
_ROWS, _SAMPLE = 256, 2**16
_BINS = 4096  # means of so many quantiles stand for them
# Largest gain: room to grow to float8's 448 when errors of other columns are added, and nine octaves of full precision
# below. Raised where the table's own float16 would run out of digits.
_LEAST_PEAK, _PEAK = 4.0, 128.0
_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class SharedTable:
    """`levels` fp32 `[2^bits]`, ascending, of storage precision; a column holds them times its gain, stored as
    `gain_dtype`. `spread`: root mean square of a column whose gain is about 1, where the search for a gain begins."""

    bits: int
    levels: Tensor
    gain_dtype: torch.dtype
    spread: float

    def fit(self, weight: Tensor, mass: Tensor | None = None) -> CodebookGrid:
        """The gains of least squared error for the columns of `weight` fp32 `[out, n]`; `mass` as in `fit_codebook`."""
        counted = torch.ones_like(weight) if mass is None else mass
        gains = _root_mean_square(weight, counted) / self.spread
        for _ in range(_REFITS):
            gains = _refit(weight, counted, self.levels, gains)
        best, least = torch.zeros_like(gains), torch.full_like(gains, torch.inf)
        for candidate in _stored_neighbours(gains, self.gain_dtype):
            error = ((weight - _rounded(weight, self.levels, candidate)).square() * counted).sum(dim=0)
            better = error < least
            best, least = torch.where(better, candidate, best), torch.where(better, error, least)
        return CodebookGrid(self.bits, best.unsqueeze(1) * self.levels, best, self.levels)


def fit_table(
    weight: Tensor,
    bits: int,
    mass: Tensor | None = None,
    importance: Tensor | None = None,
    *,
    clustering: Clustering = "exact",
    iterations: int = 50,
    dtype: torch.dtype = torch.float16,
    gain_dtype: torch.dtype = torch.float8_e4m3fn,
) -> SharedTable:
    """The table that all columns of `weight` fp32 `[out, n]` share; `importance` `[n]` weighs their errors, None = 1.

    uniform clustering: equal steps, symmetric around zero, reaching as far as is best for all columns together.
    """
    step = max(1, len(weight) // max(_ROWS, _SAMPLE // weight.shape[1]))
    weight = weight[::step]
    counted = torch.ones_like(weight) if mass is None else mass[::step]
    cost = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.float()
    cost = cost / cost.max().clamp(min=_TINY)
    gains = _root_mean_square(weight, counted)
    if clustering == "uniform":
        levels = _equal_steps(weight, counted, cost, gains, 1 << bits)
    else:
        levels = _clustered(weight, counted, cost, gains, 1 << bits, clustering, iterations)
    gains = _refit(weight, counted, levels, gains)
    return _in_storage(levels, gains, weight, counted, bits, dtype, gain_dtype)


def _in_storage(
    levels: Tensor, gains: Tensor, weight: Tensor, counted: Tensor, bits: int, dtype: torch.dtype, kind: torch.dtype
) -> SharedTable:
    """Move a power of two between table and gains so that both keep their digits, and round the table."""
    reach, peak = float(levels.abs().max()), float(gains.max())
    if reach * peak < _TINY:
        return SharedTable(bits, torch.zeros_like(levels), kind, 1.0)
    wanted = min(max(64.0 * reach * peak, _LEAST_PEAK), _PEAK)
    unit = 2.0 ** torch.tensor(wanted / peak).log2().floor()
    limit = torch.finfo(dtype).max
    stored = (levels / unit).clamp(-limit, limit).to(dtype).float()
    table = SharedTable(bits, stored, kind, 1.0)
    live = gains > 0
    ratio = _root_mean_square(weight, counted)[live] / (gains[live] * unit)
    return replace(table, spread=float(ratio.median()))


def _equal_steps(weight: Tensor, counted: Tensor, cost: Tensor, gains: Tensor, k: int) -> Tensor:
    """Equal steps from -r to r times the columns' root mean squares, r the best of a few."""
    steps = torch.linspace(-1, 1, k, device=weight.device)
    errors = []
    reaches = [0.6 + 0.2 * i for i in range(20)]
    for reach in reaches:
        difference = weight - _rounded(weight, reach * steps, gains)
        errors.append(float((difference.square() * counted).sum(dim=0) @ cost))
    return reaches[errors.index(min(errors))] * steps


def _clustered(
    weight: Tensor, counted: Tensor, cost: Tensor, gains: Tensor, k: int, clustering: Clustering, iterations: int
) -> Tensor:
    values = weight / gains.clamp(min=_TINY)
    masses = counted * (cost * gains.square())
    step = -(-values.numel() // _SAMPLE)
    while step > 1 and gcd(step, values.shape[1]) > 1:  # else some columns are never seen
        step += 1
    x, order = values.flatten()[::step].double().sort()
    w = masses.flatten()[::step].double()[order]
    if len(x) > _BINS:
        x, w = _binned(x, w)
    return cluster(x.unsqueeze(0), w.unsqueeze(0), k, clustering, iterations).squeeze(0).float()


def _binned(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means of bins of equal count: what k-means loses by them is the spread inside a bin."""
    bins = torch.arange(len(x), device=x.device) * _BINS // len(x)
    mass, first = (torch.zeros(_BINS, dtype=x.dtype, device=x.device).index_add_(0, bins, v) for v in (w, w * x))
    held = mass > 0
    return first[held] / mass[held], mass[held]


def _rounded(weight: Tensor, levels: Tensor, gains: Tensor) -> Tensor:
    """Every weight as its nearest level times its column's gain; columns of gain 0 become 0."""
    middles = (levels[1:] + levels[:-1]) / 2
    # take: fourteen times as fast as indexing
    return levels.take(torch.bucketize(weight / gains.clamp(min=_TINY), middles)) * gains


def _refit(weight: Tensor, counted: Tensor, levels: Tensor, gains: Tensor) -> Tensor:
    """The least-squares gains for the codes that `gains` give."""
    chosen = _rounded(weight, levels, gains)
    moved = (counted * weight * chosen).sum(dim=0) / (counted * chosen.square()).sum(dim=0).clamp(min=_TINY)
    return gains * moved.clamp(min=0)


def _stored_neighbours(gains: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The gains as stored, and for float8, which has eight values per octave, those around them."""
    limit = torch.finfo(dtype).max
    nearest = gains.clamp(0, limit).to(dtype)
    if dtype != torch.float8_e4m3fn:
        return [nearest.float()]
    bits = nearest.view(torch.uint8).to(torch.int16)  # positive floats are ordered as their bits are; 126 is 448
    return [(bits + d).clamp(0, 126).to(torch.uint8).view(dtype).float() for d in (0, -1, 1, -2, 2)]


def _root_mean_square(weight: Tensor, counted: Tensor) -> Tensor:
    return ((weight.square() * counted).sum(dim=0) / counted.sum(dim=0).clamp(min=_TINY)).sqrt()
