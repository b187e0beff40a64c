"""Swept groups to stored segments and back: `assemble` gathers groups of equal bits, `disassemble` takes them apart.

Groups of equal bits are stored side by side: as many segments as distinct widths, and one map of the groups.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from bitquilt.core.types import LayerPlan, Outliers, Permutation, QuantizedWeight, group_slices
from bitquilt.layer.gptq_sweep import Sweep
from bitquilt.layer.grids import GRID_CLASSES, Grid


def assemble(
    swept: Sweep[Grid], plan: LayerPlan, outliers: Outliers | None = None, row_gains: Tensor | None = None
) -> QuantizedWeight:
    """Sort the column groups by bits and cut segments; `row_gains` `[out]` as stored.

    Groups keep their order inside a segment. `outliers` are in the original order of the columns.
    """
    slices = group_slices(swept.codes.shape[1], plan.group_size)
    segments, order = [], []
    for groups in groups_by_bits(plan.bits).values():
        order += groups
        grids = [swept.grids[k] for k in groups]
        codes = torch.cat([swept.codes[:, slices[k]] for k in groups], dim=1)
        segments.append(type(grids[0]).segment(grids, codes, plan.group_size))
    return QuantizedWeight(tuple(segments), permutation_of(order, plan.group_size), outliers, row_gains)


def disassemble(weight: QuantizedWeight, plan: LayerPlan, compensated: Tensor) -> Sweep[Grid]:
    """Undo `assemble`: codes, grids and dense weight of the groups in their own order; the loss is NaN."""
    in_features = sum(segment.codes.shape[1] for segment in weight.segments)
    slices = group_slices(in_features, plan.group_size)
    first = weight.segments[0].codes
    codes = torch.empty(len(first), in_features, dtype=torch.uint8, device=first.device)
    dense = torch.empty(codes.shape, device=first.device)
    grids: dict[int, Grid] = {}
    for segment, groups in zip(weight.segments, groups_by_bits(plan.bits).values(), strict=True):
        start = 0
        for k in groups:
            columns = slice(start, start + slices[k].stop - slices[k].start)
            grids[k] = GRID_CLASSES[segment.format.grid].of_segment(segment, columns)
            codes[:, slices[k]] = segment.codes[:, columns]
            dense[:, slices[k]] = grids[k].decode(segment.codes[:, columns].float())
            start = columns.stop
    return Sweep(codes, dense, tuple(grids[k] for k in range(len(slices))), float("nan"), None, compensated)


def groups_by_bits(bits: Sequence[int]) -> dict[int, list[int]]:
    """The groups of each width in their order, narrow widths first."""
    members: dict[int, list[int]] = defaultdict(list)
    for k, width in enumerate(bits):
        members[width].append(k)
    return {width: members[width] for width in sorted(members)}


def permutation_of(order: Sequence[int], block: int) -> Permutation | None:
    """The stored order of blocks of `block` columns, None where they keep their places.

    A narrow last block may stand anywhere: `expand_permutation` knows its width by its index.
    """
    return Permutation(torch.tensor(order), block) if list(order) != sorted(order) else None
