"""`--effort` of `quilt` and `cmpq+`: `EffortTraining` trains a sweep's result block by block, then in the whole model.

normal: all layers of a block together. An offset per weight decides which way it is rounded (after arXiv 2309.05516,
which moves offsets by the sign of their gradient; AdamW at the same rate gains twice as much), and scales move too.
The block reads the quantized model's inputs and is compared with the full-precision block in the full-precision model.
best: afterwards the same for all blocks together, on the KL divergence of the model's output.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Generic, Literal, Self, TypeVar

from torch import Tensor

from bitquilt.core.training import BlockProblem, BlockTraining, ModelProblem, ModelTraining, TrainedLayers, Training
from bitquilt.core.types import LayerPlan, Solution
from bitquilt.train.problem import (
    KeptEpoch,
    Link,
    Rule,
    TrainableWeight,
    Trained,
    TrainingSamples,
    TrainingSettings,
    Values,
)
from bitquilt.train.trainer import train

P = TypeVar("P", bound=TrainableWeight)
Effort = Literal["fast", "normal", "best"]
# stories260k, 2 bits, groups of 32, KL (docs/lab/training.md): batches of 4 reach 0.765, of 8 0.785
BATCH = 4
SCALE_RATE = 1e-2  # in a block; 0.765, without moving scales 0.817
TUNE_SCALE_RATE = 3e-3  # in the whole model
# Bytes per weight in the whole model: target, offset, best offset, gradient and AdamW's two sums, in fp32.
TUNE_BYTES = 4 * 6


@dataclass(frozen=True)
class EffortTraining(Generic[P]):
    """The training that a recipe's options ask for. `effort` to `autocast` are those options, with their defaults.

    `reach`: steps of the grid that each weight can move by in a block. `part_of`: what can be trained in a solved
    layer; its offsets follow the first rule, its scales the second. `solution_of`: the layer with trained values.
    `Solution.details["aim"]` holds the weights `[out, in]` that the codes were rounded from.
    """

    reach: float
    part_of: Callable[[Solution, LayerPlan, Rule, Rule], P]
    solution_of: Callable[[P, Values, LayerPlan], Solution]
    effort: Effort = "fast"
    epochs: int = 20
    tune_epochs: int = 8
    tune_rate: float = 2e-2
    kept_epoch: KeptEpoch = "best"
    autocast: bool = False

    @classmethod
    def of(
        cls,
        options: object,
        reach: float,
        part_of: Callable[[Solution, LayerPlan, Rule, Rule], P],
        solution_of: Callable[[P, Values, LayerPlan], Solution],
    ) -> Self:
        """The training that the fields of a recipe with these names ask for."""
        named = {f.name: getattr(options, f.name) for f in fields(cls) if hasattr(options, f.name)}
        return cls(**named, reach=reach, part_of=part_of, solution_of=solution_of)

    def check(self) -> None:
        """Raise ValueError naming the option that cannot work."""
        self._training()
        self._tuning()
        if not self.tune_rate >= 0:
            raise ValueError(f"tune_rate is {self.tune_rate}; wanted 0 or more")

    @property
    def steps(self) -> Training:
        """Training by block, in the whole model, or none."""
        block = None if self.effort == "fast" or not self.epochs else BlockTraining(BATCH, self.train_block)
        model = ModelTraining(BATCH, self.tune, TUNE_BYTES, _kept) if self.effort == "best" else None
        return Training(block, model)

    def train_block(self, problem: BlockProblem) -> TrainedLayers:
        """Train all layers of a block together. Raises ValueError if the block cannot be trained."""
        training = self._training()
        # a rate that falls to zero linearly moves a weight by `reach` in all
        steps = max(1, training.epochs * -(-training.trained(problem.count) // training.batch))
        rounding = Rule(2 * self.reach / steps, low=-self.reach, high=self.reach)
        parts = self._parts(problem, rounding, SCALE_RATE)
        samples = TrainingSamples(problem.count, problem.inputs, (problem.full_outputs,))
        trained = train((Link(problem.forward, parts),), samples, training, problem.told)
        return self._finished(problem, problem.name, parts, trained)

    def tune(self, problem: ModelProblem) -> TrainedLayers:
        """Train all blocks together. Raises ValueError if they cannot be trained."""
        parts = self._parts(problem, Rule(self.tune_rate), TUNE_SCALE_RATE)
        links = [Link(forward, {name: parts[name] for name in names}) for forward, names in problem.blocks]
        samples = TrainingSamples(problem.count, problem.inputs, (problem.targets,), problem.loss)
        return self._finished(problem, "model", parts, train(links, samples, self._tuning(), problem.told))

    def _parts(self, problem: BlockProblem | ModelProblem, rounding: Rule, scale_rate: float) -> dict[str, P]:
        """Trainable parts by layer, made one at a time so that nothing else of a whole model is in memory."""
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
        return TrainingSettings(
            self.epochs, BATCH, betas=(0.9, 0.99), kept_epoch=self.kept_epoch, autocast=self.autocast
        )

    def _tuning(self) -> TrainingSettings:
        batch, kept, cast = BATCH if self.effort == "best" else 1, self.kept_epoch, self.autocast
        return TrainingSettings(self.tune_epochs, batch, "cosine", betas=(0.9, 0.98), kept_epoch=kept, autocast=cast)


def _kept(solution: Solution) -> dict[str, Tensor]:
    """Tensors of a solved layer that training the whole model needs and the checkpoint does not store."""
    return {"aim": solution.details["aim"]}
