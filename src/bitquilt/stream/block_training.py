"""How is a block handed to a recipe that trains it? train_block(job, flow, i, full, linears, done, observe).

The recipe sees a function and samples. The function is the full-precision block with other weights in the places of
its layers; samples are read from the work directory when they are asked for.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bitquilt.core.events import Epoch, Observer
from bitquilt.core.recipe import TrainsBlocks, TunesModel
from bitquilt.core.training import BlockProblem, TrainedLayers
from bitquilt.errors import UserError
from bitquilt.model.linear import is_transposed
from bitquilt.stream.activations import Flow
from bitquilt.stream.job import Job
from bitquilt.stream.layers import Done, put_in_place, tunes
from bitquilt.stream.workdir import Activations, write_tensors

OfWeights = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def train_block(
    job: Job, flow: Flow, i: int, full: nn.Module, linears: Mapping[str, nn.Module], done: Done, observe: Observer
) -> None:
    """Train the solved layers of block i, `full` being the block before; what is in `done` and in the model changes.

    Raises UserError naming the block if it cannot be trained.
    """
    assert isinstance(job.recipe, TrainsBlocks)
    path = job.skeleton.blocks[i]
    here, there = flow.inputs(i), flow.inputs(i + 1, full=True)
    assert job.ids is not None
    assert here is not None
    assert there is not None
    told = Telling(path, observe)
    problem = BlockProblem(
        path,
        done.plans,
        done.solutions,
        of_weights(job, flow, i, full, linears),
        len(job.ids),
        lambda chosen: read_samples(here, chosen).to(job.device),
        _outputs(flow, i, full, here),
        lambda chosen: read_samples(there, chosen).to(job.device),
        told,
    )
    try:
        solved = job.recipe.train_block(problem)
    except (ValueError, MemoryError) as error:
        raise UserError(f"{path}: {error}") from None
    for name, solution in solved.solutions.items():
        before = done.record["layers"][name]
        entry = put_in_place(job, done.layers[name], done.plans[name], solution, linears[name], done)
        entry["seconds"] = before["seconds"]
        done.solutions[name] = solution
    done.record["events"] += [asdict(event) for event in solved.events]
    done.record["training"] = told.finish(solved)


def keep(job: Job, i: int, done: Done) -> None:
    """Put aside what tuning needs of block i; nothing where the recipe does not tune."""
    if tunes(job):
        assert isinstance(job.recipe, TunesModel)
        tensors = {f"{n}.{key}": t for n, s in done.solutions.items() for key, t in job.recipe.keep(s).items()}
        write_tensors(job.folder / kept_file(i), tensors)


def kept_file(i: int) -> str:
    """Where that of block i is."""
    return f"kept-{i:05d}.safetensors"


class Telling:
    """Hands the epochs of a training on to the observer, with the time left, and notes what the report says of it."""

    def __init__(self, where: str, observe: Observer, unit: str = "error") -> None:
        self.where, self.observe, self.unit = where, observe, unit
        self.begin, self.start = time.perf_counter(), float("nan")

    def __call__(self, done: int, of: int, loss: float) -> None:
        """After `done` epochs, 0 for the start."""
        if done == 0:
            self.start = loss
        if done < of:
            left = (time.perf_counter() - self.begin) / done * (of - done) if done else float("nan")
            self.observe(Epoch(self.where, done, of, self.start, loss, left, self.unit))

    def finish(self, solved: TrainedLayers) -> dict[str, Any]:
        """The last word, and the report's entry."""
        epochs = len(solved.losses)
        self.observe(Epoch(self.where, epochs, epochs, solved.start_loss, solved.loss, 0.0, self.unit))
        return {
            "start_loss": solved.start_loss,
            "loss": solved.loss,
            "losses": list(solved.losses),
            "seconds": round(time.perf_counter() - self.begin, 3),
            **solved.notes,
        }


def of_weights(job: Job, flow: Flow, i: int, block: nn.Module, linears: Mapping[str, nn.Module]) -> OfWeights:
    """Block i as a function of the weights of `linears`, by full path, and its input."""
    prefix = f"{job.skeleton.blocks[i]}."
    transposed = {name for name, module in linears.items() if is_transposed(module)}

    def forward(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        placed = {
            f"{name.removeprefix(prefix)}.weight": weight.t() if name in transposed else weight
            for name, weight in weights.items()
        }

        def called(*args: Any, **kwargs: Any) -> Any:
            return functional_call(block, placed, args, kwargs)

        return flow.run(i, called, hidden)

    return forward


def read_samples(activations: Activations, chosen: Sequence[int]) -> Tensor:
    """`[chosen, tokens, width]`."""
    return torch.cat([activations.read(slice(j, j + 1)) for j in chosen])


def _outputs(flow: Flow, i: int, full: nn.Module, inputs: Activations) -> Callable[[Sequence[int]], Tensor]:
    def outputs(chosen: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return flow.run(i, full, read_samples(inputs, chosen))

    return outputs
