"""Round to nearest: every weight takes the closest level of its group's min-max grid. No calibration.

The baseline that every method has to beat at the same bytes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitquilt.core.budget import Budget
from bitquilt.core.recipe import Needs, PlanTerms
from bitquilt.core.training import Training
from bitquilt.core.types import (
    Cost,
    Layer,
    LayerPlan,
    LayerStats,
    Layout,
    Solution,
    check_finite,
    group_slices,
    uniform_plan,
)
from bitquilt.layer.assembly import assemble
from bitquilt.layer.grids.blocks import BLOCK_WIDTHS, block_layout, block_values, check_blocks, round_blocks, run_plan
from bitquilt.layer.grids.uniform import MIN_MAX, RangeSearch, UniformGrid, ZeroRule, fit, scale_dtype_for, zeros_at
from bitquilt.layer.grouped_weight import layer_events
from bitquilt.layer.layouts import GROUP_WIDTHS, check_group_size, grouped_layout
from bitquilt.layer.nearest import COARSE, round_groups, round_to_nearest
from bitquilt.recipes.shared.clipping import ClippingMode, clipping_training
from bitquilt.recipes.shared.traits import Traits, check_whole_bits


@dataclass(frozen=True)
class RTN:
    """Options of round to nearest.

    `bits`: width of every code, 2 to 8.
    `group_size`: input columns that share a scale and a zero.
    `scale_search`: choose each range by its squared error instead of taking min and max.
    `zeros`: "middle" fixes every zero at half the range, for engines that store none; "blocks" rounds to
    llama.cpp's block types (docs/engines.md).
    `clipping`: "trained" trains the ranges of each block after rounding; codes and bytes stay. At 2 bits it takes the
    KL divergence on stories260k from 4.343 to 2.464, on babyllama from 1.544 to 0.764 (docs/results.md).
    """

    name: ClassVar[str] = "rtn"
    traits: ClassVar[Traits] = Traits()

    bits: int = 4
    group_size: int = 128
    scale_search: bool = False
    zeros: ZeroRule = "fitted"
    clipping: ClippingMode = "solved"

    @property
    def needs(self) -> Needs:
        """Nothing, except the block's outputs if clipping is trained."""
        return Needs(full_outputs=self.clipping == "trained")

    @property
    def plan_terms(self) -> PlanTerms:
        """Column groups at the recipe's bits."""
        own = Budget("bits", self.bits)
        return PlanTerms(self.group_size, own, searches_ranges=self.scale_search, zeros=self.zeros)

    def check(self) -> None:
        """Raise ValueError naming the option that cannot work."""
        check_whole_bits(self.bits)
        check_group_size(self.group_size)
        check_blocks(self.zeros, self.group_size, self.clipping == "trained")

    def prepare(self, stats: LayerStats | None) -> None:
        """Layers share nothing: rounding does not look at data."""

    def measure(self, layer: Layer, prepared: None) -> Cost:
        """The only plan: uniform bits."""
        return Cost((uniform_plan(layer.weight.shape[1], self.bits, self.group_size),), (0.0,))

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """The only plan."""
        return cost.plans[0]

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: None) -> Solution:
        """Round the layer. Raises ValueError naming the layer if a weight is NaN or Inf."""
        check_finite(layer.name, weight=layer.weight)
        scale_dtype = scale_dtype_for(layer.weight)
        if self.zeros == "blocks":
            kind, _ = run_plan(plan, layer.weight.shape[1])
            return Solution(round_blocks(layer.weight, kind), None, layer_events(layer, torch.float16))
        search = zeros_at(RangeSearch() if self.scale_search else MIN_MAX, self.zeros)

        def fit_group(k: int, columns: Tensor) -> UniformGrid:
            return fit(columns, plan.bits[k], search=search, scale_dtype=scale_dtype)

        groups = group_slices(layer.weight.shape[1], plan.group_size)
        rounded = round_to_nearest(layer.weight, groups, fit_group)
        return Solution(assemble(rounded, plan), None, layer_events(layer, scale_dtype))

    @property
    def training(self) -> Training:
        """Trained clipping on request."""
        return clipping_training(self.clipping)

    def widths(self, out_features: int) -> tuple[int, ...]:
        """2 to 8 bits."""
        return BLOCK_WIDTHS if self.zeros == "blocks" else GROUP_WIDTHS

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """The layout in which `quantize` stores a plan."""
        if self.zeros == "blocks":
            return block_layout(out_features, in_features, plan)
        return grouped_layout(out_features, in_features, plan.bits, plan.group_size)

    def rounded(self, layer: Layer, prepared: None, bits: int) -> Tensor:
        """The weight with every group at `bits`."""
        if self.zeros == "blocks":
            return block_values(layer.weight, bits)
        search = zeros_at(COARSE if self.scale_search else MIN_MAX, self.zeros)
        return round_groups(layer.weight, bits, self.group_size, search=search)

    def column_cost(self, layer: Layer, prepared: None) -> Tensor:
        """E[x_j^2]: nothing compensates an error."""
        assert layer.stats is not None
        return layer.stats.hessian.diagonal() / layer.stats.tokens
