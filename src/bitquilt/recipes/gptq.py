"""GPTQ (Frantar et al., arXiv 2210.17323): column by column, later columns repair the rounding of earlier ones.

Group-wise asymmetric grids with one scale and zero per row and group, fitted when the sweep reaches the group (with
act_order before the sweep). Deviations: scales are rounded to storage precision before codes are chosen; the range
passes through zero; a Hessian that float32 cannot factor is tried in float64 before the damp is raised.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

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
    uniform_plan,
)
from bitquilt.layer.grids.blocks import BLOCK_WIDTHS, UnitFit, block_layout, block_values, check_blocks, run_plan
from bitquilt.layer.grids.uniform import MIN_MAX, RangeSearch, ZeroRule, zeros_at
from bitquilt.layer.grouped_weight import FeedbackSweep, HessianAt, fit_ranges, live_weight
from bitquilt.layer.hessian import Factor
from bitquilt.layer.layouts import GROUP_WIDTHS, WIDTHS_FROM_ONE, grouped_layout
from bitquilt.layer.nearest import COARSE, round_groups
from bitquilt.recipes.shared.clipping import ClippingMode, clipping_training
from bitquilt.recipes.shared.traits import Traits, check_whole_bits


@dataclass(frozen=True)
class GPTQ:
    """Options of GPTQ. KL figures: 2 bits, groups of 32, stories260k and babyllama unless said (docs/results.md).

    `bits`: width of every code, 2 to 8.
    `group_size`: input columns that share a scale and a zero.
    `damp`: added to the Hessian's diagonal, as a share of its mean; 0.01 as published.
    `act_order`: sweep columns in descending Hessian diagonal, with grids fitted before the sweep, as published.
    `group_order`: sweep whole groups in descending Hessian diagonal, each grid fitted when its group is reached; takes
    2 % off the KL of `quilt`. Not together with `act_order`.
    `scale_search`: search each range (tau in 0.4 .. 1.1), errors weighted by their cost to the sweep, instead of
    taking min and max: KL 3.542 to 2.003 and 0.711 to 0.514.
    `symmetric`: store no zeros; 0.06 bits per weight fewer at 2 bits, 10 % more KL at 3 bits.
    `alpha`, `stream_alpha`: share of the error of earlier layers, at the layer's input and in the residual stream,
    that the layer repairs (`layer.target`). Above 0, the full-precision model runs alongside the quantized one. In
    `quilt`, 0.75 each takes the KL from 1.595 to 1.030 and 0.347 to 0.202.
    `passes`: coordinate descent over the codes after the sweep; 3 passes take 6 % off the KL of `quilt`.
    `error_outliers`, `act_outliers`: shares of the weights kept in half precision in addition to the codes, by
    rounding error and by contribution to the output. In `cmpq` on the demo model 0.5 % takes 9 % off the KL.
    `hessian`: "input", or "attention": that of the output of the layer's sub-block (`layer.sensitivity.attention`), for
    half as much time again. With scale search: KL 0.513 to 0.465 on babyllama, 1.964 to 1.976 on stories260k. Not
    together with alpha or stream_alpha.
    `zeros`: "middle" fixes every zero at half the range, for engines that store none; "blocks" solves on
    llama.cpp's block types (docs/engines.md).
    `clipping`: "trained" trains the ranges of each block after the sweep; codes and bytes stay. With scale search, KL
    2.003 to 1.508 and 0.513 to 0.329.
    """

    name: ClassVar[str] = "gptq"
    traits: ClassVar[Traits] = Traits()

    bits: int = 4
    group_size: int = 128
    damp: float = 0.01
    act_order: bool = False
    group_order: bool = False
    scale_search: bool = False
    symmetric: bool = False
    alpha: float = 0.0
    stream_alpha: float = 0.0
    passes: int = 0
    error_outliers: float = 0.0
    act_outliers: float = 0.0
    hessian: HessianAt = "input"
    zeros: ZeroRule = "fitted"
    clipping: ClippingMode = "solved"

    @property
    def sweep(self) -> FeedbackSweep:
        """The sweep that the options ask for."""
        return FeedbackSweep.of(self)

    @property
    def needs(self) -> Needs:
        """The sweep's needs, and the block's outputs if clipping is trained."""
        return replace(self.sweep.needs, full_outputs=self.clipping == "trained")

    @property
    def plan_terms(self) -> PlanTerms:
        """Column groups at the recipe's bits."""
        own = Budget("bits", self.bits)
        return PlanTerms(self.group_size, own, searches_ranges=self.scale_search, zeros=self.zeros)

    def check(self) -> None:
        """Raise ValueError naming the option that cannot work."""
        check_whole_bits(self.bits)
        if self.symmetric and self.zeros != "fitted":
            raise ValueError(f"symmetric stores no zeros, and zeros is {self.zeros}; leave one of them out")
        self.sweep.check()
        check_blocks(self.zeros, self.group_size, self.clipping == "trained")

    def prepare(self, stats: LayerStats | None) -> Factor:
        """Factor the Hessian once for all layers that read this input."""
        return self.sweep.prepare(stats)

    def measure(self, layer: Layer, prepared: Factor) -> Cost:
        """The only plan: uniform bits."""
        return Cost((uniform_plan(layer.weight.shape[1], self.bits, self.group_size),), (0.0,))

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """The only plan."""
        return cost.plans[0]

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Factor) -> Solution:
        """Sweep the layer. Raises ValueError naming the layer if a weight is NaN or Inf."""
        if self.zeros == "blocks":
            kind, plan = run_plan(plan, layer.weight.shape[1])
            return self.sweep.solve(layer, plan, prepared, lambda f: UnitFit(live_weight(layer, f), kind, f.importance))
        search = zeros_at(RangeSearch() if self.scale_search else MIN_MAX, self.zeros)
        return self.sweep.solve(layer, plan, prepared, lambda f: fit_ranges(f.importance, search, self._no_zero))

    @property
    def training(self) -> Training:
        """Trained clipping on request."""
        return clipping_training(self.clipping)

    def widths(self, out_features: int) -> tuple[int, ...]:
        """2 to 8 bits."""
        return BLOCK_WIDTHS if self.zeros == "blocks" else GROUP_WIDTHS

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """The layout in which `quantize` stores a plan."""
        count = self.sweep.outlier_count(out_features, in_features)
        if self.zeros == "blocks":
            return replace(block_layout(out_features, in_features, plan), outliers=count)
        return grouped_layout(
            out_features, in_features, plan.bits, plan.group_size, symmetric=self._no_zero, outliers=count
        )

    @property
    def _no_zero(self) -> tuple[int, ...]:
        """Widths that store no zero."""
        return WIDTHS_FROM_ONE if self.symmetric else (1,)

    def rounded(self, layer: Layer, prepared: Factor, bits: int) -> Tensor:
        """The weight with every group at `bits`, errors weighted as in the sweep."""
        weight = live_weight(layer, prepared)
        if self.zeros == "blocks":
            return block_values(weight, bits, prepared.importance)
        search = zeros_at(COARSE if self.scale_search else MIN_MAX, self.zeros)
        return round_groups(weight, bits, self.group_size, prepared.importance, search, self.symmetric)

    def column_cost(self, layer: Layer, prepared: Factor) -> Tensor:
        """1 / U_jj^2: later columns compensate."""
        return prepared.importance
