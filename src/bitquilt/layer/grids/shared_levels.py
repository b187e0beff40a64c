"""Levels shared by many columns: `fit_table` fits one table, `SharedTable.fit` a gain per column.

A table per column costs 16 x 2^bits / out bits per weight: nothing on 4096 rows, two bits per weight on 32. One table
for all columns of a width costs next to nothing, and one float8 factor ("gain") per column costs 8 / out. On layers of
64 to 768 rows that saves 0.05 to 1.6 bits per weight at equal squared error (python -m benchmarks.clustering).

k-means fits the table to the columns divided by their root mean squares; each column's gain is then fitted to its
codes. Fitting both in turn again changes the squared error by less than 0.2 % (demo model, 2 to 4 bits, four rounds).
Not published: a storage format for narrow layers.
"""

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from bitquilt.layer.grids.codebook import CodebookGrid, cluster
from bitquilt.ops import sweep_kernels

_REFITS = 2  # of a column's gain to its codes
# A large layer's table is fitted to a sample of at least so many rows, which give a column's root mean square to 4 %,
# and so many weights: sixteen times as many lower the squared error at 4 bits by 0.2 %.
_ROWS, _SAMPLE = 256, 2**16
_BINS = 4096  # quantile bins whose means stand for the weights
# Largest gain: room to grow to float8's 448 when errors of other columns are added, and nine octaves of full precision
# below. Raised where the table's own float16 would run out of digits.
_LEAST_PEAK, _PEAK = 4.0, 128.0
_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class SharedTable:
    """One table for many columns: `table` `[2^bits]`, ascending, as stored; a column holds it times its gain.

    `spread`: root mean square of a column whose gain is about 1, where the search for a gain begins."""

    bits: int
    table: Tensor
    gain_dtype: torch.dtype
    spread: float

    def fit(self, weight: Tensor, mass: Tensor | None = None) -> CodebookGrid:
        """Fit the gains of least squared error to `weight` fp32 `[out, n]`; `mass` as in `fit_codebook`.

        Sums are in float64, because torch's order of adding float32 depends on the processor's vectors: the native
        sweep (csrc/sweep.cpp) finds the same gains."""
        if self.native and sweep_kernels.usable(weight):
            counted = torch.ones_like(weight) if mass is None else mass
            gains = sweep_kernels.fit_gains(
                weight.t().contiguous(), counted.t().contiguous(), self.table.float(), self.spread
            )
            return self.grid(gains)
        return self.grid(self.fit_reference(weight, mass))

    def fit_reference(self, weight: Tensor, mass: Tensor | None = None) -> Tensor:
        """Fit the gains `[n]` as stored: the definition of `fit`."""
        columns, levels = _Columns.of(weight, mass, torch.float64), self.table.float()
        gains = columns.root_mean_square() / self.spread
        for _ in range(_REFITS):
            gains = columns.refit(levels, gains)
        best, least = torch.zeros_like(gains), torch.full_like(gains, torch.inf, dtype=torch.float64)
        for candidate in _stored_neighbours(gains, self.gain_dtype):
            error = columns.error(levels, candidate)
            better = error < least
            best, least = torch.where(better, candidate, best), torch.where(better, error, least)
        return best.to(self.gain_dtype)

    __call__ = fit

    @property
    def native(self) -> bool:
        """Whether the kernels know the type of the gains."""
        return self.gain_dtype == torch.float8_e4m3fn

    def grid(self, gains: Tensor) -> CodebookGrid:
        """The grid of columns with these gains `[n]`, as stored."""
        return CodebookGrid(self.bits, self.table.unsqueeze(0), gains)


def fit_table(
    weight: Tensor,
    bits: int,
    mass: Tensor | None = None,
    importance: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    gain_dtype: torch.dtype = torch.float8_e4m3fn,
) -> SharedTable:
    """Fit the table that all columns of `weight` fp32 `[out, n]` share; `importance` `[n]` weighs them, None = 1."""
    step = max(1, len(weight) // max(_ROWS, _SAMPLE // weight.shape[1]))
    columns = _Columns.of(weight[::step], None if mass is None else mass[::step])
    cost = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.float()
    cost = cost / cost.max().clamp(min=_TINY)
    gains = columns.root_mean_square()
    x, w = _sampled(columns, cost, gains)
    levels = cluster(x.unsqueeze(0), w.unsqueeze(0), 1 << bits).squeeze(0).float()
    gains = columns.refit(levels, gains)
    table, spread = _in_storage(levels, gains, columns, dtype)
    return SharedTable(bits, table, gain_dtype, spread)


@dataclass(frozen=True, eq=False)
class _Columns:
    """Columns to fit: `weight` fp32 `[out, n]`, and how much each weight counts, `[out, n]`; sums are in `dtype`."""

    weight: Tensor
    counted: Tensor
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, weight: Tensor, mass: Tensor | None, dtype: torch.dtype = torch.float32) -> "_Columns":
        """Every weight counts alike without a `mass`."""
        return cls(weight, torch.ones_like(weight) if mass is None else mass, dtype)

    def root_mean_square(self) -> Tensor:
        """`[n]`."""
        total = self._sum(self.weight.square() * self.counted)
        return (total / self._sum(self.counted).clamp(min=_TINY)).sqrt().float()

    def rounded(self, levels: Tensor, gains: Tensor) -> Tensor:
        """Every weight as its nearest level times its column's gain; columns of gain 0 become 0."""
        scaled = self.weight / gains.clamp(min=_TINY)
        if sweep_kernels.usable(scaled):
            return sweep_kernels.nearest(scaled.contiguous(), levels) * gains
        middles = (levels[1:] + levels[:-1]) / 2
        # take: fourteen times as fast as indexing
        return levels.take(torch.bucketize(scaled, middles)) * gains

    def error(self, levels: Tensor, gains: Tensor) -> Tensor:
        """Squared error of every column, `[n]`."""
        return self._sum((self.weight - self.rounded(levels, gains)).square() * self.counted)

    def refit(self, levels: Tensor, gains: Tensor) -> Tensor:
        """The least-squares gains for the codes that `gains` give."""
        chosen = self.rounded(levels, gains)
        scale = self._sum(self.counted * chosen.square()).clamp(min=_TINY)
        return gains * (self._sum(self.counted * self.weight * chosen) / scale).clamp(min=0).float()

    def _sum(self, terms: Tensor) -> Tensor:
        return terms.sum(dim=0, dtype=self.dtype)


def _sampled(columns: _Columns, cost: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted values and masses, fp64, for k-means: some of the weights over their gains, in bins if they are many."""
    values = columns.weight / gains.clamp(min=_TINY)
    masses = columns.counted * (cost * gains.square())
    step = -(-values.numel() // _SAMPLE)
    while step > 1 and gcd(step, values.shape[1]) > 1:  # otherwise some columns never enter the sample
        step += 1
    x, order = values.flatten()[::step].double().sort()
    w = masses.flatten()[::step].double()[order]
    return _binned(x, w) if len(x) > _BINS else (x, w)


def _binned(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means of bins of equal count; k-means loses only the spread inside a bin."""
    bins = torch.arange(len(x), device=x.device) * _BINS // len(x)
    mass, first = (torch.zeros(_BINS, dtype=x.dtype, device=x.device).index_add_(0, bins, v) for v in (w, w * x))
    held = mass > 0
    return first[held] / mass[held], mass[held]


def _in_storage(levels: Tensor, gains: Tensor, columns: _Columns, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The table in `dtype`, and its spread, after a power of two moved between table and gains keeps both precise."""
    reach, peak = float(levels.abs().max()), float(gains.max())
    if reach * peak < _TINY:
        return torch.zeros_like(levels, dtype=dtype), 1.0
    wanted = min(max(64.0 * reach * peak, _LEAST_PEAK), _PEAK)
    unit = 2.0 ** torch.tensor(wanted / peak).log2().floor()
    limit = torch.finfo(dtype).max
    live = gains > 0
    ratio = columns.root_mean_square()[live] / (gains[live] * unit)
    return (levels / unit).clamp(-limit, limit).to(dtype), float(ratio.median())


def _stored_neighbours(gains: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The gains as stored, fp32, and for float8, which has eight values per octave, those around them."""
    limit = torch.finfo(dtype).max
    nearest = gains.clamp(0, limit).to(dtype)
    if dtype != torch.float8_e4m3fn:
        return [nearest.float()]
    bits = nearest.view(torch.uint8).to(torch.int16)  # positive floats are ordered as their bits are; 126 is 448
    return [(bits + d).clamp(0, 126).to(torch.uint8).view(dtype).float() for d in (0, -1, 1, -2, 2)]
