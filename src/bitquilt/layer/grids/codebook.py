"""Codebook grids: `fit_codebook` gives every column 2^bits free levels, `CodebookGrid` rounds to them.

Levels come from one-dimensional k-means (`grids.kmeans`) and are rounded to storage precision BEFORE codes are chosen.
CMPQ (arXiv 2410.13056), spec section 3.2. `grids.shared_levels` fits a table that many columns share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from bitquilt.core.types import Format, Segment
from bitquilt.layer.grids.grid import Grid
from bitquilt.layer.grids.kmeans import exact_kmeans
from bitquilt.ops import sweep_kernels

# Weights sorted in fp64 at once: a 4096 x 4096 layer peaks at 0.65 GiB above the start instead of 1.36.
_AT_ONCE = 2**21


@dataclass(frozen=True, eq=False)
class CodebookGrid(Grid):
    """Free levels per column, as stored and ascending: a table of its own for each column, `tables` `[n, 2^bits]`, or
    one table `[1, 2^bits]` that all columns multiply by their `gains` `[n]`."""

    bits: int
    tables: Tensor
    gains: Tensor | None = None

    @cached_property
    def levels(self) -> Tensor:
        """fp32 `[n, 2^bits]`: column j holds `levels[j, code]`."""
        tables = self.tables.float()
        return tables if self.gains is None else self.gains.float().unsqueeze(1) * tables

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes of `[out, n]` as float; the lower level wins a tie."""
        if weight.numel() and self.levels.shape[1] > 1 and sweep_kernels.usable(weight):
            columns = weight.t().contiguous()
            return sweep_kernels.encode(columns, self.levels.contiguous()).t().to(weight.dtype)
        middles = (self.levels[:, 1:] + self.levels[:, :-1]) / 2
        return torch.searchsorted(middles, weight.t().contiguous()).t().to(weight.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """fp32 values of float codes `[out, n]`."""
        return self.levels.t().gather(0, codes.to(torch.int64))

    @classmethod
    def segment(cls, grids: Sequence[Self], codes: Tensor, group_size: int = 1) -> Segment:
        """Neighbouring columns as stored: a group per table, which is one column or the whole segment."""
        first = grids[0]
        gains = [grid.gains for grid in grids if grid.gains is not None]
        if not gains:
            form = Format(first.bits, 1, "codebook", first.tables.dtype)
            return Segment(form, codes, torch.cat([grid.tables for grid in grids]))
        form = Format(first.bits, codes.shape[1], "codebook", first.tables.dtype, gain_dtype=gains[0].dtype)
        return Segment(form, codes, first.tables, torch.cat(gains))

    @classmethod
    def of_segment(cls, segment: Segment, columns: slice) -> Self:
        """The grid of some columns of a segment."""
        if segment.zero is None:
            return cls(segment.format.bits, segment.scale[columns])
        return cls(segment.format.bits, segment.scale, segment.zero[columns])


def fit_codebook(
    weight: Tensor, bits: int, mass: Tensor | None = None, dtype: torch.dtype = torch.float16
) -> CodebookGrid:
    """Fit levels to every column of `weight` fp32 `[out, n]`; `mass` `[out, n]` >= 0 weighs squared errors, None = 1.

    Weights of mass 0 do not count; a column without mass gets levels of 0. A column with at most 2^bits distinct
    weights keeps them, and the last one fills the rest of its table.
    """
    parts = []
    for first in range(0, max(weight.shape[1], 1), step := max(1, _AT_ONCE // max(len(weight), 1))):
        columns = slice(first, first + step)
        values, order = weight[:, columns].t().double().contiguous().sort(dim=1)
        masses = torch.ones_like(values) if mass is None else mass[:, columns].t().double().gather(1, order)
        parts.append(cluster(values, masses, 1 << bits))
    levels = torch.cat(parts)
    limit = torch.finfo(dtype).max
    return CodebookGrid(bits, levels.clamp(-limit, limit).to(dtype))


def cluster(values: Tensor, masses: Tensor, k: int) -> Tensor:
    """Fit ascending levels fp64 `[columns, k]` to ascending fp64 `values` `[columns, n]` with their `masses`.

    Without values, or without mass, levels are 0.
    """
    if not values.shape[1]:
        return values.new_zeros(len(values), k)
    levels, few = _distinct(values, masses, k)
    many = ~few
    if bool(many.any()):
        centroids, _ = exact_kmeans(values[many].t(), masses[many].t(), k)
        levels[many] = centroids.t()
    return levels


def _distinct(values: Tensor, masses: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The distinct weights with mass as levels `[columns, k]`, and which columns have at most k of them."""
    counted = masses > 0
    # a weight without mass takes the value of the one before it and so adds no level
    position = torch.where(counted, torch.arange(values.shape[1], device=values.device), -1).cummax(1).values
    seen = position >= 0
    held = values.gather(1, position.clamp(min=0))
    opens = torch.zeros_like(counted)
    opens[:, 1:] = (held[:, 1:] != held[:, :-1]) & seen[:, :-1]
    rank = opens.cumsum(1)
    few = rank[:, -1] < k
    last = torch.where(seen[:, -1:], held[:, -1:], 0.0)
    levels = last.expand(-1, k).clone()
    levels.scatter_(1, rank.clamp(max=k - 1).masked_fill(~seen, k - 1), torch.where(seen, held, last))
    return levels, few
