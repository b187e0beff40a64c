"""What will a plan store, and about how well, before anything is solved? grouped_layout(out, in, bits, ...) -> Layout,
as `solve.assemble` cuts segments; channel_layout for codebooks; round_groups(weight, bits, ...) for tables of loss."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitquilt.core.types import MAX_BITS, Format, Layout, group_slices
from bitquilt.layer.codebook_weight import LevelTables
from bitquilt.layer.grids.uniform import OneBitRule, RangeSearch, fit, scale_dtype_for

GROUP_WIDTHS = tuple(range(2, MAX_BITS + 1))
WIDTHS_FROM_ONE = (1, *GROUP_WIDTHS)
# For tables, which need an error and not the best grid: 7 ranges instead of 72, a tenth of the time.
COARSE = RangeSearch(taus=(1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95))
Widths = Sequence[int] | NDArray[np.integer[Any]]


def grouped_layout(
    out_features: int,
    in_features: int,
    bits: Widths,
    group_size: int,
    *,
    symmetric: Collection[int] = (1,),
    scale_dtype: torch.dtype = torch.float16,
    outliers: int = 0,
) -> Layout:
    """Groups of equal bits side by side, in their own order. `symmetric`: the widths that store no zero."""
    widths = np.asarray(bits)
    columns = group_size * np.bincount(widths)
    columns[widths[-1]] += in_features - group_size * len(widths)  # the last group may be narrower
    segments = tuple(
        (Format(b, group_size, "uniform", scale_dtype, symmetric=b in symmetric), int(columns[b]))
        for b in np.flatnonzero(columns).tolist()
    )
    sorted_already = bool((np.diff(widths) >= 0).all())
    ordering: Any = "identity" if sorted_already else "map"
    return Layout(out_features, in_features, segments, ordering, 0 if sorted_already else group_size, outliers)


def channel_layout(out_features: int, bits: Widths, tables: LevelTables, outliers: int = 0) -> Layout:
    """Channels of equal bits side by side, with levels as `tables` says: as `codebooks.assemble_codebooks` stores them,
    for arrays of millions too."""
    widths = np.asarray(bits)
    counts = np.bincount(widths)
    segments = tuple((tables.format(int(b), int(counts[b])), int(counts[b])) for b in np.flatnonzero(counts))
    mixed = not bool((np.diff(widths) >= 0).all())
    ordering: Any = "map" if mixed else "identity"
    return Layout(out_features, len(widths), segments, ordering, int(mixed), outliers, tables.row_gain_dtype)


def round_groups(
    weight: Tensor,
    bits: int,
    group_size: int,
    importance: Tensor | None = None,
    search: RangeSearch = COARSE,
    symmetric: bool = False,
    one_bit: OneBitRule = "symmetric",
) -> Tensor:
    """`weight` `[out, in]` with every column group rounded at `bits`; `importance` `[in]` weighs the range search."""
    dtype = scale_dtype_for(weight)
    parts = []
    for group in group_slices(weight.shape[1], group_size):
        weights = None if importance is None else importance[group]
        columns = weight[:, group]
        grid = fit(columns, bits, weights, search=search, one_bit=one_bit, symmetric=symmetric, scale_dtype=dtype)
        parts.append(grid.quantize(columns))
    return torch.cat(parts, dim=1)
