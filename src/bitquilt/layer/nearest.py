"""Rounding to nearest, without feedback: `round_to_nearest`, `round_groups` and `round_symmetric`.

`round_to_nearest` gives codes and grids of any kind, `round_groups` the rounded weight for tables of loss.
`round_symmetric` is for tables whose rows are read one by one, such as embeddings.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitquilt.core.types import QuantizedWeight, Segment, group_slices
from bitquilt.layer.gptq_sweep import FitGroup, G, Sweep
from bitquilt.layer.grids.uniform import OneBitRule, RangeSearch, UniformGrid, fit, fit_range, scale_dtype_for

# For tables, which need an error and not the best grid: 7 ranges instead of 72, a tenth of the time.
COARSE = RangeSearch(taus=(1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95))
# Shares of the full range; a Gaussian group of 32 at 4 bits is best near 0.88, at 8 bits near 1.
_SYMMETRIC_SEARCH = RangeSearch(tuple(round(1.0 - 0.02 * i, 2) for i in range(16)))
_ROWS = 16384  # at once: 16384 x 32 fp32 candidates take 2 MB, which stay in the cache


def round_to_nearest(weight: Tensor, groups: Sequence[slice], fit: FitGroup[G]) -> Sweep[G]:
    """Round `weight` fp32 `[out, in]` to the grid of each group; `loss` is the squared error."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    quantized = torch.empty_like(weight)
    grids = []
    for k, group in enumerate(groups):
        grid = fit(k, weight[:, group])
        grids.append(grid)
        nearest = grid.encode(weight[:, group])
        codes[:, group] = nearest.to(torch.uint8)
        quantized[:, group] = grid.decode(nearest)
    loss = float((weight - quantized).double().square().sum())
    return Sweep(codes, quantized, tuple(grids), loss)


def round_groups(
    weight: Tensor,
    bits: int,
    group_size: int,
    importance: Tensor | None = None,
    search: RangeSearch = COARSE,
    symmetric: bool = False,
    one_bit: OneBitRule = "symmetric",
) -> Tensor:
    """Return `weight` `[out, in]` with every group rounded at `bits`; `importance` `[in]` weighs the range search."""
    dtype = scale_dtype_for(weight)
    parts = []
    for group in group_slices(weight.shape[1], group_size):
        weights = None if importance is None else importance[group]
        columns = weight[:, group]
        grid = fit(columns, bits, weights, search=search, one_bit=one_bit, symmetric=symmetric, scale_dtype=dtype)
        parts.append(grid.quantize(columns))
    return torch.cat(parts, dim=1)


def round_symmetric(weight: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Round `[rows, columns]` to scale * (code - (2^bits - 1) / 2), one scale per row and `group_size` columns.

    No zero is stored, so a row can be read without its neighbours. The scale is the one with the least squared error
    among 16 shares of the group's range.
    """
    dtype = scale_dtype_for(weight)
    groups = group_slices(weight.shape[1], group_size)

    def fit_group(_k: int, columns: Tensor) -> UniformGrid:
        return fit_range(columns, bits, search=_SYMMETRIC_SEARCH, symmetric=True, scale_dtype=dtype)

    parts = []
    for rows in weight.split(_ROWS):
        rounded = round_to_nearest(rows.float(), groups, fit_group)
        parts.append(UniformGrid.segment(rounded.grids, rounded.codes, group_size))
    codes, scale = (torch.cat(tensors) for tensors in zip(*((p.codes, p.scale) for p in parts), strict=True))
    return QuantizedWeight((Segment(parts[0].format, codes, scale),))
