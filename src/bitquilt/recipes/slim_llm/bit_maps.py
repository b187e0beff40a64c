"""Bit maps of one layer for SliM-LLM: `MapSearch.paired` is SBA's menu, `MapSearch.tabulated` the exact optimum.

`mean_within` turns a budget in true bits per weight into a width and a number of groups that get one bit more.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitquilt.allocation.double_pointer import pair_candidates, pairs, raised_map, spread_evenly, within_budget
from bitquilt.allocation.knapsack import best_bits
from bitquilt.core.packing import bits_per_weight
from bitquilt.core.types import Cost, Layer, LayerPlan, Layout, group_slices
from bitquilt.layer.sensitivity.output_divergence import Objective, pair_losses


@dataclass(frozen=True, eq=False)
class MapSearch:
    """A layer whose column groups share its bits: `bits` everywhere, one more for `raised` of the groups.

    `weight` `[out, in]`: what the candidates are compared with. `rounded(columns, bits)`: that part of it at `bits`,
    without compensation.
    """

    layer: Layer
    weight: Tensor
    group_size: int
    bits: int
    raised: int
    rounded: Callable[[slice, int], Tensor]

    @property
    def groups(self) -> list[slice]:
        """The layer's column groups."""
        return group_slices(self.weight.shape[1], self.group_size)

    def paired(self, ranking: list[float], objective: Objective, *, needs_pair: bool) -> Cost:
        """Plans from no pair to all groups paired in the order of `ranking`, the salience of the groups; each with its
        loss at the layer's output (arXiv 2405.14917, Eq. 4).

        `needs_pair`: leave out the maps with no pair and with all pairs, as the public code does, where others fit.
        """
        stats, groups = self.layer.stats, self.groups
        assert stats is not None
        assert stats.sample is not None
        start = raised_map(ranking, self.bits, self.raised)
        base = [self.rounded(group, width) for group, width in zip(groups, start, strict=True)]
        maps = pair_candidates(ranking, self.bits, start)
        changes = [
            (groups[k], self.rounded(groups[k], width) - base[k])
            for low, high in pairs(ranking)[: len(maps) - 1]
            for k, width in ((low, start[low] - 1), (high, start[high] + 1))
        ]
        whole = torch.cat(base, dim=1)
        losses = pair_losses(stats.sample, self.weight, self.layer.bias, whole, changes, objective).tolist()
        menu = list(zip([LayerPlan(bit_map, self.group_size) for bit_map in maps], losses, strict=True))
        if needs_pair:
            in_features = self.weight.shape[1]
            spent = sum((g.stop - g.start) * b for g, b in zip(groups, start, strict=True))
            inner = [item for item in menu[1:-1] if within_budget(item[0], in_features, spent / in_features)]
            menu = inner or menu[:1]
        return Cost(tuple(plan for plan, _ in menu), tuple(loss for _, loss in menu))

    def tabulated(self, importance: Tensor) -> Cost:
        """Uniform bits and the map of least summed error e_k(b) within the same bits, exact.

        e_k(b) = sum over group k of (w - q_b(w))^2 `importance` (1 / U_jj^2): what it adds to the sweep's loss.
        """
        groups, raised = self.groups, self.raised
        palette = tuple(b for b in range(self.bits - 1, self.bits + 2 + (raised > 0)) if b <= 8)
        table = [
            [float(((self.weight[:, g] - self.rounded(g, b)).square() @ importance[g]).sum()) for b in palette]
            for g in groups
        ]
        widths = [group.stop - group.start for group in groups]
        uniform = spread_evenly(len(groups), self.bits, raised)
        budget = sum(width * b for width, b in zip(widths, uniform, strict=True))
        maps = (uniform, best_bits(table, palette, widths, budget))
        losses = tuple(sum(row[palette.index(b)] for row, b in zip(table, bit_map, strict=True)) for bit_map in maps)
        return Cost(tuple(LayerPlan(bit_map, self.group_size) for bit_map in maps), losses)


def mean_within(
    bpw: float, shape: tuple[int, int], group_size: int, layout: Callable[[int, int, LayerPlan], Layout]
) -> tuple[int, int]:
    """Width N of the groups of a layer `[out, in]`, and the most groups that can have N + 1 within `bpw`.

    Raises ValueError if `bpw` is out of reach.
    """
    count = len(group_slices(shape[1], group_size))
    found = float("inf")
    for total in range(8 * count, 2 * count - 1, -1):
        bits, raised = divmod(total, count)
        # two widths and a map, whichever groups are raised in the end
        plan = LayerPlan(tuple(bits + (k < raised) for k in range(count)), group_size)
        found = min(found, size := bits_per_weight(layout(*shape, plan)))
        if size <= bpw:
            return bits, raised
    raise ValueError(f"bpw is {bpw}; this {shape[0]} x {shape[1]} layer reaches {found:.3f} and more")
