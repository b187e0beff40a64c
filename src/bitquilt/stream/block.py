"""`quantize_block` quantizes one loaded block and makes the next block's inputs.

Plain recipes measure every layer in one pass of the full-precision block. For recipes that need the drift of the inputs
the full-precision block runs next to the quantized one, and a layer is measured once the layers before it are
quantized. Experts come last in a block, one after another (`stream/calls/routed_inputs.py`). `input_statistics` and
`paired_statistics` are the two ways to measure.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from bitquilt.core.events import Observer
from bitquilt.core.types import Event, LayerStats
from bitquilt.model.experts import expert_paths
from bitquilt.stream.block_training import keep, train_block
from bitquilt.stream.calls.routed_inputs import ExpertStats, RoutedInputs, routed_inputs
from bitquilt.stream.drift import InputStage, SeenInputs, collect_pairs, find_stages, full_copy, observe_pass
from bitquilt.stream.gradients import attention_aware, collect_gradients
from bitquilt.stream.hidden_states import CalibratedStates, HiddenStates, NextInputs
from bitquilt.stream.job import CalibratedJob, LoadedBlock, check_weights
from bitquilt.stream.layers import ERROR_TOKENS, SolvedLayers, put_shared, quantize_layers
from bitquilt.stream.records import BlockRecord, TrainingRecord, block_stem
from bitquilt.stream.statistics import collect

ModelPass = tuple[nn.Module, Callable[[slice], Tensor]]
"""A module to observe, and one pass of a batch of calibration rows through it."""
SAMPLE_TOKENS = 4096  # for objectives that need outputs (SliM-LLM: "a token subsample is enough")


@torch.no_grad()
def quantize_block(states: HiddenStates, block: LoadedBlock, observe: Observer) -> BlockRecord:
    """Quantize a block, write its file and make the next block's inputs; all files are in place on return."""
    check_weights(block.linears)
    training = None
    if isinstance(states, CalibratedStates):
        solved = SolvedLayers(trains=states.job.trains)
        training = _calibrated(states, block, observe, solved)
    else:
        solved = SolvedLayers()
        put_shared(states.job, block)
        quantize_layers(states.job, block, {}, observe, solved)
    states.advance(block.number, block.module)
    file = f"{block_stem(block.number)}.safetensors"
    written = solved.write(states.job, block, file)
    return BlockRecord(
        block=block.path,
        file=file,
        tensors_sum=written,
        layers=solved.records,
        events=tuple(solved.events),
        training=training,
    )


def input_statistics(
    job: CalibratedJob, linears: Mapping[str, nn.Module], passes: Iterable[object], *, hessian: bool
) -> dict[str, LayerStats]:
    """Measure the inputs of `linears` while `passes` is iterated. Raises UserError naming a layer with NaN or Inf."""
    return collect(linears, passes, hessian=hessian, sample=_kept_tokens(job), tokens=job.ids.numel())


def paired_statistics(
    job: CalibratedJob, stage: InputStage, full: ModelPass, here: ModelPass, prefix: str = ""
) -> dict[str, LayerStats]:
    """Measure a paired stage in two models, drift included; `prefix`: of the layers' names in the result."""

    def observe(model: ModelPass, rows: slice) -> SeenInputs:
        module, run = model
        return observe_pass(module, stage, partial(run, rows))

    passes = ((observe(full, rows), observe(here, rows)) for rows in job.batches)
    return collect_pairs(stage, passes, sample=_kept_tokens(job), tokens=job.ids.numel(), prefix=prefix)


def _kept_tokens(job: CalibratedJob) -> int:
    return SAMPLE_TOKENS if job.recipe.needs.sample else ERROR_TOKENS


def _calibrated(
    states: CalibratedStates, block: LoadedBlock, observe: Observer, solved: SolvedLayers
) -> TrainingRecord | None:
    """Quantize with calibration data, and train if the recipe does."""
    job, needs, training = states.job, states.job.recipe.needs, None
    full = full_copy(block.module) if needs.full_model else None
    advanced = False
    put_shared(job, block)
    dense, experts = _parts(block)
    if full is not None and needs.drift:
        advanced = _by_stages(states, dense, full, observe, solved)
        if experts.linears:
            advanced = _paired_experts(states, experts, full, advanced, observe, solved)
    else:
        with routed_inputs(job.folder, block.module if experts.linears else nn.Module()) as routed:
            quantize_layers(job, dense, _measured(states, block, dense, routed, solved), observe, solved)
            _quantize_experts(job, experts, routed, None, observe, solved)
    if full is not None:
        if not advanced:
            states.advance_calibration(block.number, full, "full")
        if solved.solutions and (trains := job.recipe.training.block):  # a block whose layers are all skipped has none
            training = train_block(states, trains, block, full, solved, observe)
        keep(job, block.number, solved)
    return training


def _parts(block: LoadedBlock) -> tuple[LoadedBlock, LoadedBlock]:
    """Return the block with its other layers, and with those of its experts."""
    experts = {f"{block.path}.{name}" for name in expert_paths(block.module)}
    inside = [name for name in block.linears if name in experts]
    return block.only(name for name in block.linears if name not in experts), block.only(inside)


def _measured(
    states: CalibratedStates, block: LoadedBlock, dense: LoadedBlock, routed: RoutedInputs, solved: SolvedLayers
) -> dict[str, LayerStats]:
    """Measure the `dense` layers of the block at once, by the Hessian that the recipe asks for, and record what its
    experts receive."""
    needs = states.job.recipe.needs
    passes = routed.during(states.passes(block))
    stats = input_statistics(states.job, dense.linears, passes, hessian=needs.hessian)
    if not needs.output_hessian:
        return stats
    only = needs.attention_only
    found = collect_gradients(block.module, dense.linears, states.passes(block), hessian=True, attention_only=only)
    stats, events = attention_aware(stats, found)
    solved.events += events
    if routed.received and not only:
        detail = "experts are solved one by one, on the Hessians of their own inputs"
        solved.events += [
            Event(f"{block.path}.{path}", "no attention-aware Hessian", detail) for path in routed.received
        ]
    return stats


def _quantize_experts(
    job: CalibratedJob,
    experts: LoadedBlock,
    routed: RoutedInputs,
    full: RoutedInputs | None,
    observe: Observer,
    solved: SolvedLayers,
) -> None:
    """Quantize the layers of a block's experts, one expert after another."""
    hessian, sample = job.recipe.needs.hessian, _kept_tokens(job)
    stats = ExpertStats(experts, routed, full, hessian=hessian, sample=sample, device=job.device)
    quantize_layers(job, experts, stats, observe, solved)
    solved.events += stats.events


def _paired_experts(
    states: CalibratedStates,
    experts: LoadedBlock,
    full: nn.Module,
    advanced: bool,
    observe: Observer,
    solved: SolvedLayers,
) -> bool:
    """Measure and quantize the experts with their drift, once all other layers of the block are quantized.

    Return whether the full-precision block's outputs are written; `advanced`: they were before.
    """
    job, i, here = states.job, experts.number, states.inputs(experts.number)
    outputs = None if advanced else states.next_inputs(i, "full")
    with (
        routed_inputs(job.folder, experts.module) as routed,
        routed_inputs(job.folder, full, "full") as original,
    ):
        for rows in original.during(job.batches):
            _full_outputs(states, full, i, outputs, rows)
        for rows in routed.during(job.batches):
            states.calls.run(i, experts.module, here.read(rows))
        if outputs is not None:
            outputs.commit()
        _quantize_experts(job, experts, routed, original, observe, solved)
    return advanced or outputs is not None


def _by_stages(
    states: CalibratedStates, block: LoadedBlock, full: nn.Module, observe: Observer, solved: SolvedLayers
) -> bool:
    """Measure and quantize the layers input by input, each with its drift.

    Return whether the full-precision block's outputs are written: a stage whose stream is read at the block's output
    computes them anyway.
    """
    job, i, prefix = states.job, block.number, f"{block.path}."
    needs, probe = job.recipe.needs, states.probe(i)
    here = states.inputs(i)
    names = [name.removeprefix(prefix) for name in block.linears]
    advanced = False
    for stage in find_stages(full, names, lambda: states.calls.run(i, full, probe), needs.stream_drift):
        members = block.only(prefix + name for name in stage.names)
        if stage.paired:
            outputs = states.next_inputs(i, "full") if stage.reaches_output and not advanced else None
            original = full, partial(_full_outputs, states, full, i, outputs)
            partly = block.module, lambda rows: states.calls.run(i, block.module, here.read(rows))
            stats = paired_statistics(job, stage, original, partly, prefix)
            if outputs is not None:
                outputs.commit()
                advanced = True
        else:
            stats = input_statistics(job, members.linears, states.passes(block), hessian=needs.hessian)
        quantize_layers(job, members, stats, observe, solved)
    return advanced


def _full_outputs(states: CalibratedStates, full: nn.Module, i: int, outputs: NextInputs | None, rows: slice) -> Tensor:
    """Return the full-precision block's output for a batch, and add it to `outputs`."""
    output = states.calls.run(i, full, states.inputs(i, "full").read(rows))
    if outputs is not None:
        outputs.add(rows, output)
    return output
