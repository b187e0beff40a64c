"""The loop: one block in memory at a time, from the first to the last, each committed when it is done.

for block in blocks:
    stats   = collect(block, inputs)      # of the full-precision block, on the quantized blocks' outputs
    weights = solve(layers, recipe)
    inputs  = forward(quantized block)    # errors of earlier blocks are seen by later ones
    commit(block)                         # tensors and activations, by atomic renames
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitquilt.errors import UserError
from bitquilt.models.linear import QuantizedLinear, replace_module
from bitquilt.models.structure import vocabulary_size
from bitquilt.packing import layout_from_json
from bitquilt.runtime.calibration import context_limit
from bitquilt.runtime.calls import Call, check_order, embed, finish, learn_extras, record_calls
from bitquilt.runtime.firstpass import Look, gradients_of, planned
from bitquilt.runtime.gradients import attention_aware
from bitquilt.runtime.job import Job, head_path, targets
from bitquilt.runtime.layers import ERROR_TOKENS, check_weights, mean_output_error, quantize_layers
from bitquilt.runtime.progress import BlockDone, Observer, Stage
from bitquilt.runtime.stats import collect
from bitquilt.runtime.workdir import Activations, read_tensors, write_json, write_tensors
from bitquilt.types import Event, LayerStats

_SAMPLE_TOKENS = 4096  # for objectives that need outputs (SliM-LLM: "a token subsample is enough")
_PROBE = (2, 32)
HEAD_FILE, _HEAD_RECORD = "head.safetensors", "head.json"


@dataclass(frozen=True, eq=False)
class _Streams:
    """Everything that flows through the blocks, as calls by batch shape."""

    extras: tuple[Any, ...] | None
    calls: dict[tuple[int, ...], list[Call]]
    probe_ids: Tensor

    def run(self, i: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Block i on `[batch, tokens, width]`, called as the model calls it."""
        return self.calls[tuple(hidden.shape[:2])][i](block, hidden)


def stream(job: Job, observe: Observer) -> list[dict[str, Any]]:
    """Quantize every block; returns their records. Continues after the last committed block.

    Raises UserError naming layer or block where weights or activations are not finite.
    """
    skeleton, blocks = job.skeleton, job.skeleton.blocks
    records = committed(job.folder, len(blocks))
    head = committed_head(job.folder)
    if (job.folder / "logits.safetensors").exists():
        return records + head
    observe(Stage("reading the embedding and making the first block's inputs"))
    streams = _open_streams(job, resumed=bool(records))
    job = planned(job, partial(_full_pass, job, streams), observe)
    for i in range(len(records), len(blocks)):
        started = time.perf_counter()
        record = _block(job, streams, i, observe)
        record["seconds"] = round(time.perf_counter() - started, 3)
        write_json(job.folder / f"block-{i:05d}.json", record)
        _drop(job.folder, i)
        records.append(record)
        observe(BlockDone(i, len(blocks), mean_output_error(record), record["seconds"]))
    if job.include_head and not head:
        head = [_head(job, streams, observe)]
    observe(Stage("computing the quantized model's logits on the probe"))
    skeleton.load("")
    if head:
        _quantized_head(job, head[0])
    probe = read_tensors(job.folder / f"probe-{len(blocks):05d}.safetensors")["hidden"]
    logits = finish(skeleton, streams.probe_ids, probe, streams.extras)
    skeleton.release_outer()
    write_tensors(job.folder / "logits.safetensors", {"ids": streams.probe_ids, "logits": logits.float()})
    return records + head


def committed(folder: Path, blocks: int) -> list[dict[str, Any]]:
    """Records of the blocks that are done, in order."""
    records = []
    for i in range(blocks):
        path = folder / f"block-{i:05d}.json"
        if not path.is_file():
            break
        records.append(json.loads(path.read_text()))
    return records


def committed_head(folder: Path) -> list[dict[str, Any]]:
    """The head's record, if it is done."""
    path = folder / _HEAD_RECORD
    return [json.loads(path.read_text())] if path.is_file() else []


def _open_streams(job: Job, resumed: bool) -> _Streams:
    skeleton, folder = job.skeleton, job.folder
    vocabulary = vocabulary_size(skeleton.model)
    generator = torch.Generator().manual_seed(0)
    count, length = _PROBE
    length = min(length, context_limit(skeleton.checkpoint.config) or length)
    probe_ids = torch.randint(0, vocabulary, (count, length), generator=generator)
    skeleton.load("")
    template = skeleton.template(skeleton.blocks[0])
    skeleton.load(skeleton.blocks[0])
    extras = learn_extras(skeleton, probe_ids)
    skeleton.reset(skeleton.blocks[0], template)
    check_order(skeleton, probe_ids, extras)
    calls: dict[tuple[int, ...], list[Call]] = {tuple(probe_ids.shape): record_calls(skeleton, probe_ids, extras)}
    for rows in job.batches():
        assert job.ids is not None
        shape = tuple(job.ids[rows].shape)
        if shape not in calls:
            calls[shape] = record_calls(skeleton, job.ids[rows], extras)
    if not resumed:
        write_tensors(folder / "probe-00000.safetensors", {"hidden": embed(skeleton, probe_ids)})
        if job.ids is not None:
            width = embed(skeleton, job.ids[:1, :1]).shape[-1]
            inputs = Activations.create(folder / ".activations.tmp", (*job.ids.shape, width))
            for rows in job.batches():
                inputs.write(rows, embed(skeleton, job.ids[rows]))
            inputs.commit(folder / "activations-00000.f32")
    skeleton.release_outer()
    return _Streams(extras, calls, probe_ids)


@torch.no_grad()
def _block(job: Job, streams: _Streams, i: int, observe: Observer) -> dict[str, Any]:
    """Quantize block i and make the next block's inputs; all files of the block are in place when it returns."""
    skeleton, folder, path = job.skeleton, job.folder, job.skeleton.blocks[i]
    template = skeleton.template(path)
    block = skeleton.load(path)
    linears = targets(skeleton, path, block, job.skip)
    check_weights(linears)
    inputs = _inputs(job, i)
    stats = _statistics(job, linears, _through_block(job, streams, i, block, inputs), path)
    events: list[Event] = []
    if getattr(job.recipe, "hessian", "input") == "attention" and inputs is not None:
        passes = _through_block(job, streams, i, block, inputs)
        stats, events = attention_aware(stats, gradients_of(job, block, linears, passes, hessian=True))
    record, tensors = quantize_layers(job, i, linears, stats, observe)
    record["events"] = [*map(asdict, events), *record["events"]]
    _forward(job, streams, i, block, inputs)
    replaced = {f"{name}.weight" for name in linears}
    kept = [s for s in skeleton.sources[path] if skeleton.parameters.get(s) not in replaced]
    file = f"block-{i:05d}.safetensors"
    write_tensors(folder / file, tensors | skeleton.checkpoint.read(kept))
    skeleton.reset(path, template)
    return {"block": path, "file": file, **record}


def _through_block(
    job: Job, streams: _Streams, i: int, block: nn.Module, inputs: Activations | None
) -> Iterator[Tensor] | None:
    """One forward pass of the block per batch, or None without calibration."""
    if inputs is None:
        return None
    return (streams.run(i, block, inputs.read(rows)) for rows in job.batches())


@torch.no_grad()
def _full_pass(job: Job, streams: _Streams, i: int, look: Look) -> None:
    """Show `look` block i in full precision on the full-precision blocks' outputs, and make the next one's inputs."""
    skeleton, folder, path = job.skeleton, job.folder, job.skeleton.blocks[i]
    template = skeleton.template(path)
    block = skeleton.load(path)
    linears = targets(skeleton, path, block, job.skip)
    check_weights(linears)
    file = folder / (f"activations-{i:05d}.f32" if i == 0 else f"first-{i:05d}.f32")
    inputs = _inputs(job, i, file)
    look(block, linears, _through_block(job, streams, i, block, inputs))
    if inputs is not None and i + 1 < len(skeleton.blocks):
        outputs = Activations.create(folder / ".activations.tmp", inputs.shape)
        for rows in job.batches():
            outputs.write(rows, streams.run(i, block, inputs.read(rows)))
        outputs.commit(folder / f"first-{i + 1:05d}.f32")
    if i:
        file.unlink()
    skeleton.reset(path, template)


def _statistics(
    job: Job, linears: Mapping[str, nn.Module], passes: Iterable[object] | None, where: str
) -> dict[str, LayerStats]:
    if passes is None or job.ids is None:
        return {}
    sample = _SAMPLE_TOKENS if "sample" in job.recipe.needs else ERROR_TOKENS
    try:
        return collect(linears, passes, hessian="hessian" in job.recipe.needs, sample=sample, tokens=job.ids.numel())
    except ValueError as error:
        raise UserError(f"{where}: {error}; calibrate a model whose activations are finite") from None


@torch.no_grad()
def _head(job: Job, streams: _Streams, observe: Observer) -> dict[str, Any]:
    """Quantize the head on the last block's outputs; its files are in place when this returns."""
    skeleton, folder = job.skeleton, job.folder
    path, count = head_path(skeleton), len(skeleton.blocks)
    observe(Stage(f"quantizing the head {path}"))
    started = time.perf_counter()
    skeleton.load("")
    linears = {path: skeleton.model.get_submodule(path)}
    check_weights(linears)
    inputs = _inputs(job, count)
    passes = None
    if inputs is not None and job.ids is not None:
        ids = job.ids
        passes = (finish(skeleton, ids[rows], inputs.read(rows), streams.extras) for rows in job.batches())
    record, tensors = quantize_layers(job, count, linears, _statistics(job, linears, passes, path), observe)
    write_tensors(folder / HEAD_FILE, tensors)
    skeleton.release_outer()
    record["seconds"] = round(time.perf_counter() - started, 3)
    record = {"block": path, "file": HEAD_FILE, **record}
    write_json(folder / _HEAD_RECORD, record)
    (folder / f"activations-{count:05d}.f32").unlink(missing_ok=True)
    return record


def _quantized_head(job: Job, record: dict[str, Any]) -> None:
    """Put the stored head into the model."""
    path = record["block"]
    prefix = f"{path}."
    tensors = {key.removeprefix(prefix): value for key, value in read_tensors(job.folder / HEAD_FILE).items()}
    layout = layout_from_json(record["layers"][path]["layout"], path)
    bias = getattr(job.skeleton.model.get_submodule(path), "bias", None)
    module = QuantizedLinear.from_tensors(tensors, layout, None if bias is None else bias.data)
    replace_module(job.skeleton.model, path, module)


def _forward(job: Job, streams: _Streams, i: int, block: nn.Module, inputs: Activations | None) -> None:
    """Send calibration and probe through the quantized block; the results are the next block's inputs."""
    following = f"{i + 1:05d}"
    needed = i + 1 < len(job.skeleton.blocks) or job.include_head
    if inputs is not None and needed:
        outputs = Activations.create(job.folder / ".activations.tmp", inputs.shape)
        for rows in job.batches():
            hidden = inputs.read(rows)
            output = streams.run(i, block, hidden)
            _check_outputs(job, i, output)
            outputs.write(rows, output)
        outputs.commit(job.folder / f"activations-{following}.f32")
    probe = read_tensors(job.folder / f"probe-{i:05d}.safetensors")["hidden"]
    output = streams.run(i, block, probe)
    _check_outputs(job, i, output)
    write_tensors(job.folder / f"probe-{following}.safetensors", {"hidden": output})


def _check_outputs(job: Job, i: int, output: Tensor) -> None:
    if not bool(torch.isfinite(output).all()):
        raise UserError(f"the output of quantized block {job.skeleton.blocks[i]} holds NaN or Inf")


def _inputs(job: Job, i: int, path: Path | None = None) -> Activations | None:
    if job.ids is None:
        return None
    path = path or job.folder / f"activations-{i:05d}.f32"
    tokens = job.ids.numel()
    width = path.stat().st_size // (4 * tokens)
    return Activations(path, (*job.ids.shape, width))


def _drop(folder: Path, i: int) -> None:
    """Inputs of a committed block are of no more use."""
    (folder / f"activations-{i:05d}.f32").unlink(missing_ok=True)
    (folder / f"probe-{i:05d}.safetensors").unlink(missing_ok=True)
