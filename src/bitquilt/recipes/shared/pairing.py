"""What would each pairing of low- and high-bit groups cost? SBA's menu, as SliM-LLM and SliM-LLM+ share it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitquilt.allocation.double_pointer import pair_candidates, pairs
from bitquilt.core.types import Layer, LayerPlan
from bitquilt.layer.sensitivity.output_divergence import Objective, pair_losses

RoundGroup = Callable[[slice, int], Tensor]
"""(columns, bits) -> the group's weights rounded at these bits, without compensation."""


def paired_menu(
    layer: Layer,
    weight: Tensor,
    groups: Sequence[slice],
    ranking: list[float],
    rounded: RoundGroup,
    bits: int,
    start: Sequence[int],
    group_size: int,
    objective: Objective,
) -> list[tuple[LayerPlan, float]]:
    """Plans from the map `start` (every group at `bits`, some perhaps raised) to all groups paired, by the salience
    `ranking`, each with the loss at the layer's output (arXiv 2405.14917, Eq. 4). `weight` `[out, in]` is what the
    output is compared with."""
    assert layer.stats is not None
    assert layer.stats.sample is not None
    base = [rounded(group, width) for group, width in zip(groups, start, strict=True)]
    maps = pair_candidates(ranking, bits, start)
    changes = [
        (groups[k], rounded(groups[k], width) - base[k])
        for low, high in pairs(ranking)[: len(maps) - 1]
        for k, width in ((low, start[low] - 1), (high, start[high] + 1))
    ]
    losses = pair_losses(layer.stats.sample, weight, layer.bias, torch.cat(base, dim=1), changes, objective).tolist()
    return list(zip([LayerPlan(bit_map, group_size) for bit_map in maps], losses, strict=True))
