"""Which codes, when the rounding error of a column may be repaired by the columns after it?

sweep(weight, upper, groups, fit) -> Sweep. GPTQ (arXiv 2210.17323) with any grid: the grid of each column group is
passed in as a function, so mixed bits, searched ranges and one-bit groups are no concern of the solver.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitquilt.grids.uniform import UniformGrid

FitGroup = Callable[[int, Tensor], UniformGrid]
"""(group index, its columns `[out, n]`, compensated so far) -> the grid of that group."""

# Columns whose updates are applied at once: 128 keeps the inner loop in cache and the trailing update a real
# matrix product (4096 x 4096 at group size 8: 3.1 s with blocks of 8, 1.2 s with 128).
_BLOCK = 128


@dataclass(frozen=True, eq=False)
class Sweep:
    """`codes` uint8 and `weight` fp32 `[out, in]` in the original column order, one grid per group, and the loss:
    sum of (error / U_jj)^2, which is tr((W - Q) H (W - Q)^T) for the damped Hessian behind `upper`."""

    codes: Tensor
    weight: Tensor
    grids: tuple[UniformGrid, ...]
    loss: float


def sweep(weight: Tensor, upper: Tensor, groups: Sequence[slice], fit: FitGroup) -> Sweep:
    """Quantize `weight` fp32 `[out, in]` column by column, fitting each group when it is reached.

    `upper` `[in, in]`: the factor U of the inverse Hessian; `groups`: consecutive column ranges covering all columns.
    """
    columns = weight.t().contiguous()  # [in, out]: a column is a row in memory
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    quantized = torch.empty_like(columns)
    grids: list[UniformGrid] = []
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start, stop, members in _blocks(groups):
        errors = torch.empty_like(columns[start:stop])
        for k in members:
            group = groups[k]
            grid = fit(k, columns[group].t())
            grids.append(grid)
            for j in range(group.start, group.stop):
                codes[j], quantized[j] = _round_column(columns[j], grid)
                errors[j - start] = (columns[j] - quantized[j]) / upper[j, j]
                columns[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
        loss += errors.double().square().sum()
    return Sweep(codes.t().contiguous(), quantized.t().contiguous(), tuple(grids), float(loss))


def sweep_ordered(
    weight: Tensor, upper: Tensor, groups: Sequence[slice], grids: Sequence[UniformGrid], order: Tensor
) -> Sweep:
    """The same sweep in another column order (act_order): grids are fitted beforehand, groups keep their columns.

    `order` int64 `[in]`: the columns in the order they are quantized; `upper` is the factor for that order.
    """
    group_of = torch.empty(weight.shape[1], dtype=torch.int64)
    for k, group in enumerate(groups):
        group_of[group] = k
    singles = [slice(j, j + 1) for j in range(weight.shape[1])]
    chosen = [grids[k] for k in group_of[order.cpu()].tolist()]
    swept = sweep(weight[:, order], upper, singles, lambda j, _columns: chosen[j])
    codes, quantized = torch.empty_like(swept.codes), torch.empty_like(swept.weight)
    codes[:, order], quantized[:, order] = swept.codes, swept.weight
    return Sweep(codes, quantized, tuple(grids), swept.loss)


def _round_column(column: Tensor, grid: UniformGrid) -> tuple[Tensor, Tensor]:
    codes = grid.encode(column.unsqueeze(1))
    return codes.squeeze(1).to(torch.uint8), grid.decode(codes).squeeze(1)


def _blocks(groups: Sequence[slice]) -> list[tuple[int, int, list[int]]]:
    """Cut the groups into runs of at least _BLOCK columns: (first column, last + 1, indices of the groups)."""
    blocks: list[tuple[int, int, list[int]]] = []
    for k, group in enumerate(groups):
        if blocks and blocks[-1][1] - blocks[-1][0] < _BLOCK:
            start, _, members = blocks[-1]
            blocks[-1] = (start, group.stop, [*members, k])
        else:
            blocks.append((group.start, group.stop, [k]))
    return blocks
