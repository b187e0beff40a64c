"""Hidden states between the blocks: `open_states` returns `HiddenStates` of a probe, or `CalibratedStates` on disk.

Both know how the model calls its blocks; what blocks receive of the tokens besides is in further columns.
`check_activations_fit` asks the disk for room before the run writes anything.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from bitquilt.core.recipe import PlansModel, Recipe
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import Checkpoint
from bitquilt.model.structure import Skeleton, vocabulary_size
from bitquilt.stream.block_calls import BlockCalls, learn_calls
from bitquilt.stream.devices import stays_on_device
from bitquilt.stream.embedding_and_head import put_tables
from bitquilt.stream.job import CalibratedJob, Job, LoadedBlock
from bitquilt.stream.workdir import ActivationFile, check_disk, read_tensors, write_state

Model = Literal["quantized", "full", "first pass"]
"""Whose hidden states: of the model being quantized, of the full-precision model, or of the latter in the pass over the
whole model before any block is quantized. Before block 0 all three are the same."""
_PROBE = (2, 32)
_TEMPORARY = ".activations.tmp"


@dataclass(eq=False)
class HiddenStates:
    """The hidden states of a small probe `probe_ids`, from which the last logits are computed."""

    job: Job
    calls: BlockCalls
    probe_ids: Tensor

    def probe(self, i: int) -> Tensor:
        """Return the probe's hidden states before block i."""
        return read_tensors(self._probe_file(i))["hidden"]

    def advance(self, i: int, block: nn.Module) -> None:
        """Send the inputs of block i through the quantized `block`; the results are the next block's inputs."""
        hidden = self.calls.run(i, block, self.probe(i))
        self.check_output(i, hidden, "quantized")
        write_state(self._probe_file(i + 1), {"hidden": hidden})

    def delete(self, i: int) -> None:
        """Delete the inputs of block i, which is committed."""
        self._probe_file(i).unlink(missing_ok=True)

    def _probe_file(self, i: int) -> Path:
        return self.job.folder / probe_file(i)

    def check_output(self, i: int, output: Tensor, model: Model) -> None:
        """Raise UserError unless the output of block i in `model` is finite."""
        if not bool(torch.isfinite(output).all()):
            kind = "quantized" if model == "quantized" else "full-precision"
            raise UserError(f"the output of {kind} block {self.job.skeleton.blocks[i]} holds NaN or Inf")


@dataclass(eq=False)
class CalibratedStates(HiddenStates):
    """The hidden states of the calibration tokens as well, one file per block and model, on the device if they fit."""

    job: CalibratedJob
    _on_device: dict[str, Tensor] = field(default_factory=dict)

    def inputs(self, i: int, model: Model = "quantized") -> ActivationFile:
        """Return what block i reads in `model`."""
        name, (samples, tokens) = activation_file(i, model), self.job.ids.shape
        return ActivationFile.of(self.job.folder / name, samples, tokens, self._on_device.get(name))

    def passes(self, block: LoadedBlock, model: Model = "quantized") -> Iterator[Tensor]:
        """Yield the block's output for each batch of its inputs in `model`."""
        inputs = self.inputs(block.number, model)
        return (self.calls.run(block.number, block.module, inputs.read(rows)) for rows in self.job.batches)

    def advance(self, i: int, block: nn.Module) -> None:
        """As in `HiddenStates`, for calibration tokens and probe."""
        self.advance_calibration(i, block, "quantized")
        super().advance(i, block)
        if (
            i + 1 == len(self.job.skeleton.blocks)
            and not self.job.include_head
            and self.job.recipe.training.model is None
        ):
            self.delete_activations(i + 1)

    def advance_calibration(self, i: int, block: nn.Module, model: Model) -> None:
        """Send the calibration inputs of block i in `model` through `block`, unless nothing reads the results.

        A first pass keeps none of its own inputs.
        """
        if self._is_read(i + 1, model):
            self._send(i, block, model)
        if model == "first pass" and i > 0:
            self._delete_file(activation_file(i, model))

    def delete(self, i: int) -> None:
        """As in `HiddenStates`; the first block's inputs stay if all blocks are trained later."""
        if i > 0 or self.job.recipe.training.model is None:
            self.delete_activations(i)
            super().delete(i)

    def delete_activations(self, i: int) -> None:
        """Delete the calibration inputs of block i in both models, but not the probe's."""
        self._delete_file(activation_file(i, "quantized"))
        self._delete_file(activation_file(i, "full"))

    def release_device(self) -> None:
        """Free the memory that hidden states take on the device; their files remain."""
        self._on_device.clear()

    def _is_read(self, i: int, model: Model) -> bool:
        if i < len(self.job.skeleton.blocks):
            return True
        return model != "first pass" and (self.job.include_head or (model == "full" and self.job.trains))

    def next_inputs(self, i: int, model: Model) -> "NextInputs | None":
        """Return what collects the outputs of block i in `model`, or None where nothing reads them."""
        return NextInputs(self, i, model) if self._is_read(i + 1, model) else None

    def _send(self, i: int, block: nn.Module, model: Model) -> None:
        inputs, outputs = self.inputs(i, model), NextInputs(self, i, model)
        for rows in self.job.batches:
            outputs.add(rows, self.calls.run(i, block, inputs.read(rows)))
        outputs.commit()

    def _delete_file(self, name: str) -> None:
        self._on_device.pop(name, None)
        (self.job.folder / name).unlink(missing_ok=True)

    def keep_on_device(self, name: str, batches: list[Tensor]) -> None:
        """Hold what the file `name` holds on the device too."""
        self._on_device[name] = torch.cat(batches)


class NextInputs:
    """The outputs of block `i` in `model`, written batch by batch: the next block's inputs."""

    def __init__(self, states: CalibratedStates, i: int, model: Model) -> None:
        self._states, self._block, self._model = states, i, model
        job = states.job
        shape = (*job.ids.shape, states.calls.width(i + 1))
        self._file = ActivationFile.create(job.folder / _TEMPORARY, shape)
        self._stays = stays_on_device(4 * math.prod(shape), job.device)
        self._batches: list[Tensor] = []

    def add(self, rows: slice, output: Tensor) -> None:
        """Write one batch. Raises UserError unless it is finite."""
        self._states.check_output(self._block, output, self._model)
        self._file.write(rows, output)
        if self._stays:
            self._batches.append(output.detach().float())

    def commit(self) -> None:
        """Make the file the next block's inputs."""
        name = activation_file(self._block + 1, self._model)
        self._file.commit(self._states.job.folder / name)
        if self._stays:
            self._states.keep_on_device(name, self._batches)


def open_states(job: Job, resumed: bool) -> HiddenStates:
    """Learn how the blocks are called; unless `resumed`, also make the first block's inputs.

    The result's `job` computes with the rounded embedding and head, where the run rounds them.
    """
    batches = [_probe_ids(job.skeleton), *(_shapes_of_batches(job) if isinstance(job, CalibratedJob) else ())]
    with job.skeleton.resident(""):
        job = put_tables(job)
        calls = learn_calls(job.skeleton, batches, job.device)
        if isinstance(job, CalibratedJob):
            widest = max(calls.width(i) for i in range(len(job.skeleton.blocks)))
            experts = (2 if job.recipe.needs.drift else 1) if job.skeleton.experts else 0
            _check_width_fits(job.folder, job.recipe, job.ids.numel(), widest, experts)
        if not resumed:
            write_state(job.folder / probe_file(0), {"hidden": calls.start(batches[0])})
            if isinstance(job, CalibratedJob):
                _write_first_inputs(job, calls)
    if isinstance(job, CalibratedJob):
        return CalibratedStates(job, calls, batches[0])
    return HiddenStates(job, calls, batches[0])


def check_activations_fit(work: Path, checkpoint: Checkpoint, recipe: Recipe, tokens: int) -> None:
    """Raise UserError when the disk cannot hold the hidden states of `tokens` tokens that the run is sure to write."""
    _check_width_fits(work, recipe, tokens, checkpoint.model_config.hidden_size)


def _check_width_fits(work: Path, recipe: Recipe, tokens: int, width: int, more: int = 0) -> None:
    """`more`: further copies of the hidden states that are on disk at once, what a block's experts receive."""
    found = sum(path.stat().st_size for path in work.glob("activations-*.f32") if path.is_file())
    check_disk(work, max(0, (_copies(recipe) + more) * 4 * tokens * width - found), "the calibration activations")


def _copies(recipe: Recipe) -> int:
    """How often the calibration's hidden states are on disk at once.

    A block's inputs and outputs, the same in the full-precision model, and, for a pass over the whole model before the
    first block or after the last, what the first block reads.
    """
    if recipe.needs.full_model:
        return 5 if recipe.training.model else 4
    return 3 if isinstance(recipe, PlansModel) else 2


def _probe_ids(skeleton: Skeleton) -> Tensor:
    count, length = _PROBE
    length = min(length, skeleton.config.context_length or length)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary_size(skeleton.model), (count, length), generator=generator)


def _shapes_of_batches(job: CalibratedJob) -> Iterator[Tensor]:
    """Yield token ids in every shape in which a block is called: batches, and the powers of two of a training."""
    for rows in job.batches:
        yield job.ids[rows]
    training = job.recipe.training
    largest = max((stage.batch for stage in (training.block, training.model) if stage is not None), default=0)
    for power in range(largest.bit_length()):
        yield job.ids[:1].expand(1 << power, -1)


def _write_first_inputs(job: CalibratedJob, calls: BlockCalls) -> None:
    inputs = ActivationFile.create(job.folder / _TEMPORARY, (*job.ids.shape, calls.width(0)))
    for rows in job.batches:
        inputs.write(rows, calls.start(job.ids[rows]))
    inputs.commit(job.folder / activation_file(0, "quantized"))


def probe_file(i: int) -> str:
    """Name of the file of the probe's hidden states before block i."""
    return f"probe-{i:05d}.safetensors"


def activation_file(i: int, model: Model) -> str:
    """Name of the file of what block i reads in `model`."""
    if i == 0 or model == "quantized":
        return f"activations-{i:05d}.f32"
    return f"activations-{i:05d}.full.f32" if model == "full" else f"first-{i:05d}.f32"
