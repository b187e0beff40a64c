"""SliM-LLM+: the mixed bits of SliM-LLM, the clipping of each group trained (arXiv 2405.14917, second half).

1. bit map as SliM-LLM: salience of the column groups, pairs of N-1 and N+1 bits, p by KL at the layer's output;
2. per block, AdamW on the clipping logits of all groups (LWC, arXiv 2308.13137): the quantized block on the quantized
   model's inputs against the full-precision block on the full-precision inputs and, with `augmented`, on the same
   quantized inputs. No error feedback between columns.

Deviations from the publication (the first two undone by `bit_map="from_slim_llm"` and `one_bit="code"`):
- the map is made in the same run, ranked by w^2 / [H^-1]_jj: training has no order of the columns, so neither has it;
- one-bit groups keep their middle and start at the best two levels; the public code drops the mean, starts 48 % wide;
- ranges pass through zero, so that the zero fits its bits; scales have a relative floor instead of 1e-5;
- every layer is mixed (the public code leaves one of LLaMA's at N bits);
- the epoch with the least loss on held-out samples is kept, the start included; a loss that is not finite is an event.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bitquilt.allocation.double_pointer import cheapest_within
from bitquilt.grids.uniform import OneBitRule, RangeSearch, fit, scale_dtype_for, symmetric_widths
from bitquilt.hessian import Factor
from bitquilt.recipes.pairing import paired_menu
from bitquilt.sensitivity.divergence import Objective
from bitquilt.sensitivity.salience import SalienceRule, group_salience, salience
from bitquilt.solvers.blockwise import train
from bitquilt.solvers.layouts import WIDTHS_FROM_ONE, grouped_layout, round_groups
from bitquilt.solvers.solve import assemble, layer_events, live_weight
from bitquilt.solvers.target import layer_factor
from bitquilt.solvers.trainable import Clipping
from bitquilt.solvers.training import Link, Samples, Training
from bitquilt.types import (
    BlockProblem,
    Cost,
    Layer,
    LayerPlan,
    LayerStats,
    Layout,
    Solution,
    TrainedLayers,
    group_slices,
    uniform_plan,
)

_BINS = 50  # of the learned clipping factors in report.json, from 0 to 1


@dataclass(frozen=True)
class SlimLLMPlus:
    """`epochs`, `rate`, `batch`, `augmented`, `initial` (the logit training starts from: a factor of 0.982) are the
    publication's. `allocation`: "uniform" = N bits everywhere, the baseline that is trained alike; "global" = groups of
    the whole model share one budget, which needs a plan (`bitquilt.quantize` makes it). `patience`: epochs without a
    gain on held-out samples before a block stops."""

    name: ClassVar[str] = "slim-llm+"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "sample", "full"})

    bits: int = 2
    group_size: int = 128
    damp: float = 0.01
    bit_map: Literal["own", "from_slim_llm"] = "own"
    allocation: Literal["sba", "uniform", "global"] = "sba"
    objective: Objective = "kl"
    one_bit: OneBitRule = "two_level"
    epochs: int = 50
    rate: float = 1e-2
    batch: int = 1
    augmented: bool = True
    initial: float = 4.0
    patience: int = 0
    train_seed: int = 0

    def check(self) -> None:
        """Raise ValueError naming the field that cannot work."""
        self._training()
        if not self.rate >= 0:
            raise ValueError(f"rate is {self.rate}; wanted 0 or more")

    @property
    def train_batch(self) -> int:
        """Samples per step."""
        return self.batch

    def prepare(self, stats: LayerStats | None) -> Factor:
        """Factor the Hessian once for all layers that read this input."""
        assert stats is not None
        return layer_factor(stats, self.damp)

    def measure(self, layer: Layer, prepared: Factor) -> Cost:
        """KL at the layer's output for every pairing of column groups, ranges searched, no error feedback."""
        if self.allocation == "global":
            raise ValueError("a global allocation is a plan for the whole model: give this layer's part of it")
        in_features = layer.weight.shape[1]
        groups = group_slices(in_features, self.group_size)
        unseen = layer.stats is None or layer.stats.sample is None
        if self.allocation == "uniform" or len(groups) == 1 or not 1 < self.bits < 8 or unseen:
            return Cost((uniform_plan(in_features, self.bits, self.group_size),), (0.0,))
        weight = live_weight(layer, prepared)
        scale_dtype = scale_dtype_for(weight)
        rule: SalienceRule = "cholesky" if self.bit_map == "from_slim_llm" else "inverse_diag"
        ranking = group_salience(salience(weight, prepared, rule), groups, prepared.dead).tolist()

        def rounded(group: slice, bits: int) -> Tensor:
            grid = fit(weight[:, group], bits, search=RangeSearch(), one_bit=self.one_bit, scale_dtype=scale_dtype)
            return grid.quantize(weight[:, group])

        start = (self.bits,) * len(groups)
        menu = paired_menu(layer, weight, groups, ranking, rounded, self.bits, start, self.group_size, self.objective)
        return Cost(tuple(plan for plan, _ in menu), tuple(loss for _, loss in menu))

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """The cheapest candidate within N bits per weight; the fewest pairs win a tie."""
        return cheapest_within(cost, in_features, self.bits)

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Factor) -> Solution:
        """Where training starts. Raises ValueError naming the layer if a weight is NaN or Inf."""
        weight = live_weight(layer, prepared)
        part = self._part(weight, plan)
        stored = assemble(part.export(part.start), plan, part.scale_dtype)
        return Solution(stored, None, layer_events(layer, part.scale_dtype, prepared, self.damp), {"weight": weight})

    def widths(self, out_features: int) -> tuple[int, ...]:
        """1 to 8 bits."""
        return WIDTHS_FROM_ONE

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """What a plan stores: training moves ranges, never bytes."""
        symmetric = symmetric_widths(self.one_bit)
        return grouped_layout(out_features, in_features, plan.bits, plan.group_size, symmetric=symmetric)

    def rounded(self, layer: Layer, prepared: Factor, bits: int) -> Tensor:
        """Every group at `bits`, its range searched: about what training starts from and improves on."""
        return round_groups(live_weight(layer, prepared), bits, self.group_size, one_bit=self.one_bit)

    def column_cost(self, layer: Layer, prepared: Factor) -> Tensor:
        """E[x_j^2]: nothing compensates an error."""
        assert layer.stats is not None
        return layer.stats.hessian.diagonal() / layer.stats.tokens

    def train_block(self, problem: BlockProblem) -> TrainedLayers:
        """Train all layers of a block together. Raises ValueError if the block cannot be trained."""
        parts = {n: self._part(s.details["weight"], problem.plans[n]) for n, s in problem.solutions.items()}
        targets = (problem.full_outputs, problem.outputs) if self.augmented else (problem.full_outputs,)
        samples = Samples(problem.count, problem.inputs, targets)
        trained = train((Link(problem.forward, parts),), samples, self._training(), problem.told)
        solutions = {}
        for name, part in parts.items():
            stored = assemble(part.export(trained.values[name]), problem.plans[name], part.scale_dtype)
            solutions[name] = Solution(stored)
        factors = torch.cat([part.factors(trained.values[name]) for name, part in parts.items()])
        notes = {"clipping": torch.histc(factors, _BINS, 0.0, 1.0).int().tolist()}
        return trained.layers(problem.name, solutions, notes)

    def _part(self, weight: Tensor, plan: LayerPlan) -> Clipping:
        return Clipping.of(
            weight,
            group_slices(weight.shape[1], plan.group_size),
            plan.bits,
            initial=self.initial,
            rate=self.rate,
            one_bit=self.one_bit,
            scale_dtype=scale_dtype_for(weight),
        )

    def _training(self) -> Training:
        return Training(self.epochs, self.batch, "constant", patience=self.patience, seed=self.train_seed)
