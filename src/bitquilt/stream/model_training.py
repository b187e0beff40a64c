"""`tuned` hands a model to a recipe that trains all its blocks together, after the last block is committed.

The quantized layers are read back from the work directory one at a time, and the model's output is compared with that
of the full-precision model, whose last hidden states are there too. The results are written next to the blocks
(tuned-00003.safetensors), and `tuned.json`, written last, is the commit mark. A run that is killed earlier tunes again
and, being seeded, writes the same bytes. Everything is computed on the job's device, the head and its loss too.
`TrainingMemory` says what training takes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from bitquilt.core.events import Observer, Stage
from bitquilt.core.packing import unpack
from bitquilt.core.recipe import Recipe
from bitquilt.core.training import ModelProblem, ModelTraining, TrainedLayers
from bitquilt.core.types import Layer, Solution
from bitquilt.errors import UserError
from bitquilt.model.linear import linear_weight
from bitquilt.model.structure import Skeleton, vocabulary_size
from bitquilt.stream.block import input_statistics
from bitquilt.stream.block_training import OfWeights, TrainingProgress, kept_file, of_weights
from bitquilt.stream.devices import free_bytes, move, to_device
from bitquilt.stream.hidden_states import CalibratedStates, HiddenStates
from bitquilt.stream.job import Job, LoadedBlock, open_block
from bitquilt.stream.layers import SolvedLayers, put_in_place
from bitquilt.stream.records import BlockRecord
from bitquilt.stream.workdir import read_mark, read_tensors, tensors_of, write_mark

TUNED_FILE, _HOST = "tuned.json", torch.device("cpu")
# Logits of a sample in memory at once: ours and the full model's, their log-softmax, the gradients.
_LOGITS_ALIVE = 6
# fp32 numbers per weight of a block in training (its rounding, offset, best offset, gradient, optimizer steps, weight
# and the weight's gradient), and per token and layer width (what the backward pass keeps).
_PER_WEIGHT, _PER_WIDTH = 7, 2


@dataclass(frozen=True, eq=False)
class TrainingMemory:
    """Memory in bytes that training the layers of these `shapes` `[out, in]` takes on top of everything else."""

    recipe: Recipe
    skeleton: Skeleton
    shapes: Mapping[str, tuple[int, int]]
    seq_len: int

    @property
    def total(self) -> int:
        """The largest of what the run will train; 0 for a recipe that does not train."""
        return max(self.block, self.model)

    @property
    def block(self) -> int:
        """Training the largest block with a whole batch."""
        if (training := self.recipe.training.block) is None:
            return 0
        weights, widths = self._largest_block()
        return 4 * (_PER_WEIGHT * weights + _PER_WIDTH * widths * self.seq_len * training.batch)

    @property
    def model(self) -> int:
        """Training all blocks together, at least.

        The state of all layers, one block's weights and their gradients, and one sample in that block, before every
        block and at the output.
        """
        if (training := self.recipe.training.model) is None:
            return 0
        skeleton = self.skeleton
        weights, widths = self._largest_block()
        logits = vocabulary_size(skeleton.model) * self.seq_len
        hidden = skeleton.config.hidden_size * self.seq_len * (len(skeleton.blocks) + 1)
        outer = sum(skeleton.checkpoint.tensors[name].nbytes for name in skeleton.sources[""])
        alive = 3 * weights + _PER_WIDTH * widths * self.seq_len + hidden + _LOGITS_ALIVE * logits
        every = sum(rows * columns for rows, columns in self.shapes.values())
        return training.weight_bytes * every + 4 * alive + 2 * outer

    def check(self, device: torch.device = _HOST) -> None:
        """Raise UserError if training the whole model takes more memory than is free on `device`."""
        wanted, free = self.model, free_bytes(device)
        if wanted <= free:
            return
        fits = [f"effort=normal trains one block at a time, in {self.block / 1e9:.1f} GB"]
        if device != _HOST and wanted <= (on_host := free_bytes(_HOST)):
            fits.append(f"the host has {on_host / 1e9:.1f} GB free: leave out the device")
        where = "of memory" if device == _HOST else f"of {device}'s memory"
        raise UserError(
            f"training all blocks together takes {wanted / 1e9:.1f} GB and {free / 1e9:.1f} GB {where} are free; "
            + "; or ".join(fits)
        )

    def _largest_block(self) -> tuple[int, int]:
        """Weights of the largest block, and the sum of its layers' input and output widths."""
        found = []
        for path in self.skeleton.blocks:
            inside = [shape for name, shape in self.shapes.items() if name.startswith(f"{path}.")]
            found.append((sum(rows * columns for rows, columns in inside), sum(map(sum, inside))))
        return max(found)


def tuned(states: HiddenStates, records: list[BlockRecord], observe: Observer) -> list[BlockRecord]:
    """Return the blocks' records, of trained layers if the recipe tunes the model. Raises UserError if it cannot."""
    if not isinstance(states, CalibratedStates) or (training := states.job.recipe.training.model) is None:
        return records
    job = states.job
    if (done := committed_tuning(job.folder)) is not None:
        return done
    progress = TrainingProgress("the whole model", observe, "KL")
    observe(Stage("training all blocks together"))
    trained = _train(states, training, _StoredSolutions(job, records), progress)
    entry = progress.finish(trained)
    found = []
    for i, record in enumerate(records):
        observe(Stage(f"writing the trained layers of block {i + 1} of {len(records)}"))
        with open_block(job, i) as block:
            found.append(_commit(states, block, record, trained.solutions))
    found[-1] = found[-1].model_copy(update={"events": (*found[-1].events, *trained.events), "tuning": entry})
    write_mark(job.folder / TUNED_FILE, {"records": [record.to_json() for record in found]})
    return found


def committed_tuning(folder: Path) -> list[BlockRecord] | None:
    """Return the records of the tuned blocks, or None if the tuning is not done."""
    path = folder / TUNED_FILE
    return read_tuned(path) if path.is_file() else None


def read_tuned(path: Path) -> list[BlockRecord]:
    """Return the records in a tuned.json. Raises DamagedError for a damaged one."""
    return [BlockRecord.model_validate(record) for record in read_mark(path)["records"]]


def _train(
    states: CalibratedStates, training: ModelTraining, solved: "_StoredSolutions", progress: TrainingProgress
) -> TrainedLayers:
    job, skeleton = states.job, states.job.skeleton
    count, ids = len(skeleton.blocks), job.ids
    states.release_device()  # the layers need that memory
    outputs = states.inputs(count, "full")
    host_job = replace(job, device=_HOST)
    with ExitStack() as stack:
        stack.callback(move, skeleton.model, _HOST)
        blocks: list[tuple[OfWeights, tuple[str, ...]]] = []
        for i in range(count):
            block = stack.enter_context(open_block(host_job, i))
            for module in block.linears.values():  # training replaces these weights; the rest of the block is needed
                empty = torch.empty_like(module.get_parameter("weight"), device="meta")
                module.register_parameter("weight", nn.Parameter(empty, requires_grad=False))
            blocks.append((of_weights(states, block), tuple(block.linears)))
        stack.enter_context(skeleton.resident(""))
        move(skeleton.model, job.device)
        problem = ModelProblem(
            plans={name: layer.plan for name, layer in solved.layers.items()},
            solutions=solved,
            blocks=tuple(blocks),
            count=len(ids),
            inputs=lambda chosen: states.calls.start(ids[list(chosen)].to(job.device)),
            targets=lambda chosen: outputs.samples(chosen).to(job.device),
            loss=_divergence(states),
            told=progress,
        )
        try:
            return training.run(problem)
        except (ValueError, MemoryError) as error:
            raise UserError(f"training all blocks together: {error}") from None


def _divergence(states: CalibratedStates) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the KL of the model's output, from the last block's, in nats per token."""
    job = states.job
    ids, calls = job.ids.to(job.device), replace(states.calls, extras=to_device(states.calls.extras, job.device))

    def log_probabilities(hidden: Tensor, gradient: bool) -> Tensor:
        some = ids[: len(hidden)]  # the model's loop wants token ids, though its blocks do not compute here
        return torch.log_softmax(calls.finish(some, hidden, gradient=gradient).float(), dim=-1)

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            right = log_probabilities(target, False)
        ours = log_probabilities(hidden, torch.is_grad_enabled())
        total = torch.nn.functional.kl_div(ours, right, reduction="sum", log_target=True)
        return total / right[..., 0].numel()

    return loss


class _StoredSolutions(Mapping[str, Solution]):
    """The solved layers on the job's device, read from the work directory on access; one block is in memory."""

    def __init__(self, job: Job, records: Sequence[BlockRecord]) -> None:
        self.layers = {name: layer for record in records for name, layer in record.layers.items()}
        self._job = job
        self._files = {name: (record.file, kept_file(i)) for i, record in enumerate(records) for name in record.layers}
        self._read = lru_cache(maxsize=1)(lambda *files: [read_tensors(job.folder / file) for file in files])

    def __getitem__(self, name: str) -> Solution:
        stored, kept = (
            to_device(tensors_of(name, tensors), self._job.device) for tensors in self._read(*self._files[name])
        )
        stored.pop("bias", None)
        return Solution(unpack(stored, self.layers[name].layout, name), None, (), kept)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@torch.no_grad()
def _commit(
    states: CalibratedStates, block: LoadedBlock, record: BlockRecord, solutions: Mapping[str, Solution]
) -> BlockRecord:
    """Write a block with its trained layers, and make the next block's inputs."""
    job, i, solved = states.job, block.number, SolvedLayers()
    stats = input_statistics(job, block.linears, states.passes(block), hessian=False)
    for name, module in block.linears.items():
        before, layer = record.layers[name], Layer(name, linear_weight(module).float(), None, stats.get(name))
        after = put_in_place(job, layer, module, before.plan, solutions[name], solved)
        solved.records[name] = after.annotated(before.seconds, before.notes)
    states.advance(i, block.module)
    states.delete(i)
    file = f"tuned-{i:05d}.safetensors"
    written = solved.write(job, block, file)
    return record.model_copy(update={"file": file, "tensors_sum": written, "layers": solved.records})
