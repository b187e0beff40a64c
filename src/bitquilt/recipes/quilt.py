"""Quilt: the lowest loss at a given size that this library knows. No publication; each ingredient was measured.

Without gradients (`effort="fast"`), per layer, in the order in which a block computes:
1. the target is the weight that repairs what earlier layers did to the layer's input and to the residual stream that
   it writes to (`layer.target`; after arXiv 2504.02692, the stream is ours);
2. columns are swept group by group, the groups with the largest inputs first, which stores nothing;
3. each group's range is searched when its group is reached. Groups of 1 and 2 bits have levels symmetric around zero
   and store no zero; wider groups try the neighbouring zeros too;
4. coordinate descent over the codes follows the sweep (`layer.descent`).
With gradients (`effort="normal"` and `"best"`), offsets and scales are trained from that result (`shared.effort`).

What each ingredient is worth: docs/lab/quilt.md. 2 bits, groups of 32, stories260k: KL 1.030; without the target 1.595,
columns in their own order 1.048, integer zeros 1.105, without descent 1.091.
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
    group_slices,
    uniform_plan,
)
from bitquilt.layer.assembly import assemble, disassemble
from bitquilt.layer.grids.blocks import BLOCK_WIDTHS, UnitFit, block_layout, block_values, check_blocks, run_plan
from bitquilt.layer.grids.uniform import RangeSearch, ZeroRule, zeros_at
from bitquilt.layer.grouped_weight import FeedbackSweep, fit_ranges, live_weight
from bitquilt.layer.hessian import Factor
from bitquilt.layer.layouts import GROUP_WIDTHS, WIDTHS_FROM_ONE, grouped_layout
from bitquilt.layer.nearest import COARSE, round_groups
from bitquilt.recipes.shared.effort import Effort, EffortTraining
from bitquilt.recipes.shared.traits import Traits, check_whole_bits
from bitquilt.train.problem import KeptEpoch, Rule, Values
from bitquilt.train.rounding import Rounding

# tau 0.4 .. 1.1 in steps of 0.02: half the default's candidates, because each is tried with three zeros
_SEARCH = RangeSearch(tuple(round(0.4 + 0.02 * i, 2) for i in range(36)), zeros=True)
# Widths that store no zero: 7 % less KL at 2 bits on stories260k, 10 % more at 3 bits on babyllama.
_SYMMETRIC = (1, 2)
_REACH = 0.5  # steps that training can move a weight in a block: to the neighbouring code


@dataclass(frozen=True)
class Quilt:
    """Options of Quilt. KL figures: 2 bits, groups of 32, stories260k (docs/lab/quilt.md).

    `bits`: width of every code, 2 to 8, where no budget for the whole model is given.
    `group_size`: input columns that share a scale and a zero.
    `damp`: added to the Hessian's diagonal, as a share of its mean; 0.01 as in GPTQ.
    `alpha`, `stream_alpha`: share of the error of earlier layers, at the layer's input and in the residual stream,
    that the layer repairs. 0.75 each: KL 1.030; 0.5 each 1.039, 1 each 1.078, 0 each 1.595.
    `passes`: coordinate descent over the codes after the sweep. 3 passes: KL 1.030; none 1.091.
    `zeros`: "stored" gives groups of 2 bits an integer zero too, "middle" fixes every zero at half the range, for
    engines that hold no others; "blocks" solves on llama.cpp's block types (docs/engines.md).
    `effort`: "fast" = no training, KL 1.030 in 8 s; "normal" = each block is trained, 0.765 in 48 s; "best" = then the
    whole model, 0.730, and with 192 sequences that the model writes itself 0.447 (without block training).
    `epochs`: passes over the samples per block. 20: KL 0.765; 10 0.766; 4 0.813. With "best", 0 skips blocks: 0.701.
    `tune_epochs`: passes through the whole model with "best"; time is proportional to it.
    `tune_rate`: AdamW's rate for offsets in the whole model. 0.02: KL 0.730; 0, which keeps all codes, 0.673.
    `kept_epoch`: "best" keeps the epoch that is best on held-out samples; "last" trains on all samples and keeps the
    last epoch: 0.118 instead of 0.127 on babyllama at 2.25 bits per weight.
    `autocast`: products in bfloat16 while training; a step takes 2.1 s instead of 3.6 s on a 1.1B Llama block.
    """

    name: ClassVar[str] = "quilt"
    traits: ClassVar[Traits] = Traits(why_not_clipped="trains scales and rounding: effort=normal")

    bits: int = 2
    group_size: int = 64
    damp: float = 0.01
    alpha: float = 0.75
    stream_alpha: float = 0.75
    passes: int = 3
    zeros: ZeroRule = "fitted"
    effort: Effort = EffortTraining.effort
    epochs: int = EffortTraining.epochs
    tune_epochs: int = EffortTraining.tune_epochs
    tune_rate: float = EffortTraining.tune_rate
    kept_epoch: KeptEpoch = EffortTraining.kept_epoch
    autocast: bool = EffortTraining.autocast

    @property
    def sweep(self) -> FeedbackSweep:
        """The sweep that the options ask for."""
        return FeedbackSweep.of(self, group_order=True)

    @property
    def effort_training(self) -> EffortTraining[Rounding]:
        """The training that the options ask for."""
        return EffortTraining.of(self, _REACH, _part_of, _solution_of)

    @property
    def needs(self) -> Needs:
        """The sweep's needs, and the block's outputs for training."""
        return replace(self.sweep.needs, full_outputs=self.effort != "fast")

    @property
    def plan_terms(self) -> PlanTerms:
        """Column groups at the recipe's bits."""
        return PlanTerms(self.group_size, Budget("bits", self.bits), zeros=self.zeros)

    def check(self) -> None:
        """Raise ValueError naming the option that cannot work."""
        check_whole_bits(self.bits)
        self.sweep.check()
        self.effort_training.check()
        check_blocks(self.zeros, self.group_size, self.effort != "fast")

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
        """Solve the layer. Raises ValueError naming the layer if a weight is NaN or Inf."""
        if self.zeros == "blocks":
            kind, plan = run_plan(plan, layer.weight.shape[1])
            return self.sweep.solve(layer, plan, prepared, lambda f: UnitFit(live_weight(layer, f), kind, f.importance))
        search = zeros_at(_SEARCH, self.zeros)
        return self.sweep.solve(layer, plan, prepared, lambda f: fit_ranges(f.importance, search, self._no_zero))

    @property
    def training(self) -> Training:
        """The training that `effort` asks for."""
        return self.effort_training.steps

    def widths(self, out_features: int) -> tuple[int, ...]:
        """1 to 8 bits: when layers share a budget of 2.25 bits, groups of one bit take a third off the KL."""
        if self.zeros == "blocks":
            return BLOCK_WIDTHS
        return WIDTHS_FROM_ONE if self.zeros == "fitted" else GROUP_WIDTHS

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """The layout in which `quantize` stores a plan."""
        if self.zeros == "blocks":
            return block_layout(out_features, in_features, plan)
        return grouped_layout(out_features, in_features, plan.bits, plan.group_size, symmetric=self._no_zero)

    @property
    def _no_zero(self) -> tuple[int, ...]:
        """Widths that store no zero."""
        return _SYMMETRIC if self.zeros == "fitted" else (1,)

    def rounded(self, layer: Layer, prepared: Factor, bits: int) -> Tensor:
        """The weight with every group at `bits`, fitted as in the sweep with fewer candidates."""
        weight = live_weight(layer, prepared)
        if self.zeros == "blocks":
            return block_values(weight, bits, prepared.importance)
        search = zeros_at(COARSE, self.zeros)
        return round_groups(weight, bits, self.group_size, prepared.importance, search, bits in self._no_zero)

    def column_cost(self, layer: Layer, prepared: Factor) -> Tensor:
        """1 / U_jj^2: later columns compensate."""
        return prepared.importance


def _part_of(solution: Solution, plan: LayerPlan, rounding: Rule, scaling: Rule) -> Rounding:
    """Offsets of the weights and scales of the groups."""
    layout = solution.weight.layout
    groups = group_slices(layout.in_features, plan.group_size)
    swept = disassemble(solution.weight, plan, solution.details["aim"])
    return Rounding.of(swept, groups, layout.segments[0][0].scale_dtype, rounding, scaling)


def _solution_of(part: Rounding, values: Values, plan: LayerPlan) -> Solution:
    """The layer with trained values."""
    swept = part.export(values)
    return Solution(assemble(swept, plan), None, (), {"aim": swept.aim})
