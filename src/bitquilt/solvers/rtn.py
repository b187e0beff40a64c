"""Which codes, when every weight is simply rounded? round_to_nearest(weight, groups, fit) -> Sweep, no feedback."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitquilt.solvers.gptq import FitGroup, G, Sweep


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
