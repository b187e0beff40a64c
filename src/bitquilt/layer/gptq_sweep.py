"""The GPTQ sweep (arXiv 2210.17323): every column's rounding error is repaired by the columns after it.

`sweep` goes from left to right, `sweep_ordered` in any order with grids fitted before, `sweep_grouped` group by group
in another order. The grid of each column group is passed in as a function, so mixed bits, searched ranges and one-bit
groups do not concern the solver.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from bitquilt.layer.grids.grid import Grid
from bitquilt.layer.grids.uniform import UniformGrid
from bitquilt.ops import sweep_kernels

G = TypeVar("G", bound=Grid, covariant=True)
FitGroup = Callable[[int, Tensor], G]
"""(group index, its columns `[out, n]`, compensated so far) -> the grid of that group."""
SweepWhole = Callable[[sweep_kernels.SweepBlock, slice], list[G] | None]
"""(block, its columns) -> the grids of its groups after all of them were swept, or None: `fit` and `sweep` do it."""

# Columns whose updates are applied at once: 128 keeps the inner loop in cache and the trailing update a real
# matrix product (4096 x 4096 at group size 8: 3.1 s with blocks of 8, 1.2 s with 128).
_BLOCK = 128


@dataclass(frozen=True, eq=False)
class Sweep(Generic[G]):
    """`codes` uint8 and `weight` fp32 `[out, in]` in the original column order, one grid per group, and the loss:
    sum of (error / U_jj)^2, which is tr((W - Q) H (W - Q)^T) for the damped Hessian behind `upper`.

    `weight` holds the values of the codes, plus `remainder` fp16 `[out, in]` where weights are protected.
    `compensated` fp32 `[out, in]`: the weights that were rounded, errors of earlier columns added."""

    codes: Tensor
    weight: Tensor
    grids: tuple[G, ...]
    loss: float
    remainder: Tensor | None = None
    compensated: Tensor | None = None

    @property
    def aim(self) -> Tensor:
        """`compensated`, or the values of the codes where it is not known."""
        return self.weight if self.compensated is None else self.compensated


def sweep(
    weight: Tensor,
    upper: Tensor,
    groups: Sequence[slice],
    fit: FitGroup[G],
    protected: Tensor | None = None,
    whole_block: SweepWhole[G] | None = None,
) -> Sweep[G]:
    """Quantize `weight` fp32 `[out, in]` column by column, fitting each group when it is reached.

    `upper` `[in, in]`: the factor U of the inverse Hessian; `groups`: consecutive column ranges covering all columns.
    `protected` bool `[out, in]`: weights stored in fp16 with the value they have when the sweep reaches them. Their
    dense code is that of 0, and almost no error is left to repair. `whole_block`: does the same as `fit` and this file
    for many columns at once.
    """
    columns = weight.t().contiguous()  # [in, out]: a column is a row in memory
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    quantized = torch.empty_like(columns)
    kept = None if protected is None else protected.t().contiguous()
    remainder = None if kept is None else torch.zeros(kept.shape, dtype=torch.float16, device=weight.device)
    upper = upper if upper.stride(1) == 1 else upper.contiguous()
    grids: list[G] = []
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start, stop, members in _blocks(groups):
        part = slice(start, stop)
        of_kept = (None, None) if kept is None or remainder is None else (kept[part], remainder[part])
        errors = torch.empty_like(columns[part])
        block = sweep_kernels.SweepBlock(
            columns[part], quantized[part], codes[part], errors, upper[part, part], *of_kept
        )
        found = None if whole_block is None else whole_block(block, part)
        grids += found or []
        for k in members if found is None else ():
            grid = fit(k, columns[groups[k]].t())
            grids.append(grid)
            _sweep_group(block, slice(groups[k].start - start, groups[k].stop - start), grid)
        columns[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
        loss += errors.double().square().sum()
    rest = None if remainder is None else remainder.t().contiguous()
    # a column no longer changes once it is rounded
    return Sweep(codes.t().contiguous(), quantized.t().contiguous(), tuple(grids), float(loss), rest, columns.t())


def _sweep_group(block: sweep_kernels.SweepBlock, group: slice, grid: Grid) -> None:
    """Round the columns of a group one after the other and feed their errors back to the rest of the block."""
    if isinstance(grid, UniformGrid) and sweep_kernels.usable(block.columns):
        sweep_kernels.sweep_uniform(block, group, grid.scale, grid.zero, grid.bits)
        return
    columns, upper = block.columns, block.upper
    for j in range(group.start, group.stop):
        if block.kept is None or block.remainder is None:
            block.codes[j], block.quantized[j] = _round_column(columns[j], grid)
        else:
            kept = block.kept[j]
            block.codes[j], dense = _round_column(columns[j].masked_fill(kept, 0.0), grid)
            block.remainder[j] = (columns[j] - dense).masked_fill(~kept, 0.0).half()
            block.quantized[j] = dense + block.remainder[j]
        block.errors[j] = (columns[j] - block.quantized[j]) / upper[j, j]
        columns[j + 1 :].addr_(upper[j, j + 1 :], block.errors[j], alpha=-1)


def _round_column(column: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
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


def sweep_ordered(
    weight: Tensor,
    upper: Tensor,
    groups: Sequence[slice],
    grids: Sequence[G],
    order: Tensor,
    protected: Tensor | None = None,
) -> Sweep[G]:
    """Sweep in another column order (act_order): grids are fitted beforehand, groups keep their columns.

    `order` int64 `[in]`: the columns in the order they are quantized; `upper` is the factor for that order.
    """
    group_of = torch.empty(weight.shape[1], dtype=torch.int64)
    for k, group in enumerate(groups):
        group_of[group] = k
    singles = [slice(j, j + 1) for j in range(weight.shape[1])]
    chosen = [grids[k] for k in group_of[order.cpu()].tolist()]
    kept = None if protected is None else protected[:, order]
    swept = sweep(weight[:, order], upper, singles, lambda j, _columns: chosen[j], kept)
    return in_original_order(swept, tuple(grids), order)


def sweep_grouped(
    weight: Tensor,
    upper: Tensor,
    groups: Sequence[slice],
    fit: FitGroup[G],
    order: Tensor,
    protected: Tensor | None = None,
) -> Sweep[G]:
    """Sweep group by group in another order, each grid fitted when its group is reached.

    `order` int64 `[in]`: whole groups one after the other, columns inside a group in any order (`group_order`);
    `upper` is the factor for that order. `fit` is handed a group's columns in their original order.
    Raises ValueError if `order` leaves a group before it is done.
    """
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    spans = [(int(position[g].min()), int(position[g].max()) + 1) for g in groups]
    if any(stop - start != g.stop - g.start for (start, stop), g in zip(spans, groups, strict=True)):
        raise ValueError("the order of the columns leaves a group before it is done; keep each group together")
    reached = sorted(range(len(groups)), key=lambda k: spans[k])

    def fit_reached(i: int, columns: Tensor) -> G:
        k = reached[i]
        return fit(k, columns[:, position[groups[k]] - spans[k][0]])

    kept = None if protected is None else protected[:, order]
    swept = sweep(weight[:, order], upper, [slice(*spans[k]) for k in reached], fit_reached, kept)
    grids = tuple(swept.grids[reached.index(k)] for k in range(len(groups)))
    return in_original_order(swept, grids, order)


def in_original_order(swept: Sweep[G], grids: tuple[G, ...], order: Tensor) -> Sweep[G]:
    """Undo the column order of a sweep over `weight[:, order]`; `grids` are in the caller's order."""

    def restore(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor).index_copy_(1, order, tensor)

    remainder = None if swept.remainder is None else restore(swept.remainder)
    compensated = None if swept.compensated is None else restore(swept.compensated)
    return Sweep(restore(swept.codes), restore(swept.weight), grids, swept.loss, remainder, compensated)
