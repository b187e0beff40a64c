"""Which few free levels represent a column best? fit_codebook(weight [out, n], bits, mass, ...) -> CodebookGrid.

One table of 2^bits levels per input column, by one-dimensional k-means (`grids.kmeans`). Levels are rounded to storage
precision BEFORE codes are chosen. CMPQ (arXiv 2410.13056), spec section 3.2. Tables that columns share: `grids.shared`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitquilt.layer.grids.kmeans import exact_kmeans, lloyd

Clustering = Literal["exact", "lloyd", "uniform"]
# Weights sorted in fp64 at once: a 4096 x 4096 layer peaks at 0.65 GiB above the start instead of 1.36.
_AT_ONCE = 2**21


@dataclass(frozen=True, eq=False)
class CodebookGrid:
    """`levels` fp32 `[n, 2^bits]`, ascending per column: column j holds `levels[j, code]`. They are of storage
    precision, or products of two that are: a `table` fp32 `[2^bits]` of all columns and their `gains` fp32 `[n]`."""

    bits: int
    levels: Tensor
    gains: Tensor | None = None
    table: Tensor | None = None

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes of `[out, n]` as float; the lower level wins a tie."""
        middles = (self.levels[:, 1:] + self.levels[:, :-1]) / 2
        return torch.searchsorted(middles, weight.t().contiguous()).t().to(weight.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """fp32 values of float codes `[out, n]`."""
        return self.levels.t().gather(0, codes.to(torch.int64))

    def quantize(self, weight: Tensor) -> Tensor:
        """`[out, n]` rounded to the grid."""
        return self.decode(self.encode(weight))


def fit_codebook(
    weight: Tensor,
    bits: int,
    mass: Tensor | None = None,
    *,
    clustering: Clustering = "exact",
    iterations: int = 50,
    dtype: torch.dtype = torch.float16,
) -> CodebookGrid:
    """Levels for every column of `weight` fp32 `[out, n]`; `mass` `[out, n]` >= 0 weighs the squared errors, None = 1.

    Weights of mass 0 do not count at all; a column without mass gets levels of 0. exact: the least squared error.
    lloyd: quantile start, at most `iterations` rounds. uniform: equal steps from least to greatest weight.
    Columns with at most 2^bits distinct weights keep them; the last one fills what is left of the table.
    """
    parts = []
    for first in range(0, max(weight.shape[1], 1), step := max(1, _AT_ONCE // max(len(weight), 1))):
        columns = slice(first, first + step)
        values, order = weight[:, columns].t().double().contiguous().sort(dim=1)
        masses = torch.ones_like(values) if mass is None else mass[:, columns].t().double().gather(1, order)
        parts.append(cluster(values, masses, 1 << bits, clustering, iterations))
    levels = torch.cat(parts)
    limit = torch.finfo(dtype).max
    return CodebookGrid(bits, levels.clamp(-limit, limit).to(dtype).float())


def cluster(values: Tensor, masses: Tensor, k: int, clustering: Clustering, iterations: int) -> Tensor:
    """Levels fp64 `[columns, k]`, ascending, of fp64 rows `[columns, n]`, ascending too."""
    if clustering == "uniform":
        return _equal_steps(values, masses, k)
    levels, few = _distinct(values, masses, k)
    many = ~few
    if bool(many.any()):
        arguments = values[many].t(), masses[many].t(), k
        centroids, _ = exact_kmeans(*arguments) if clustering == "exact" else lloyd(*arguments, iterations)
        levels[many] = centroids.t()
    return levels


def _distinct(values: Tensor, masses: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Levels `[columns, k]` where a column has at most k distinct weights of any mass, and which columns those are."""
    counted = masses > 0
    # a weight without mass takes the value of the one before it, so that it opens no level of its own
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


def _equal_steps(values: Tensor, masses: Tensor, k: int) -> Tensor:
    counted = masses > 0
    low = values.masked_fill(~counted, torch.inf).amin(1, keepdim=True)
    high = values.masked_fill(~counted, -torch.inf).amax(1, keepdim=True)
    empty = low > high
    low, high = low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)
    return low + (high - low) * torch.linspace(0, 1, k, dtype=torch.float64, device=values.device)
