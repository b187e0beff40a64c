"""Trained clipping after any recipe on uniform grids: `clipping="trained"`, block by block (`solvers.ranges`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bitquilt.core.training import BlockProblem, TrainedLayers
from bitquilt.core.types import Solution
from bitquilt.train.problem import KeptEpoch, Link, Read, TrainableWeight, Trained, TrainingSamples, TrainingSettings
from bitquilt.train.ranges import Ranges
from bitquilt.train.trainer import train


@dataclass(frozen=True, kw_only=True)
class TrainedClipping:
    """`clipping`: "trained" = once a block's layers are solved, the ranges of all their groups are trained against the
    full-precision block's output in the full-precision model; codes and bytes stay. `epochs`, `rate` (linear, to zero),
    `batch`, `train_seed`: of that training. `autocast`: its products in bfloat16, for processors that are faster at
    it. `kept_epoch`: the "best" on samples not trained on, or the "last", trained on all."""

    clipping: Literal["solved", "trained"] = "solved"
    epochs: int = 8
    rate: float = 1e-2
    batch: int = 8
    train_seed: int = 0
    autocast: bool = False
    kept_epoch: KeptEpoch = "best"

    @property
    def train_batch(self) -> int:
        """Samples per step; 0 without training."""
        return self.batch if self.clipping == "trained" and self.epochs else 0

    def check(self) -> None:
        """Raise ValueError naming the field that cannot work."""
        self._training()
        if not self.rate >= 0:
            raise ValueError(f"rate is {self.rate}; wanted 0 or more")

    def train_block(self, problem: BlockProblem) -> TrainedLayers:
        """Train all layers of a block together. Raises ValueError if the block cannot be trained."""
        parts = {name: Ranges(solution.weight, self.rate) for name, solution in problem.solutions.items()}
        trained = self._trained(problem, parts)
        solutions = {name: Solution(part.export(trained.values[name])) for name, part in parts.items()}
        return trained.layers(problem.name, solutions)

    def _trained(self, problem: BlockProblem, parts: Mapping[str, TrainableWeight]) -> Trained:
        samples = TrainingSamples(problem.count, problem.inputs, self._targets(problem))
        return train((Link(problem.forward, parts),), samples, self._training(), problem.told)

    def _targets(self, problem: BlockProblem) -> tuple[Read, ...]:
        return (problem.full_outputs,)

    def _training(self) -> TrainingSettings:
        return TrainingSettings(
            self.epochs, self.batch, seed=self.train_seed, autocast=self.autocast, kept_epoch=self.kept_epoch
        )
