"""`train_block` hands a solved block to the recipe's training, `keep` stores what training the whole model needs.

The recipe sees a function and samples. The function is the full-precision block with other weights in the places of
its layers (`of_weights`); samples are read from the work directory when the recipe asks for them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bitquilt.core.events import Epoch, Observer
from bitquilt.core.training import BlockProblem, BlockTraining, TrainedLayers
from bitquilt.errors import UserError
from bitquilt.model.linear import is_transposed
from bitquilt.stream.hidden_states import CalibratedStates
from bitquilt.stream.job import CalibratedJob, LoadedBlock
from bitquilt.stream.layers import SolvedLayers, put_in_place
from bitquilt.stream.records import TrainingRecord
from bitquilt.stream.workdir import write_state

OfWeights = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def train_block(
    states: CalibratedStates,
    training: BlockTraining,
    block: LoadedBlock,
    full: nn.Module,
    solved: SolvedLayers,
    observe: Observer,
) -> TrainingRecord:
    """Train the solved layers of a block, given the block in full precision; changes `solved` and the model.

    Raises UserError naming the block if it cannot be trained.
    """
    job, i = states.job, block.number
    here, there = states.inputs(i), states.inputs(i + 1, "full")

    @torch.no_grad()
    def outputs(chosen: Sequence[int]) -> Tensor:
        return states.calls.run(i, full, here.samples(chosen))

    progress = TrainingProgress(block.path, observe)
    problem = BlockProblem(
        name=block.path,
        plans={name: solved.records[name].plan for name in solved.solutions},
        solutions=solved.solutions,
        forward=of_weights(states, replace(block, module=full)),
        count=len(job.ids),
        inputs=lambda chosen: here.samples(chosen).to(job.device),
        outputs=outputs,
        full_outputs=lambda chosen: there.samples(chosen).to(job.device),
        told=progress,
    )
    try:
        trained = training.run(problem)
    except (ValueError, MemoryError) as error:
        raise UserError(f"{block.path}: {error}") from None
    for name, solution in trained.solutions.items():
        before, layer = solved.records[name], solved.layers[name]
        record = put_in_place(job, layer, block.linears[name], before.plan, solution, solved)
        solved.records[name] = record.annotated(before.seconds, before.notes)
        solved.solutions[name] = solution
    solved.events += trained.events
    return progress.finish(trained)


def keep(job: CalibratedJob, i: int, solved: SolvedLayers) -> None:
    """Store what the recipe needs of block i to train the whole model, if it does."""
    if (training := job.recipe.training.model) is not None:
        tensors = {f"{n}.{key}": t for n, s in solved.solutions.items() for key, t in training.keep(s).items()}
        write_state(job.folder / kept_file(i), tensors)


def kept_file(i: int) -> str:
    """Name of the file that `keep` writes for block i."""
    return f"kept-{i:05d}.safetensors"


class TrainingProgress:
    """Passes the epochs of a training to the observer, with the time left, and makes the report's entry."""

    def __init__(self, where: str, observe: Observer, unit: str = "error") -> None:
        self._where, self._observe, self._unit = where, observe, unit
        self._begin, self._start = time.perf_counter(), float("nan")

    def __call__(self, done: int, of: int, loss: float) -> None:
        """Report `done` epochs; 0 is the start."""
        if done == 0:
            self._start = loss
        if done < of:
            left = (time.perf_counter() - self._begin) / done * (of - done) if done else float("nan")
            self._observe(Epoch(self._where, done, of, self._start, loss, left, self._unit))

    def finish(self, trained: TrainedLayers) -> TrainingRecord:
        """Report the end and return the report's entry."""
        epochs = len(trained.losses)
        self._observe(Epoch(self._where, epochs, epochs, trained.start_loss, trained.loss, 0.0, self._unit))
        return TrainingRecord(
            start_loss=trained.start_loss,
            loss=trained.loss,
            losses=trained.losses,
            seconds=round(time.perf_counter() - self._begin, 3),
            **trained.notes,
        )


def of_weights(states: CalibratedStates, block: LoadedBlock) -> OfWeights:
    """Return the block as a function of the weights of its layers, by full path, and its input."""
    prefix = f"{block.path}."
    transposed = {name for name, module in block.linears.items() if is_transposed(module)}

    def forward(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        placed = {
            f"{name.removeprefix(prefix)}.weight": weight.t() if name in transposed else weight
            for name, weight in weights.items()
        }

        def called(*args: Any, **kwargs: Any) -> Any:
            return functional_call(block.module, placed, args, kwargs)

        return states.calls.run(block.number, called, hidden)

    return forward
