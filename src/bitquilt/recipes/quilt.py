"""Quilt: the best this library knows for a given size. No publication: ingredients kept because they measured better.

Without gradients (`effort="fast"`), per layer, in the order in which a block computes:
1. the target is not the weight but the weight that repairs what earlier layers did to the layer's input and to the
   residual stream it writes into (`solvers.target`; after arXiv 2504.02692, the stream is ours);
2. columns are swept group by group, the groups with the largest inputs first (group-aware order: nothing to store);
3. each group's range is searched when it is reached, at 1 and 2 bits on levels symmetric around zero, which store no
   zero, above with the zeros beside the nearest;
4. coordinate descent over the codes after the sweep (`solvers.descent`).
With gradients (`effort="normal"`), per block, all its layers together:
5. an offset per weight decides which way it is rounded, scales beside (after arXiv 2309.05516, which moves the offsets
   by the sign of their gradient; AdamW at the same rate gains twice as much), from the result of 1 to 4: the block on
   the quantized model's inputs against the full-precision block's output in the full-precision model.
With gradients through the whole model (`effort="best"`), from the result of 1 to 5:
6. the same offsets and scales of all blocks together, by AdamW, on the KL of the model's output.
docs/benchmarks.md has what each of them is worth.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bitquilt.grids.uniform import RangeSearch, UniformGrid, fit
from bitquilt.hessian import Factor
from bitquilt.recipes.feedback import Feedback
from bitquilt.solvers.blockwise import train
from bitquilt.solvers.gptq import Sweep
from bitquilt.solvers.layouts import COARSE, WIDTHS_FROM_ONE, grouped_layout, round_groups
from bitquilt.solvers.solve import FitColumns, assemble, disassemble, live_weight
from bitquilt.solvers.trainable import Rounding
from bitquilt.solvers.training import Link, Rule, Samples, Schedule, Trained, Training
from bitquilt.types import (
    BlockProblem,
    Cost,
    Layer,
    LayerPlan,
    Layout,
    ModelProblem,
    Solution,
    TrainedLayers,
    group_slices,
    uniform_plan,
)

# tau 0.4 .. 1.1 in steps of 0.02: half the default's candidates, because each is tried with three zeros
_TAUS = tuple(round(0.4 + 0.02 * i, 2) for i in range(36))


@dataclass(frozen=True)
class Quilt(Feedback):
    """`alpha`, `stream_alpha`: share of the earlier error that a layer repairs, at its input and in the stream.
    `levels`: "auto" = symmetric at 1 and 2 bits, "symmetric" everywhere, "zero" from 2 bits on. `passes`: of coordinate
    descent.
    `effort`: "fast" = no training; "normal" = `epochs` passes over the samples per block, `batch` at a time, in which
    each weight can move by half a step in all; "best" = then `tune_epochs` passes through the whole model. `rounding`:
    how a block's offsets move, by "adam" or by the "sign" of their gradient. `scale_rate`: of the scales in a block;
    0 = they stay. `tune_rate`, `tune_scale_rate`: of offsets and scales in the model; 0 = codes stay, scales stay.
    `autocast`: products in bfloat16 while training, for processors that are faster at it."""

    name: ClassVar[str] = "quilt"

    bits: int = 2
    group_size: int = 64
    alpha: float = 0.75
    stream_alpha: float = 0.75
    group_order: bool = True
    levels: Literal["auto", "symmetric", "zero"] = "auto"
    passes: int = 3
    effort: Literal["fast", "normal", "best"] = "fast"
    epochs: int = 20
    batch: int = 4
    rounding: Literal["sign", "adam"] = "adam"
    schedule: Schedule = "linear"
    scale_rate: float = 1e-2
    tune_scale_rate: float = 3e-3
    tune_epochs: int = 8
    tune_rate: float = 2e-2
    patience: int = 0
    autocast: bool = False
    train_seed: int = 0

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian, with a full-precision target the drift of the inputs, and what training compares with."""
        training = frozenset[str]() if self.effort == "fast" else frozenset({"full"})
        return self.sweep_needs() | training

    @property
    def train_batch(self) -> int:
        """Samples per step; 0 without training."""
        return 0 if self.effort == "fast" or not self.epochs else self.batch

    @property
    def tune_batch(self) -> int:
        """Samples per step through the whole model; 0 without."""
        return self.batch if self.effort == "best" else 0

    @property
    def tune_bytes(self) -> int:
        """Per weight: where it lies, its offset, the best one so far, a gradient and AdamW's two sums, in fp32."""
        return 4 * 6

    def check(self) -> None:
        """Raise ValueError naming the field that cannot work."""
        self.check_sweep()
        self._training()
        self._tuning()
        for name in ("scale_rate", "tune_rate", "tune_scale_rate"):
            if not (rate := getattr(self, name)) >= 0:
                raise ValueError(f"{name} is {rate}; wanted 0 or more")

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

    def train_block(self, problem: BlockProblem) -> TrainedLayers:
        """Train all layers of a block together. Raises ValueError if the block cannot be trained."""
        training = self._training()
        # at a rate that falls to zero linearly: half a step in all
        steps = max(1, training.epochs * -(-training.trained(problem.count) // training.batch))
        rounding = Rule(1 / steps, self.rounding, -0.5, 0.5)
        parts = self._parts(problem, lambda _name, solved: solved.details["swept"], rounding, self.scale_rate)
        samples = Samples(problem.count, problem.inputs, (problem.full_outputs,))
        trained = train((Link(problem.forward, parts),), samples, training, problem.told)
        return self._trained(problem, problem.name, parts, trained)

    def keep(self, solution: Solution) -> dict[str, Tensor]:
        """What the codes were rounded from."""
        return {"aim": solution.details["swept"].compensated}

    def tune(self, problem: ModelProblem) -> TrainedLayers:
        """Train all blocks together. Raises ValueError if they cannot be trained."""
        training = self._tuning()

        def swept(name: str, solved: Solution) -> Sweep[UniformGrid]:
            return disassemble(solved.weight, problem.plans[name], solved.details["aim"])

        parts = self._parts(problem, swept, Rule(self.tune_rate), self.tune_scale_rate)
        links = [Link(forward, {name: parts[name] for name in names}) for forward, names in problem.blocks]
        samples = Samples(problem.count, problem.inputs, (problem.targets,), problem.loss)
        return self._trained(problem, "model", parts, train(links, samples, training, problem.told))

    def _parts(
        self,
        problem: BlockProblem | ModelProblem,
        swept: Callable[[str, Solution], Sweep[UniformGrid]],
        rounding: Rule,
        scale_rate: float,
    ) -> dict[str, Rounding]:
        """One layer at a time: of a whole model no more is held than what is trained."""
        parts, scaling = {}, Rule(scale_rate, low=0.5, high=2.0)
        for name, solved in problem.solutions.items():
            layout = solved.weight.layout
            groups = group_slices(layout.in_features, problem.plans[name].group_size)
            scale_dtype = layout.segments[0][0].scale_dtype
            parts[name] = Rounding.of(swept(name, solved), groups, scale_dtype, rounding, scaling)
        return parts

    def _trained(
        self, problem: BlockProblem | ModelProblem, where: str, parts: Mapping[str, Rounding], trained: Trained
    ) -> TrainedLayers:
        solutions = {}
        for name, part in parts.items():
            swept = part.export(trained.values[name])
            stored = assemble(swept, problem.plans[name], part.scale_dtype)
            solutions[name] = Solution(stored, None, (), {"swept": swept})
        return trained.layers(where, solutions)

    def _training(self) -> Training:
        return Training(self.epochs, self.batch, self.schedule, betas=(0.9, 0.99), **self._same())

    def _tuning(self) -> Training:
        return Training(self.tune_epochs, max(1, self.tune_batch), "cosine", betas=(0.9, 0.98), **self._same())

    def _same(self) -> dict[str, Any]:
        return {"patience": self.patience, "seed": self.train_seed, "autocast": self.autocast}
