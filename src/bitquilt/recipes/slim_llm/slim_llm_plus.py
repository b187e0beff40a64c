"""SliM-LLM+: the mixed bits of SliM-LLM, the range of each group trained (arXiv 2405.14917, second half).

1. bit map of SliM-LLM: salience of the column groups, pairs of N-1 and N+1 bits, p by KL at the layer's output;
2. where training starts: SliM-LLM's own result, swept with error feedback [ours], or the weight itself, rounded within
   0.982 of each group's range (`start="weight"`, as published);
3. per block, AdamW on the ranges of all groups: the quantized block on the quantized model's inputs against the
   full-precision block on the full-precision inputs and, with `augmented`, on the same quantized inputs.

Deviations from the publication, undone by `SlimLLMPlus.published()`, which undoes those of SliM-LLM too:
- training starts from the sweep, whose codes stay, each group's range between 1/4 and 4 times the searched one. The
  publication trains instead of sweeping (LWC, arXiv 2308.13137: codes follow the range) and so gives up the error
  feedback: on babyllama at 2 bits that is worse than SliM-LLM without any training (KL 0.661 against 0.514). From the
  weight, `salience="inverse_diag"` and `weighting="none"` make a map that no order of columns went into.
Never reproduced: ranges that do not pass through zero, whose zero does not fit its bits; scales cut at 1e-5 instead of
relative to the layer; one of LLaMA's layers left at N bits; a loss that is not finite as an error instead of an event.
The epoch with the least loss on held-out samples is kept, the start included.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from bitquilt.core.training import BlockProblem, TrainedLayers
from bitquilt.core.types import Layer, LayerPlan, Solution, group_slices
from bitquilt.layer.assembly import assemble
from bitquilt.layer.grids.uniform import scale_dtype_for
from bitquilt.layer.grouped_weight import layer_events, live_weight
from bitquilt.layer.hessian import Factor
from bitquilt.layer.nearest import round_groups
from bitquilt.recipes.slim_llm.slim_llm import SlimLLM
from bitquilt.train.problem import Read, TrainingSettings
from bitquilt.train.rounding import Clipping

_BINS = 50  # of the learned clipping factors in report.json, from 0 to 1


@dataclass(frozen=True, kw_only=True)
class SlimLLMPlus(SlimLLM):
    """SliM-LLM's fields, and of training: `epochs`, `rate`, `batch`, `augmented`, `initial` (with `start="weight"` the
    logit training starts from: a factor of 0.982) are the publication's. `patience`: epochs without a gain on held-out
    samples before a block stops. `allocation="uniform"` = N bits everywhere, the baseline that is trained alike."""

    name: ClassVar[str] = "slim-llm+"

    clipping: Literal["trained"] = "trained"
    start: Literal["gptq", "weight"] = "gptq"
    epochs: int = 50
    batch: int = 1
    augmented: bool = True
    initial: float = 4.0
    patience: int = 0

    @classmethod
    def published(cls, bits: int = 2, group_size: int = 128) -> Self:
        """What the public implementation computes, without its faults."""
        return replace(super().published(bits, group_size), start="weight")

    def check(self) -> None:
        """Raise ValueError naming the field that cannot work."""
        super().check()
        if self.start == "gptq":
            return
        for name in ("alpha", "stream_alpha", "group_order", "passes", "error_outliers", "act_outliers", "symmetric"):
            if value := getattr(self, name):
                raise ValueError(f"{name} is {value}; it is of the sweep, and start=weight has none: use start=gptq")

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Factor) -> Solution:
        """Where training starts. Raises ValueError naming the layer if a weight is NaN or Inf."""
        if self.start == "gptq":
            return super().quantize(layer, plan, prepared)
        weight = live_weight(layer, prepared)
        part = self._part(weight, plan)
        stored = assemble(part.export(part.start), plan)
        return Solution(stored, None, layer_events(layer, part.scale_dtype, prepared, self.damp), {"weight": weight})

    def rounded(self, layer: Layer, prepared: Factor, bits: int) -> Tensor:
        """Every group at `bits`, its range searched: about what training starts from and improves on."""
        if self.start == "gptq":
            return super().rounded(layer, prepared, bits)
        return round_groups(live_weight(layer, prepared), bits, self.group_size, one_bit=self.one_bit)

    def column_cost(self, layer: Layer, prepared: Factor) -> Tensor:
        """1 / U_jj^2 where a sweep compensates, else E[x_j^2]."""
        if self.start == "gptq":
            return super().column_cost(layer, prepared)
        assert layer.stats is not None
        return layer.stats.hessian.diagonal() / layer.stats.tokens

    def train_block(self, problem: BlockProblem) -> TrainedLayers:
        """Train all layers of a block together. Raises ValueError if the block cannot be trained."""
        if self.start == "gptq":
            return super().train_block(problem)
        parts = {n: self._part(s.details["weight"], problem.plans[n]) for n, s in problem.solutions.items()}
        trained = self._trained(problem, parts)
        solutions = {}
        for name, part in parts.items():
            stored = assemble(part.export(trained.values[name]), problem.plans[name])
            solutions[name] = Solution(stored)
        factors = torch.cat([part.factors(trained.values[name]) for name, part in parts.items()])
        notes = {"clipping": torch.histc(factors, _BINS, 0.0, 1.0).int().tolist()}
        return trained.layers(problem.name, solutions, notes)

    def _part(self, weight: Tensor, plan: LayerPlan) -> Clipping:
        return Clipping(
            weight,
            group_slices(weight.shape[1], plan.group_size),
            plan.bits,
            initial=self.initial,
            rate=self.rate,
            one_bit=self.one_bit,
            scale_dtype=scale_dtype_for(weight),
        )

    def _targets(self, problem: BlockProblem) -> tuple[Read, ...]:
        return (problem.full_outputs, problem.outputs) if self.augmented else (problem.full_outputs,)

    def _training(self) -> TrainingSettings:
        return replace(super()._training(), schedule="constant", patience=self.patience)
