"""Quilt: the best this library knows for a given size. No publication: ingredients kept because they measured better.

Without gradients (`effort="fast"`), per layer, in the order in which a block computes:
1. the target is not the weight but the weight that repairs what earlier layers did to the layer's input and to the
   residual stream it writes into (`solvers.target`; after arXiv 2504.02692, the stream is ours);
2. columns are swept group by group, the groups with the largest inputs first (group-aware order: nothing to store);
3. each group's range is searched when it is reached, at 1 and 2 bits on levels symmetric around zero, which store no
   zero, above with the zeros beside the nearest;
4. coordinate descent over the codes after the sweep (`solvers.descent`).
With gradients (`effort="normal"`, `"best"`: `recipes.effort`), from the result of 1 to 4, offsets and scales.
docs/benchmarks.md has what each of them is worth.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bitquilt.core.budget import Budget
from bitquilt.core.recipe import Needs, PlanTerms
from bitquilt.core.types import Cost, Layer, LayerPlan, Layout, Solution, group_slices, uniform_plan
from bitquilt.layer.assembly import assemble, disassemble
from bitquilt.layer.grids.uniform import RangeSearch, UniformGrid, fit
from bitquilt.layer.grouped_weight import FitColumns, live_weight
from bitquilt.layer.hessian import Factor
from bitquilt.layer.layouts import WIDTHS_FROM_ONE, grouped_layout
from bitquilt.layer.nearest import COARSE, round_groups
from bitquilt.recipes.shared.effort import Effort
from bitquilt.recipes.shared.feedback import Feedback
from bitquilt.train.problem import Rule, Values
from bitquilt.train.rounding import Rounding

# tau 0.4 .. 1.1 in steps of 0.02: half the default's candidates, because each is tried with three zeros
_TAUS = tuple(round(0.4 + 0.02 * i, 2) for i in range(36))


@dataclass(frozen=True)
class Quilt(Feedback, Effort[Rounding]):
    """`alpha`, `stream_alpha`: share of the earlier error that a layer repairs, at its input and in the stream.
    `levels`: "auto" = symmetric at 1 and 2 bits, "symmetric" everywhere, "zero" from 2 bits on. `passes`: of coordinate
    descent. `effort` and the rest of training: `recipes.effort`."""

    name: ClassVar[str] = "quilt"

    bits: int = 2
    group_size: int = 64
    alpha: float = 0.75
    stream_alpha: float = 0.75
    group_order: bool = True
    levels: Literal["auto", "symmetric", "zero"] = "auto"
    passes: int = 3

    @property
    def needs(self) -> Needs:
        """What the sweep reads, and the block's outputs for training."""
        return replace(super().needs, full_outputs=self.effort != "fast")

    @property
    def plan_terms(self) -> PlanTerms:
        """Column groups at the recipe's bits."""
        return PlanTerms(self.group_size, Budget("bits", self.bits))

    def check(self) -> None:
        """Raise ValueError naming the field that cannot work."""
        self.check_sweep()
        self.check_effort()

    def measure(self, layer: Layer, prepared: Factor) -> Cost:
        """One way to spend the bits."""
        return Cost((uniform_plan(layer.weight.shape[1], self.bits, self.group_size),), (0.0,))

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """The same bits everywhere."""
        return cost.plans[0]

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Factor) -> Solution:
        """Solve the layer. Raises ValueError naming the layer if a weight is NaN or Inf."""
        return self.swept(layer, plan, prepared, self._fitter)

    def _fitter(self, original: Tensor, factor: Factor) -> FitColumns:
        def fit_group(columns: slice, weight: Tensor, bits: int, scale_dtype: torch.dtype) -> UniformGrid:
            search, symmetric = RangeSearch(_TAUS, zeros=True), bits in self._symmetric()
            weights = factor.importance[columns]
            return fit(weight, bits, weights, search=search, symmetric=symmetric, scale_dtype=scale_dtype)

        return fit_group

    def widths(self, out_features: int) -> tuple[int, ...]:
        """1 to 8 bits: where layers share a budget of 2.25 bits, groups of one bit take a third off the KL."""
        return WIDTHS_FROM_ONE

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """What a plan stores."""
        return grouped_layout(out_features, in_features, plan.bits, plan.group_size, symmetric=self._symmetric())

    def rounded(self, layer: Layer, prepared: Factor, bits: int) -> Tensor:
        """Every group at `bits`, fitted as the sweep fits it with fewer candidates."""
        weight = live_weight(layer, prepared)
        symmetric = bits in self._symmetric()
        return round_groups(weight, bits, self.group_size, prepared.importance, COARSE, symmetric)

    def _symmetric(self) -> tuple[int, ...]:
        """The widths that store no zero."""
        return {"auto": (1, 2), "symmetric": WIDTHS_FROM_ONE, "zero": (1,)}[self.levels]

    def part_of(self, solution: Solution, plan: LayerPlan, rounding: Rule, scaling: Rule) -> Rounding:
        """Offsets and scales of its groups."""
        layout = solution.weight.layout
        groups = group_slices(layout.in_features, plan.group_size)
        swept = disassemble(solution.weight, plan, solution.details["aim"])
        return Rounding.of(swept, groups, layout.segments[0][0].scale_dtype, rounding, scaling)

    def solution_of(self, part: Rounding, values: Values, plan: LayerPlan) -> Solution:
        """The layer with these values."""
        swept = part.export(values)
        return Solution(assemble(swept, plan), None, (), {"aim": swept.aim})
