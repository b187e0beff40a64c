"""What flows through the blocks, and where does it lie? open_flow(job, resumed) -> Flow: calls and inputs on disk."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitquilt.core.recipe import TrainsBlocks, TunesModel
from bitquilt.errors import UserError
from bitquilt.model.structure import vocabulary_size
from bitquilt.stream.block_calls import Call, check_order, embed, open_outer, record_calls
from bitquilt.stream.devices import stays_on_device
from bitquilt.stream.embedding_and_head import open_tables
from bitquilt.stream.job import Job
from bitquilt.stream.layers import trains, tunes
from bitquilt.stream.workdir import Activations, read_tensors, write_tensors

_PROBE = (2, 32)


@dataclass(frozen=True, eq=False)
class Flow:
    """How blocks are called, by batch shape, and the hidden states that a block reads: of the calibration tokens,
    of a small probe, and, where the recipe compares, of the calibration tokens in the full-precision model."""

    job: Job
    extras: tuple[Any, ...] | None
    calls: dict[tuple[int, ...], list[Call]]
    probe_ids: Tensor
    kept: dict[str, Tensor] = field(default_factory=dict)  # activations on the device, by file

    def run(self, i: int, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Block i on `[batch, tokens, width]`, called as the model calls it."""
        return self.calls[tuple(hidden.shape[:2])][i](block, hidden.to(self.job.device))

    def inputs(self, i: int, full: bool = False) -> Activations | None:
        """What block i reads, None without calibration; `full`: in the full-precision model."""
        return self._read(_activations(i, full))

    def first_inputs(self, i: int) -> Activations | None:
        """What block i reads in a pass over the full-precision model before any block is quantized."""
        return self._read(_first(i))

    def probe(self, i: int) -> Tensor:
        """The probe's hidden states before block i."""
        return read_tensors(self.job.folder / f"probe-{i:05d}.safetensors")["hidden"]

    def pass_on(self, i: int, block: nn.Module, full: bool = False, always: bool = False) -> None:
        """Send the inputs of block i through `block`; the results are the next block's inputs. `always`: also where
        nothing reads them next."""
        inputs = self.inputs(i, full)
        if inputs is not None and (i + 1 < len(self.job.skeleton.blocks) or self.job.include_head or always):
            self._send(i, block, inputs, _activations(i + 1, full), full)

    def pass_first_on(self, i: int, block: nn.Module) -> None:
        """The same in the first pass, which ends with the last block and leaves only the first block's inputs."""
        inputs = self.first_inputs(i)
        if inputs is not None and i + 1 < len(self.job.skeleton.blocks):
            self._send(i, block, inputs, _first(i + 1), True)
        if i > 0:
            self.kept.pop(_first(i), None)
            (self.job.folder / _first(i)).unlink(missing_ok=True)

    def pass_probe_on(self, i: int, block: nn.Module) -> None:
        """The same for the probe."""
        hidden = self._checked(i, block, self.probe(i), False)
        write_tensors(self.job.folder / f"probe-{i + 1:05d}.safetensors", {"hidden": hidden})

    def drop(self, i: int) -> None:
        """Inputs of a committed block are of no more use; but for the first's, where all blocks are trained later."""
        if i == 0 and tunes(self.job):
            return
        self.drop_activations(i)
        (self.job.folder / f"probe-{i:05d}.safetensors").unlink(missing_ok=True)

    def drop_activations(self, i: int) -> None:
        """The same without the probe, which the last logits are computed from."""
        for full in (False, True):
            self.kept.pop(_activations(i, full), None)
            (self.job.folder / _activations(i, full)).unlink(missing_ok=True)

    def _read(self, name: str) -> Activations | None:
        ids = self.job.ids
        if ids is None:
            return None
        path = self.job.folder / name
        shape = (*ids.shape, path.stat().st_size // (4 * ids.numel()))
        return Activations(path, shape, self.kept.get(name))

    def _send(self, i: int, block: nn.Module, inputs: Activations, name: str, full: bool) -> None:
        outputs = Activations.create(self.job.folder / ".activations.tmp", inputs.shape)
        stays = stays_on_device(4 * math.prod(inputs.shape), self.job.device)
        batches = []
        for rows in self.job.batches():
            output = self._checked(i, block, inputs.read(rows), full)
            outputs.write(rows, output)
            if stays:
                batches.append(output.float())
        outputs.commit(self.job.folder / name)
        if stays:
            self.kept[name] = torch.cat(batches)

    def _checked(self, i: int, block: nn.Module, hidden: Tensor, full: bool) -> Tensor:
        output = self.run(i, block, hidden)
        if not bool(torch.isfinite(output).all()):
            kind = "full-precision" if full else "quantized"
            raise UserError(f"the output of {kind} block {self.job.skeleton.blocks[i]} holds NaN or Inf")
        return output


def open_flow(job: Job, resumed: bool) -> Flow:
    """Learn how the blocks are called; at the start of a run also make the first block's inputs."""
    skeleton, folder = job.skeleton, job.folder
    vocabulary = vocabulary_size(skeleton.model)
    generator = torch.Generator().manual_seed(0)
    count, length = _PROBE
    length = min(length, skeleton.config.context_length or length)
    probe_ids = torch.randint(0, vocabulary, (count, length), generator=generator)
    extras = open_outer(skeleton, probe_ids)
    open_tables(job)
    check_order(skeleton, probe_ids, extras)
    calls: dict[tuple[int, ...], list[Call]] = {tuple(probe_ids.shape): record_calls(skeleton, probe_ids, extras)}
    for rows in job.batches():
        assert job.ids is not None
        shape = tuple(job.ids[rows].shape)
        if shape not in calls:
            calls[shape] = record_calls(skeleton, job.ids[rows], extras)
    for count in _training_batches(job):
        assert job.ids is not None
        shape = (count, job.ids.shape[1])
        if shape not in calls:
            calls[shape] = record_calls(skeleton, job.ids[:1].expand(shape), extras)
    calls = {shape: [call.to(job.device) for call in found] for shape, found in calls.items()}
    if not resumed:
        write_tensors(folder / "probe-00000.safetensors", {"hidden": embed(skeleton, probe_ids)})
        if job.ids is not None:
            width = embed(skeleton, job.ids[:1, :1]).shape[-1]
            inputs = Activations.create(folder / ".activations.tmp", (*job.ids.shape, width))
            for rows in job.batches():
                inputs.write(rows, embed(skeleton, job.ids[rows]))
            inputs.commit(folder / _activations(0, False))
    skeleton.release_outer()
    return Flow(job, extras, calls, probe_ids)


def _training_batches(job: Job) -> list[int]:
    """How many samples go through a block at once while it is trained: powers of two."""
    batch = 0
    if trains(job):
        assert isinstance(job.recipe, TrainsBlocks)
        batch = job.recipe.train_batch
    if tunes(job):
        assert isinstance(job.recipe, TunesModel)
        batch = max(batch, job.recipe.tune_batch)
    return [1 << k for k in range(batch.bit_length())]


def _activations(i: int, full: bool) -> str:
    """Before the first block both models hold the same."""
    return f"activations-{i:05d}.full.f32" if full and i > 0 else f"activations-{i:05d}.f32"


def _first(i: int) -> str:
    """The first pass begins with what the first block reads."""
    return f"first-{i:05d}.f32" if i > 0 else _activations(0, False)
