"""Round a whole table to symmetric groups: round_symmetric(weight, bits, group_size) -> QuantizedWeight.

For tables of which single rows are read, such as embeddings: a group holds codes and one scale, no zero, so that a row
can be read without its neighbours.
"""

import torch
from torch import Tensor

from bitquilt.core.types import Format, QuantizedWeight, Segment, group_slices
from bitquilt.layer.grids.uniform import RangeSearch, fit_symmetric, scale_dtype_for

# Shares of the full range; a Gaussian group of 32 at 4 bits is best near 0.88, at 8 bits near 1.
_SEARCH = RangeSearch(tuple(round(1.0 - 0.02 * i, 2) for i in range(16)))
_ROWS = 16384  # at once: 16384 x 32 fp32 candidates take 2 MB, which stay in the cache


def round_symmetric(weight: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Round `[rows, columns]` to scale * (code - (2^bits - 1) / 2), one scale per row and `group_size` columns.

    The scale is the one with the least squared error among 16 shares of the group's range.
    """
    dtype = scale_dtype_for(weight)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    groups = group_slices(weight.shape[1], group_size)
    scales = torch.empty(weight.shape[0], len(groups), dtype=dtype, device=weight.device)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        for k, columns in enumerate(groups):
            part = weight[rows, columns].float()
            grid = fit_symmetric(part, bits, search=_SEARCH, scale_dtype=dtype)
            codes[rows, columns] = grid.encode(part).to(torch.uint8)
            scales[rows, k] = grid.scale.squeeze(1)
    form = Format(bits, group_size, scale_dtype=dtype, symmetric=True)
    return QuantizedWeight((Segment(form, codes, scales),))
