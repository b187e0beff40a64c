"""GPTQ (Frantar et al., arXiv 2210.17323): column by column, later columns repair the rounding of earlier ones.

Group-wise asymmetric grids, one scale and zero per row and group, fitted when the sweep reaches the group (static,
before the sweep, with act_order). Deviations: scales are rounded to storage precision before codes are chosen; the
range passes through zero; a Hessian that float32 cannot factor is tried in float64 before the damp is raised.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bitquilt.core.budget import Budget
from bitquilt.core.recipe import Needs, PlanTerms
from bitquilt.core.types import Cost, Layer, LayerPlan, Layout, Solution, uniform_plan
from bitquilt.layer.grids.uniform import MIN_MAX, RangeSearch, UniformGrid, fit
from bitquilt.layer.grouped_weight import FitColumns, check_protection, live_weight, protected_count
from bitquilt.layer.hessian import Factor
from bitquilt.layer.layouts import GROUP_WIDTHS, WIDTHS_FROM_ONE, grouped_layout
from bitquilt.layer.nearest import COARSE, round_groups
from bitquilt.recipes.shared.clipping import TrainedClipping
from bitquilt.recipes.shared.feedback import Feedback


@dataclass(frozen=True)
class GPTQ(TrainedClipping, Feedback):
    """`scale_search`: search each range (tau in 0.4 .. 1.1) instead of min-max, errors weighed as `weighting` says:
    "column" = by 1 / U_jj^2, what the error of a column costs the sweep; "none" = plain squared error.
    `act_order`: columns in descending Hessian diagonal, grids fitted before. `symmetric`: no zeros stored.
    `error_outliers`, `act_outliers`: shares of the weights kept in half precision beside the codes, as in `cmpq`.
    `hessian`: of the layer's input, or "attention": of its errors' effect on the output of its sub-block (see
    `sensitivity.attention`), not with an alpha. `alpha`, `stream_alpha`, `group_order`, `passes`, `damp`:
    `recipes.feedback`; `clipping` and the rest of its training: `recipes.clipping`."""

    name: ClassVar[str] = "gptq"

    bits: int = 4
    group_size: int = 128
    act_order: bool = False
    scale_search: bool = False
    weighting: Literal["column", "none"] = "column"
    symmetric: bool = False
    error_outliers: float = 0.0
    act_outliers: float = 0.0
    hessian: Literal["input", "attention"] = "input"

    @property
    def needs(self) -> Needs:
        """What the sweep reads, the block's outputs to train clipping, and the Hessian the recipe is set to."""
        return replace(super().needs, full_outputs=bool(self.train_batch), output_hessian=self.hessian == "attention")

    @property
    def plan_terms(self) -> PlanTerms:
        """Column groups at the recipe's bits."""
        return PlanTerms(self.group_size, Budget("bits", self.bits), searches_ranges=self.scale_search)

    def check(self) -> None:
        """Raise ValueError naming the field that cannot work."""
        super().check()
        self.check_sweep(self.hessian)
        check_protection(self.passes, error_outliers=self.error_outliers, act_outliers=self.act_outliers)
        if self.act_order and self.group_order:
            raise ValueError("act_order and group_order are two orders of the columns; wanted one of them")

    def measure(self, layer: Layer, prepared: Factor) -> Cost:
        """One way to spend the bits."""
        return Cost((uniform_plan(layer.weight.shape[1], self.bits, self.group_size),), (0.0,))

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """The same bits everywhere."""
        return cost.plans[0]

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Factor) -> Solution:
        """Sweep the layer. Raises ValueError naming the layer if a weight is NaN or Inf."""
        outliers = (self.act_outliers, self.error_outliers)
        return self.swept(layer, plan, prepared, self._fitter, act_order=self.act_order, outliers=outliers)

    def _fitter(self, original: Tensor, factor: Factor) -> FitColumns:
        search = RangeSearch() if self.scale_search else MIN_MAX
        importance = factor.importance if self.weighting == "column" else None

        def fit_group(columns: slice, weight: Tensor, bits: int, scale_dtype: torch.dtype) -> UniformGrid:
            weights = None if importance is None else importance[columns]
            return fit(weight, bits, weights, search=search, symmetric=self.symmetric, scale_dtype=scale_dtype)

        return fit_group

    def widths(self, out_features: int) -> tuple[int, ...]:
        """2 to 8 bits."""
        return GROUP_WIDTHS

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """What a plan stores."""
        symmetric = WIDTHS_FROM_ONE if self.symmetric else (1,)
        count = protected_count((out_features, in_features), self.act_outliers, self.error_outliers)
        return grouped_layout(
            out_features, in_features, plan.bits, plan.group_size, symmetric=symmetric, outliers=count
        )

    def rounded(self, layer: Layer, prepared: Factor, bits: int) -> Tensor:
        """Every group at `bits`, weighed as the sweep weighs it."""
        importance = prepared.importance if self.weighting == "column" else None
        search = COARSE if self.scale_search else MIN_MAX
        weight = live_weight(layer, prepared)
        return round_groups(weight, bits, self.group_size, importance, search, self.symmetric)
