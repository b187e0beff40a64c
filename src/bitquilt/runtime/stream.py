"""The loop: one block in memory at a time, from the first to the last, each committed when it is done.

for block in blocks:
    stats   = collect(block, inputs)      # of the full-precision block, on the quantized blocks' outputs
    weights = solve(layers, recipe)
    inputs  = forward(quantized block)    # errors of earlier blocks are seen by later ones
    commit(block)                         # tensors and activations, by atomic renames
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitquilt.errors import UserError
from bitquilt.models.linear import QuantizedLinear, linear_weight, replace_module
from bitquilt.models.structure import Skeleton, linear_layers, vocabulary_size
from bitquilt.packing import bits_per_weight, layout_to_json, pack
from bitquilt.runtime.calibration import context_limit
from bitquilt.runtime.calls import Call, check_order, embed, finish, learn_extras, record_calls
from bitquilt.runtime.progress import BlockDone, LayerDone, Observer, Stage
from bitquilt.runtime.stats import collect
from bitquilt.runtime.workdir import Activations, read_tensors, write_json, write_tensors
from bitquilt.types import Event, Layer, LayerPlan, LayerStats, Recipe, Solution, check_finite

_SAMPLE_TOKENS = 4096  # for objectives that need outputs (SliM-LLM: "a token subsample is enough")
_ERROR_TOKENS = 256  # to report each layer's relative output error
_PROBE = (2, 32)


@dataclass(frozen=True, eq=False)
class Job:
    """A run's inputs: model, method, calibration ids `[samples, tokens]` (None if the recipe needs none)."""

    skeleton: Skeleton
    recipe: Recipe
    ids: Tensor | None
    folder: Path
    batch_size: int
    skip: tuple[str, ...] = ()
    plans: Mapping[str, LayerPlan] | None = None


@dataclass(frozen=True, eq=False)
class _Streams:
    """Everything that flows through the blocks, as calls by batch shape."""

    extras: tuple[Any, ...] | None
    calls: dict[tuple[int, ...], list[Call]]
    probe_ids: Tensor


def stream(job: Job, observe: Observer) -> list[dict[str, Any]]:
    """Quantize every block; returns their records (see `_solve_block`). Continues after the last committed block.

    Raises UserError naming layer or block where weights or activations are not finite.
    """
    skeleton, blocks = job.skeleton, job.skeleton.blocks
    records = committed(job.folder, len(blocks))
    if len(records) == len(blocks) and (job.folder / "logits.safetensors").exists():
        return records
    observe(Stage("reading the embedding and making the first block's inputs"))
    streams = _open_streams(job, resumed=bool(records))
    for i in range(len(records), len(blocks)):
        started = time.perf_counter()
        record = _block(job, streams, i, observe)
        record["seconds"] = round(time.perf_counter() - started, 3)
        write_json(job.folder / f"block-{i:05d}.json", record)
        _drop(job.folder, i)
        records.append(record)
        errors = [e for layer in record["layers"].values() if (e := layer["output_error"]) is not None]
        observe(BlockDone(i, len(blocks), sum(errors) / len(errors) if errors else None, record["seconds"]))
    observe(Stage("computing the quantized model's logits on the probe"))
    skeleton.load("")
    probe = read_tensors(job.folder / f"probe-{len(blocks):05d}.safetensors")["hidden"]
    logits = finish(skeleton, streams.probe_ids, probe, streams.extras)
    skeleton.release_outer()
    write_tensors(job.folder / "logits.safetensors", {"ids": streams.probe_ids, "logits": logits.float()})
    return records


def committed(folder: Path, blocks: int) -> list[dict[str, Any]]:
    """Records of the blocks that are done, in order."""
    records = []
    for i in range(blocks):
        path = folder / f"block-{i:05d}.json"
        if not path.is_file():
            break
        records.append(json.loads(path.read_text()))
    return records


def targets(skeleton: Skeleton, path: str, block: nn.Module, skip: Sequence[str]) -> dict[str, nn.Module]:
    """The block's layers to quantize, by path inside the block: linear, read unchanged, not skipped on request."""
    plain = set(skeleton.parameters.values())
    found = {}
    for name, module in linear_layers(block).items():
        full = f"{path}.{name}"
        if f"{full}.weight" in plain and not any(fnmatch(full, pattern) for pattern in skip):
            found[name] = module
    return found


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
    for rows in _batches(job):
        assert job.ids is not None
        shape = tuple(job.ids[rows].shape)
        if shape not in calls:
            calls[shape] = record_calls(skeleton, job.ids[rows], extras)
    if not resumed:
        write_tensors(folder / "probe-00000.safetensors", {"hidden": embed(skeleton, probe_ids)})
        if job.ids is not None:
            width = embed(skeleton, job.ids[:1, :1]).shape[-1]
            inputs = Activations.create(folder / ".activations.tmp", (*job.ids.shape, width))
            for rows in _batches(job):
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
    _check_weights(path, linears)
    inputs = _inputs(job, i)
    stats = _statistics(job, streams, i, block, linears, inputs)
    record: dict[str, Any] = {"block": path, "layers": {}, "events": []}
    tensors: dict[str, Tensor] = {}
    prepared: tuple[LayerStats | None, Any] | None = None
    for name, module in linears.items():
        started = time.perf_counter()
        full = f"{path}.{name}"
        try:
            layer, events = _layer(full, module, stats.get(name))
            if prepared is None or prepared[0] is not layer.stats:
                prepared = (layer.stats, job.recipe.prepare(layer.stats))
            plan, solution = _solve(job, layer, prepared[1])
        except ValueError as error:
            text = str(error)
            raise UserError(text if full in text else f"{full}: {text}") from None
        bias = getattr(module, "bias", None)
        quantized = QuantizedLinear.from_weight(solution.weight, None if bias is None else bias.data)
        replace_module(block, name, quantized)
        tensors |= {f"{full}.{key}": value for key, value in pack(solution.weight).items()}
        entry = _entry(layer, plan, solution, quantized, stats.get(name))
        entry["seconds"] = round(time.perf_counter() - started, 3)
        record["layers"][full] = entry
        record["events"] += [asdict(event) for event in (*events, *solution.events)]
        bpw = bits_per_weight(solution.weight.layout)
        observe(LayerDone(i, full, bpw, entry["output_error"], entry["seconds"]))
    _forward(job, streams, i, block, inputs)
    replaced = {f"{path}.{name}.weight" for name in linears}
    kept = [s for s in skeleton.sources[path] if skeleton.parameters.get(s) not in replaced]
    write_tensors(folder / f"block-{i:05d}.safetensors", tensors | skeleton.checkpoint.read(kept))
    skeleton.reset(path, template)
    return record


def _check_weights(path: str, linears: Mapping[str, nn.Module]) -> None:
    """Before anything is computed with them: afterwards the first layer to see a NaN is not the one that holds it."""
    try:
        for name, module in linears.items():
            check_finite(f"{path}.{name}", weight=linear_weight(module))
    except ValueError as error:
        raise UserError(f"{error}; the checkpoint is damaged, download or convert it again") from None


def _statistics(
    job: Job,
    streams: _Streams,
    i: int,
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    inputs: Activations | None,
) -> dict[str, LayerStats]:
    if inputs is None:
        return {}

    def batches() -> Iterator[None]:
        for rows in _batches(job):
            hidden = inputs.read(rows)
            streams.calls[tuple(hidden.shape[:2])][i](block, hidden)
            yield

    sample = _SAMPLE_TOKENS if "sample" in job.recipe.needs else _ERROR_TOKENS
    tokens = inputs.shape[0] * inputs.shape[1]
    try:
        return collect(linears, batches(), hessian="hessian" in job.recipe.needs, sample=sample, tokens=tokens)
    except ValueError as error:
        raise UserError(
            f"block {job.skeleton.blocks[i]}: {error}; calibrate a model whose activations are finite"
        ) from None


def _layer(full: str, module: nn.Module, stats: LayerStats | None) -> tuple[Layer, list[Event]]:
    weight = linear_weight(module).float()
    bias = getattr(module, "bias", None)
    events = []
    if stats is not None and stats.tokens == 0:
        # an expert that no token was routed to: nothing is known about its input, so every channel counts the same
        stats = LayerStats(torch.eye(weight.shape[1]), 1, None)
        events.append(Event(full, "no calibration tokens", "no token reached this layer: all channels weigh the same"))
    return Layer(full, weight, None if bias is None else bias.data.float(), stats), events


def _solve(job: Job, layer: Layer, prepared: Any) -> tuple[LayerPlan, Solution]:
    if job.plans is None:
        plan = job.recipe.allocate(job.recipe.measure(layer, prepared), layer.weight.shape[1])
    else:
        plan = job.plans[layer.name]
    return plan, job.recipe.quantize(layer, plan, prepared)


def _entry(
    layer: Layer, plan: LayerPlan, solution: Solution, module: QuantizedLinear, stats: LayerStats | None
) -> dict[str, Any]:
    difference = module.dequantize() - layer.weight
    weight_error = float(difference.square().sum() / layer.weight.square().sum().clamp_min(1e-30))
    output_error = None
    if stats is not None and stats.sample is not None:
        sample = stats.sample[:: max(1, len(stats.sample) // _ERROR_TOKENS)]
        wrong, right = sample @ difference.t(), sample @ layer.weight.t()
        output_error = float(wrong.square().sum() / right.square().sum().clamp_min(1e-30))
    return {
        "layout": layout_to_json(solution.weight.layout),
        "bits": "".join(map(str, plan.bits)),
        "group_size": plan.group_size,
        "output_error": output_error,
        "weight_error": weight_error,
        "loss": solution.loss,
    }


def _forward(job: Job, streams: _Streams, i: int, block: nn.Module, inputs: Activations | None) -> None:
    """Send calibration and probe through the quantized block; the results are the next block's inputs."""
    following = f"{i + 1:05d}"
    if inputs is not None and i + 1 < len(job.skeleton.blocks):
        outputs = Activations.create(job.folder / ".activations.tmp", inputs.shape)
        for rows in _batches(job):
            hidden = inputs.read(rows)
            output = streams.calls[tuple(hidden.shape[:2])][i](block, hidden)
            _check_outputs(job, i, output)
            outputs.write(rows, output)
        outputs.commit(job.folder / f"activations-{following}.f32")
    probe = read_tensors(job.folder / f"probe-{i:05d}.safetensors")["hidden"]
    output = streams.calls[tuple(probe.shape[:2])][i](block, probe)
    _check_outputs(job, i, output)
    write_tensors(job.folder / f"probe-{following}.safetensors", {"hidden": output})


def _check_outputs(job: Job, i: int, output: Tensor) -> None:
    if not bool(torch.isfinite(output).all()):
        raise UserError(f"the output of quantized block {job.skeleton.blocks[i]} holds NaN or Inf")


def _batches(job: Job) -> list[slice]:
    count = 0 if job.ids is None else len(job.ids)
    return [slice(start, min(start + job.batch_size, count)) for start in range(0, count, job.batch_size)]


def _inputs(job: Job, i: int) -> Activations | None:
    if job.ids is None:
        return None
    path = job.folder / f"activations-{i:05d}.f32"
    tokens = job.ids.numel()
    width = path.stat().st_size // (4 * tokens)
    return Activations(path, (*job.ids.shape, width))


def _drop(folder: Path, i: int) -> None:
    """Inputs of a committed block are of no more use."""
    (folder / f"activations-{i:05d}.f32").unlink(missing_ok=True)
    (folder / f"probe-{i:05d}.safetensors").unlink(missing_ok=True)
