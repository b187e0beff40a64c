"""`clipping="trained"`: `clipping_training` and `train_ranges` train the ranges of all groups of a solved block."""

from typing import Literal

from bitquilt.core.training import BlockProblem, BlockTraining, TrainedLayers, Training
from bitquilt.core.types import Solution
from bitquilt.train.problem import Link, Read, TrainingSamples, TrainingSettings
from bitquilt.train.ranges import Ranges
from bitquilt.train.trainer import train

ClippingMode = Literal["solved", "trained"]
RATE = 1e-2  # of a factor whose start is 1, falling to zero
# At 2 bits, groups of 32: 43 and 51 % less KL than `rtn` alone, 25 and 36 % less than `gptq` (docs/lab/clipping.md).
TRAINING = TrainingSettings(epochs=8, batch=8)


def clipping_training(clipping: ClippingMode) -> Training:
    """Training of the ranges of each block, or none."""
    return Training(BlockTraining(TRAINING.batch, train_ranges) if clipping == "trained" else None)


def train_ranges(
    problem: BlockProblem, training: TrainingSettings = TRAINING, targets: tuple[Read, ...] | None = None
) -> TrainedLayers:
    """Stretch or clip the range of every column group; codes and bytes stay.

    `targets`: what the block's output is compared with, by default the full-precision block's output in the
    full-precision model. Raises ValueError if the block cannot be trained.
    """
    parts = {name: Ranges(solution.weight, RATE) for name, solution in problem.solutions.items()}
    samples = TrainingSamples(problem.count, problem.inputs, targets or (problem.full_outputs,))
    trained = train((Link(problem.forward, parts),), samples, training, problem.told)
    solutions = {name: Solution(part.export(trained.values[name])) for name, part in parts.items()}
    return trained.layers(problem.name, solutions)
