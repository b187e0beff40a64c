"""How is one block quantized? quantize_block(job, flow, i, observe) -> record, with all its files in place.

Plain recipes measure every layer in one pass of the full-precision block. Recipes that need the drift of the inputs
have the full-precision block run beside, and a layer is measured when the layers it follows are quantized.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from bitquilt.core.events import Observer
from bitquilt.core.types import Event, LayerStats
from bitquilt.errors import UserError
from bitquilt.stream.activations import Flow
from bitquilt.stream.block_training import keep, train_block
from bitquilt.stream.drift import Seen, Stage, beside, collect_pairs, find_stages, observe_pass
from bitquilt.stream.first_pass import Look, gradients_of
from bitquilt.stream.gradients import attention_aware
from bitquilt.stream.job import Job, targets
from bitquilt.stream.layers import ERROR_TOKENS, Done, check_weights, quantize_layers, trains, tunes
from bitquilt.stream.prefetch import Blocks
from bitquilt.stream.statistics import collect
from bitquilt.stream.workdir import Activations, write_tensors

SAMPLE_TOKENS = 4096  # for objectives that need outputs (SliM-LLM: "a token subsample is enough")


@torch.no_grad()
def quantize_block(job: Job, flow: Flow, i: int, blocks: Blocks, observe: Observer) -> dict[str, Any]:
    """Quantize block i and make the next block's inputs; all files of the block are in place when it returns."""
    skeleton, path = job.skeleton, job.skeleton.blocks[i]
    template = skeleton.template(path)
    block = blocks.load(i)
    linears = targets(skeleton, path, block, job.skip)
    check_weights(linears)
    done, full = Done(), beside(block) if runs_beside(job) else None
    if full is not None and compares(job):
        _by_stages(job, flow, i, block, full, linears, observe, done)
    else:
        stats, events = _measured(job, flow, i, block, linears)
        done.record["events"] += map(asdict, events)
        quantize_layers(job, i, linears, stats, observe, done)
    if full is not None:
        flow.pass_on(i, full, full=True, always=trains(job) or tunes(job))
        if trains(job) and done.solutions:  # none where every layer of the block is skipped
            train_block(job, flow, i, full, linears, done, observe)
        keep(job, i, done)
    flow.pass_on(i, block)
    flow.pass_probe_on(i, block)
    if i + 1 == len(skeleton.blocks) and not job.include_head and not tunes(job):
        flow.drop_activations(i + 1)
    replaced = {f"{name}.weight" for name in linears}
    kept = [s for s in skeleton.sources[path] if skeleton.parameters.get(s) not in replaced]
    file = f"block-{i:05d}.safetensors"
    write_tensors(job.folder / file, done.tensors | skeleton.checkpoint.read(kept))
    skeleton.reset(path, template)
    return {"block": path, "file": file, **done.record}


@torch.no_grad()
def look_at_block(job: Job, flow: Flow, blocks: Blocks, i: int, look: Look) -> None:
    """Show `look` block i in full precision on the full-precision blocks' outputs, and make the next one's inputs."""
    skeleton, path = job.skeleton, job.skeleton.blocks[i]
    template = skeleton.template(path)
    block = blocks.load(i)
    linears = targets(skeleton, path, block, job.skip)
    check_weights(linears)
    look(block, linears, _through(job, flow, i, block, flow.first_inputs(i)))
    flow.pass_first_on(i, block)
    skeleton.reset(path, template)


def compares(job: Job) -> bool:
    """Whether layers are measured against the full-precision model, stage by stage."""
    return job.ids is not None and job.recipe.needs.drift


def runs_beside(job: Job) -> bool:
    """Whether the full-precision model runs beside, for whatever reason."""
    return job.ids is not None and job.recipe.needs.full_model


def statistics(
    job: Job, linears: Mapping[str, nn.Module], passes: Iterable[object] | None, where: str, sample_only: bool = False
) -> dict[str, LayerStats]:
    """Statistics of the inputs of `linears` while `passes` is iterated; none without calibration."""
    if passes is None or job.ids is None:
        return {}
    hessian = job.recipe.needs.hessian and not sample_only
    try:
        return collect(linears, passes, hessian=hessian, sample=_kept_tokens(job), tokens=job.ids.numel())
    except ValueError as error:
        raise UserError(f"{where}: {error}; calibrate a model whose activations are finite") from None


def paired_statistics(job: Job, stage: Stage, passes: Iterable[tuple[Seen, Seen]], where: str) -> dict[str, LayerStats]:
    """The same for a paired stage, drift included, by path inside the block."""
    assert job.ids is not None
    try:
        return collect_pairs(stage, passes, sample=_kept_tokens(job), tokens=job.ids.numel())
    except ValueError as error:
        raise UserError(f"{where}: {error}; calibrate a model whose activations are finite") from None


def _kept_tokens(job: Job) -> int:
    return SAMPLE_TOKENS if job.recipe.needs.sample else ERROR_TOKENS


def _through(job: Job, flow: Flow, i: int, block: nn.Module, inputs: Activations | None) -> Iterator[Tensor] | None:
    """One forward pass of the block per batch, or None without calibration."""
    return None if inputs is None else (flow.run(i, block, inputs.read(rows)) for rows in job.batches())


def _measured(
    job: Job, flow: Flow, i: int, block: nn.Module, linears: Mapping[str, nn.Module]
) -> tuple[dict[str, LayerStats], list[Event]]:
    """Statistics of all layers of the block at once, by the Hessian that the recipe asks for."""
    inputs = flow.inputs(i)
    stats = statistics(job, linears, _through(job, flow, i, block, inputs), job.skeleton.blocks[i])
    if inputs is None or not job.recipe.needs.output_hessian:
        return stats, []
    passes = _through(job, flow, i, block, inputs)
    return attention_aware(stats, gradients_of(job, block, linears, passes, hessian=True))


def _by_stages(
    job: Job,
    flow: Flow,
    i: int,
    block: nn.Module,
    full: nn.Module,
    linears: Mapping[str, nn.Module],
    observe: Observer,
    done: Done,
) -> None:
    prefix = f"{job.skeleton.blocks[i]}."
    probe = flow.probe(i)
    names = [name.removeprefix(prefix) for name in linears]
    for stage in find_stages(full, names, lambda: flow.run(i, full, probe), job.recipe.needs.stream_drift):
        chosen = {prefix + name: linears[prefix + name] for name in stage.names}
        if stage.paired:
            found = paired_statistics(job, stage, _passes(job, flow, i, block, full, stage), prefix[:-1])
            stats = {prefix + name: value for name, value in found.items()}
        else:
            stats = statistics(job, chosen, _through(job, flow, i, block, flow.inputs(i)), prefix[:-1])
        quantize_layers(job, i, chosen, stats, observe, done)


def _passes(
    job: Job, flow: Flow, i: int, block: nn.Module, full: nn.Module, stage: Stage
) -> Iterator[tuple[Seen, Seen]]:
    here, there = flow.inputs(i), flow.inputs(i, full=True)
    assert here is not None
    assert there is not None
    for rows in job.batches():
        theirs, ours = there.read(rows), here.read(rows)
        yield (
            observe_pass(full, stage, lambda hidden=theirs: flow.run(i, full, hidden)),  # type: ignore[misc]
            observe_pass(block, stage, lambda hidden=ours: flow.run(i, block, hidden)),  # type: ignore[misc]
        )
