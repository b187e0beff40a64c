"""How is a block handed to a recipe that trains it? train_block(job, flow, i, full, linears, done, observe).

The recipe sees a function and samples. The function is the full-precision block with other weights in the places of
its layers; samples are read from the work directory when they are asked for.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from bitquilt.errors import UserError
from bitquilt.protocols import TrainsBlocks
from bitquilt.runtime.flow import Flow
from bitquilt.runtime.job import Job
from bitquilt.runtime.layers import Done, put_in_place
from bitquilt.runtime.progress import Observer, Stage
from bitquilt.runtime.workdir import Activations
from bitquilt.types import BlockProblem


def train_block(
    job: Job, flow: Flow, i: int, full: nn.Module, linears: Mapping[str, nn.Module], done: Done, observe: Observer
) -> None:
    """Train the solved layers of block i, `full` being the block before; what is in `done` and in the model changes.

    Raises UserError naming the block if it cannot be trained.
    """
    assert isinstance(job.recipe, TrainsBlocks)
    path = job.skeleton.blocks[i]
    observe(Stage(f"training {path}"))
    started = time.perf_counter()
    try:
        solved = job.recipe.train_block(_problem(job, flow, i, full, linears, done))
    except (ValueError, MemoryError) as error:
        raise UserError(f"{path}: {error}") from None
    for name, solution in solved.solutions.items():
        before = done.record["layers"][name]
        entry = put_in_place(job, done.layers[name], done.plans[name], solution, linears[name], done)
        entry["seconds"] = before["seconds"]
    done.record["events"] += [asdict(event) for event in solved.events]
    seconds = round(time.perf_counter() - started, 3)
    done.record["training"] = {
        "start_loss": solved.start_loss,
        "loss": solved.loss,
        "losses": list(solved.losses),
        "seconds": seconds,
    }
    change = 1 - solved.loss / solved.start_loss if solved.start_loss else 0.0
    told = f"error {solved.start_loss:.4g} -> {solved.loss:.4g} ({change:.0%} less, {seconds:.0f} s)"
    observe(Stage(f"trained {path}: {told}"))


def _problem(
    job: Job, flow: Flow, i: int, full: nn.Module, linears: Mapping[str, nn.Module], done: Done
) -> BlockProblem:
    prefix = f"{job.skeleton.blocks[i]}."
    transposed = {name for name, module in linears.items() if isinstance(module, Conv1D)}
    here, there = flow.inputs(i), flow.inputs(i + 1, full=True)
    assert job.ids is not None
    assert here is not None
    assert there is not None

    def forward(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        placed = {
            f"{name.removeprefix(prefix)}.weight": weight.t() if name in transposed else weight
            for name, weight in weights.items()
        }

        def block(*args: Any, **kwargs: Any) -> Any:
            return functional_call(full, placed, args, kwargs)

        return flow.run(i, block, hidden)

    def outputs(chosen: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return flow.run(i, full, _read(here, chosen))

    return BlockProblem(
        job.skeleton.blocks[i],
        done.plans,
        done.solutions,
        forward,
        len(job.ids),
        lambda chosen: _read(here, chosen).to(job.device),
        outputs,
        lambda chosen: _read(there, chosen).to(job.device),
    )


def _read(activations: Activations, chosen: Sequence[int]) -> Tensor:
    return torch.cat([activations.read(slice(j, j + 1)) for j in chosen])
