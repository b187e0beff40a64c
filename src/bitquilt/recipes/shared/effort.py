"""What `--effort` asks for: the result of a sweep trained block by block, then through the whole model.

normal: per block, all its layers together, an offset per weight that decides which way it is rounded, scales beside
(after arXiv 2309.05516, which moves the offsets by the sign of their gradient; AdamW at the same rate gains twice as
much): the block on the quantized model's inputs against the full-precision block's output in the full-precision model.
best: then the same of all blocks together, by AdamW, on the KL of the model's output.
docs/benchmarks.md has what they cost and gain.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor

from bitquilt.core.training import BlockProblem, ModelProblem, TrainedLayers
from bitquilt.core.types import LayerPlan, Solution
from bitquilt.train.problem import (
    KeptEpoch,
    Link,
    Rule,
    Schedule,
    TrainableWeight,
    Trained,
    TrainingSamples,
    TrainingSettings,
    Values,
)
from bitquilt.train.trainer import train

P = TypeVar("P", bound=TrainableWeight)


@dataclass(frozen=True, kw_only=True)
class Effort(Generic[P]):
    """`effort`: "fast" = no training; "normal" = `epochs` passes over the samples per block, `batch` at a time, in
    which each weight can move by `reach` steps in all; "best" = then `tune_epochs` passes through the whole model.
    `rounding`: how a block's offsets move, by "adam" or by the "sign" of their gradient. `scale_rate`: of the scales in
    a block; 0 = they stay. `tune_rate`, `tune_scale_rate`: of offsets and scales in the model; 0 = codes stay, scales
    stay. `kept_epoch`: the "best" on samples not trained on, or the "last", trained on all: the sweep that training
    starts from has seen all samples, so those held out judge the start kindly. `autocast`: products in bfloat16 while
    training, for processors that are faster at it.

    A recipe's solutions keep in `details["aim"]` what their codes were rounded from `[out, in]`."""

    effort: Literal["fast", "normal", "best"] = "fast"
    epochs: int = 20
    batch: int = 4
    reach: float = 0.5
    rounding: Literal["sign", "adam"] = "adam"
    schedule: Schedule = "linear"
    scale_rate: float = 1e-2
    tune_scale_rate: float = 3e-3
    tune_epochs: int = 8
    tune_rate: float = 2e-2
    patience: int = 0
    kept_epoch: KeptEpoch = "best"
    autocast: bool = False
    train_seed: int = 0

    @abstractmethod
    def part_of(self, solution: Solution, plan: LayerPlan, rounding: Rule, scaling: Rule) -> P:
        """What can be trained in a solved layer: its offsets, by the first rule, and its scales."""

    @abstractmethod
    def solution_of(self, part: P, values: Values, plan: LayerPlan) -> Solution:
        """The layer with these values."""

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

    def check_effort(self) -> None:
        """Raise ValueError naming the field that cannot work."""
        self._training()
        self._tuning()
        for name in ("reach", "scale_rate", "tune_rate", "tune_scale_rate"):
            if not (rate := getattr(self, name)) >= 0:
                raise ValueError(f"{name} is {rate}; wanted 0 or more")

    def train_block(self, problem: BlockProblem) -> TrainedLayers:
        """Train all layers of a block together. Raises ValueError if the block cannot be trained."""
        training = self._training()
        # at a rate that falls to zero linearly: `reach` in all
        steps = max(1, training.epochs * -(-training.trained(problem.count) // training.batch))
        parts = self._parts(
            problem, Rule(2 * self.reach / steps, self.rounding, -self.reach, self.reach), self.scale_rate
        )
        samples = TrainingSamples(problem.count, problem.inputs, (problem.full_outputs,))
        trained = train((Link(problem.forward, parts),), samples, training, problem.told)
        return self._finished(problem, problem.name, parts, trained)

    def keep(self, solution: Solution) -> dict[str, Tensor]:
        """What the codes were rounded from."""
        return {"aim": solution.details["aim"]}

    def tune(self, problem: ModelProblem) -> TrainedLayers:
        """Train all blocks together. Raises ValueError if they cannot be trained."""
        parts = self._parts(problem, Rule(self.tune_rate), self.tune_scale_rate)
        links = [Link(forward, {name: parts[name] for name in names}) for forward, names in problem.blocks]
        samples = TrainingSamples(problem.count, problem.inputs, (problem.targets,), problem.loss)
        return self._finished(problem, "model", parts, train(links, samples, self._tuning(), problem.told))

    def _parts(self, problem: BlockProblem | ModelProblem, rounding: Rule, scale_rate: float) -> dict[str, P]:
        """One layer at a time: of a whole model no more is held than what is trained."""
        scaling = Rule(scale_rate, low=0.5, high=2.0)
        return {
            name: self.part_of(solved, problem.plans[name], rounding, scaling)
            for name, solved in problem.solutions.items()
        }

    def _finished(
        self, problem: BlockProblem | ModelProblem, where: str, parts: Mapping[str, P], trained: Trained
    ) -> TrainedLayers:
        solutions = {
            name: self.solution_of(part, trained.values[name], problem.plans[name]) for name, part in parts.items()
        }
        return trained.layers(where, solutions)

    def _training(self) -> TrainingSettings:
        return TrainingSettings(self.epochs, self.batch, self.schedule, betas=(0.9, 0.99), **self._same())

    def _tuning(self) -> TrainingSettings:
        return TrainingSettings(self.tune_epochs, max(1, self.tune_batch), "cosine", betas=(0.9, 0.98), **self._same())

    def _same(self) -> dict[str, Any]:
        return {
            "patience": self.patience,
            "kept_epoch": self.kept_epoch,
            "seed": self.train_seed,
            "autocast": self.autocast,
        }
