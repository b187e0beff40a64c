"""`quantize_layers` quantizes loaded linear layers, given statistics of their inputs, and collects `SolvedLayers`.

`put_in_place` packs one solved layer and puts it into the model.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitquilt.core.events import LayerDone, Observer
from bitquilt.core.packing import bits_per_weight, pack
from bitquilt.core.recipe import Recipe
from bitquilt.core.types import Event, Layer, LayerPlan, LayerStats, Solution
from bitquilt.errors import UserError
from bitquilt.model.linear import QuantizedLinear, linear_weight, replace_module
from bitquilt.model.shared_layers import shared_layers
from bitquilt.stream.devices import to_device
from bitquilt.stream.job import Job, LoadedBlock
from bitquilt.stream.records import LayerRecord, block_stem, read_record
from bitquilt.stream.workdir import read_tensors, tensors_of, tensors_sum, write_tensors

ERROR_TOKENS = 256  # to report each layer's relative output error


@dataclass(eq=False)
class SolvedLayers:
    """The solved layers of one block by full path, added one by one.

    `tensors`: as they are stored, under their full names. `layers` and `solutions`: kept if the run `trains` them.
    """

    trains: bool = False
    records: dict[str, LayerRecord] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    solutions: dict[str, Solution] = field(default_factory=dict)

    def write(self, job: Job, block: LoadedBlock, file: str) -> str:
        """Write the block's file, its solved layers and all other tensors as the checkpoint has them; return its sum.

        The sum is of the tensors in memory, so that it also tells what went wrong on the way to the disk.
        """
        kept = job.skeleton.kept_sources(block.path, {f"{name}.weight" for name in block.linears})
        tensors = self.tensors | job.skeleton.checkpoint.read(kept)
        write_tensors(job.folder / file, tensors)
        return tensors_sum(tensors)


def quantize_layers(
    job: Job, block: LoadedBlock, stats: Mapping[str, LayerStats], observe: Observer, solved: SolvedLayers
) -> None:
    """Quantize the layers of `block`, put them into the model and add them to `solved`.

    Raises UserError naming the layer that cannot be solved.
    """
    prepare, plans = preparing(job.recipe), job.plans or {}
    for name, module in block.linears.items():
        started = time.perf_counter()
        try:
            layer, events = _layer(name, module, stats.get(name))
            prepared, plan, notes = prepare(layer.stats), plans.get(name), job.notes.get(name, {})
            if plan is None:
                cost = job.recipe.measure(layer, prepared)
                plan, notes = job.recipe.allocate(cost, layer.weight.shape[1]), cost.details
            solution = job.recipe.quantize(layer, plan, prepared)
        except ValueError as error:
            text = str(error)
            raise UserError(text if name in text else f"{name}: {text}") from None
        record = put_in_place(job, layer, module, plan, solution, solved)
        record = record.annotated(round(time.perf_counter() - started, 3), notes)
        solved.records[name] = record
        solved.events += [*events, *solution.events]
        if solved.trains:
            seen = layer.stats
            if seen is not None:  # training reads the sample only
                seen = replace(seen, hessian=torch.zeros(0, 0), drift=None, stream_drift=None)
            solved.layers[name], solved.solutions[name] = replace(layer, stats=seen), solution
        bpw = bits_per_weight(record.layout)
        observe(LayerDone(block.number, name, bpw, record.output_error, record.seconds))


def preparing(recipe: Recipe) -> Callable[[LayerStats | None], Any]:
    """Return `recipe.prepare`, called once for neighbouring layers that read the same input."""
    last: tuple[LayerStats | None, Any] | None = None

    def prepare(stats: LayerStats | None) -> Any:
        nonlocal last
        if last is None or last[0] is not stats:
            last = (stats, recipe.prepare(stats))
        return last[1]

    return prepare


def put_in_place(
    job: Job, layer: Layer, module: nn.Module, plan: LayerPlan, solution: Solution, solved: SolvedLayers
) -> LayerRecord:
    """Pack the layer, put it where `module` was, and return its record, which is in `solved` too."""
    layout, tensors = solution.weight.layout, pack(solution.weight)
    bias = getattr(module, "bias", None)
    quantized = QuantizedLinear.from_tensors(tensors, layout, None if bias is None else bias.data)
    replace_module(job.skeleton.model, layer.name, quantized)
    solved.tensors |= {f"{layer.name}.{key}": value for key, value in tensors.items()}
    difference = quantized.dequantize() - layer.weight
    record = solved.records[layer.name] = LayerRecord(
        layout=layout,
        bits="".join(map(str, plan.bits)),
        group_size=plan.group_size,
        output_error=_output_error(layer, difference),
        weight_error=float(difference.square().sum() / layer.weight.square().sum().clamp_min(1e-30)),
        loss=solution.loss,
        seconds=0.0,
    )
    return record


def put_shared(job: Job, block: LoadedBlock) -> None:
    """Put the quantized layers of earlier blocks where this block shares their weights."""
    for target, source in shared_layers(job.skeleton.model).items():
        if not target.startswith(f"{block.path}.") or target in block.linears:
            continue
        home = next(i for i, path in enumerate(job.skeleton.blocks) if source.startswith(f"{path}."))
        record = read_record(job.folder / f"{block_stem(home)}.json")
        if record is not None and (layer := record.layers.get(source)) is not None:
            tensors = to_device(tensors_of(source, read_tensors(job.folder / record.file)), job.device)
            replace_module(job.skeleton.model, target, QuantizedLinear.from_tensors(tensors, layer.layout))


def _output_error(layer: Layer, difference: Tensor) -> float | None:
    stats = layer.stats
    if stats is None or stats.sample is None:
        return None
    sample = stats.sample[:: max(1, len(stats.sample) // ERROR_TOKENS)]
    wrong, right = sample @ difference.t(), sample @ layer.weight.t()
    return float(wrong.square().sum() / right.square().sum().clamp_min(1e-30))


def _layer(name: str, module: nn.Module, stats: LayerStats | None) -> tuple[Layer, list[Event]]:
    weight = linear_weight(module).float()
    bias = getattr(module, "bias", None)
    events = []
    if stats is not None and stats.tokens == 0:
        # an expert that no token was routed to: nothing is known about its input, so every channel counts the same
        stats = LayerStats(torch.eye(weight.shape[1], device=weight.device), 1, None)
        events.append(Event(name, "no calibration tokens", "no token reached this layer: all channels weigh the same"))
    return Layer(name, weight, None if bias is None else bias.data.float(), stats), events
