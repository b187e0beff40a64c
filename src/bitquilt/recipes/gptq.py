"""GPTQ (Frantar et al., arXiv 2210.17323): column by column, later columns repair the rounding of earlier ones.

Group-wise asymmetric grids, one scale and zero per row and group, fitted when the sweep reaches the group (static,
before the sweep, with act_order). Deviations: scales are rounded to storage precision before codes are chosen; the
range passes through zero; a Hessian that float32 cannot factor is tried in float64 before the damp is raised.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bitquilt.grids.uniform import MIN_MAX, RangeSearch, UniformGrid, fit
from bitquilt.hessian import Factor, factorize
from bitquilt.solvers.solve import solve
from bitquilt.types import Cost, Layer, LayerPlan, LayerStats, Solution, uniform_plan


@dataclass(frozen=True)
class GPTQ:
    """`scale_search`: search each range (tau in 0.4 .. 1.1) instead of min-max, errors weighed as `weighting` says:
    "column" = by 1 / U_jj^2, what the error of a column costs the sweep; "none" = plain squared error.
    `act_order`: columns in descending Hessian diagonal. `hessian`: of the layer's input, or "attention": of its errors'
    effect on the output of its sub-block (see `sensitivity.attention`)."""

    name: ClassVar[str] = "gptq"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    bits: int = 4
    group_size: int = 128
    damp: float = 0.01
    act_order: bool = False
    scale_search: bool = False
    weighting: Literal["column", "none"] = "column"
    hessian: Literal["input", "attention"] = "input"

    def prepare(self, stats: LayerStats | None) -> Factor:
        """Factor the Hessian once for all layers that read this input."""
        assert stats is not None
        return factorize(stats.hessian / stats.tokens, self.damp)

    def measure(self, layer: Layer, prepared: Factor) -> Cost:
        """One way to spend the bits."""
        return Cost((uniform_plan(layer.weight.shape[1], self.bits, self.group_size),), (0.0,))

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """The same bits everywhere."""
        return cost.plans[0]

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Factor) -> Solution:
        """Sweep the layer. Raises ValueError naming the layer if a weight is NaN or Inf."""
        search = RangeSearch() if self.scale_search else MIN_MAX
        importance = prepared.importance if self.weighting == "column" else None

        def fit_group(columns: slice, weight: Tensor, bits: int, scale_dtype: torch.dtype) -> UniformGrid:
            weights = None if importance is None else importance[columns]
            return fit(weight, bits, weights, search=search, scale_dtype=scale_dtype)

        return solve(layer, plan, prepared, fit_group, damp=self.damp, act_order=self.act_order)
