"""`FeedbackSweep`: the GPTQ sweep of `gptq`, `slim-llm` and `quilt`, on a target that repairs earlier layers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from bitquilt.core.recipe import Needs
from bitquilt.core.types import Layer, LayerPlan, LayerStats, Solution
from bitquilt.layer.grouped_weight import (
    FitColumns,
    check_protection,
    live_weight,
    protect,
    protected_count,
    solve,
    unprotected_event,
)
from bitquilt.layer.hessian import Factor
from bitquilt.layer.target import check_feedback, corrected, layer_factor
from bitquilt.recipes.shared.traits import check_damp, check_group_size

HessianAt = Literal["input", "attention"]


@dataclass(frozen=True, kw_only=True)
class FeedbackSweep:
    """The sweep that a recipe's options ask for; `GPTQ` explains each of them."""

    group_size: int
    damp: float
    alpha: float
    stream_alpha: float
    passes: int
    group_order: bool
    act_order: bool = False
    error_outliers: float = 0.0
    act_outliers: float = 0.0
    hessian: HessianAt = "input"

    @property
    def needs(self) -> Needs:
        """The Hessian, and the drift of the inputs if the target repairs earlier layers."""
        return Needs(
            hessian=True,
            drift=bool(self.alpha or self.stream_alpha),
            stream_drift=bool(self.stream_alpha),
            output_hessian=self.hessian == "attention",
        )

    def check(self) -> None:
        """Raise ValueError naming the option that cannot work."""
        check_damp(self.damp)
        check_group_size(self.group_size)
        check_feedback(self.alpha, self.stream_alpha, self.passes, self.hessian)
        check_protection(self.passes, error_outliers=self.error_outliers, act_outliers=self.act_outliers)
        if self.act_order and self.group_order:
            raise ValueError("act_order and group_order are two orders of the columns; wanted one of them")

    def prepare(self, stats: LayerStats | None) -> Factor:
        """Factor the Hessian once for all layers that read one input."""
        assert stats is not None
        return layer_factor(stats, self.damp, self.group_size if self.group_order else None)

    def outlier_count(self, out_features: int, in_features: int) -> int:
        """Weights of a layer that are kept in half precision."""
        return protected_count((out_features, in_features), self.act_outliers, self.error_outliers)

    def solve(
        self, layer: Layer, plan: LayerPlan, prepared: Factor, fitter: Callable[[Tensor, Factor], FitColumns]
    ) -> Solution:
        """Solve the layer with the grids of `fitter(live weight, factor)`.

        Raises ValueError naming the layer if a weight is NaN or Inf.
        """
        assert layer.stats is not None
        if self.group_order and plan.group_size != self.group_size:  # a plan made with other groups
            prepared = layer_factor(layer.stats, self.damp, plan.group_size)
        layer, events = corrected(layer, prepared, self.alpha, self.stream_alpha)
        fit, shares = fitter(live_weight(layer, prepared), prepared), (self.act_outliers, self.error_outliers)
        protected = protect(layer, plan, prepared, fit, *shares)
        solution = solve(
            layer,
            plan,
            prepared,
            fit,
            damp=self.damp,
            act_order=self.act_order,
            protected=protected,
            passes=self.passes,
        )
        unprotected = unprotected_event(layer.name, layer.weight, *shares)
        return replace(solution, events=(*events, *solution.events, *unprotected))
