"""How are loaded linear layers quantized, given statistics of their inputs? quantize_layers(job, linears, stats)."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitquilt.core.events import LayerDone, Observer
from bitquilt.core.packing import bits_per_weight, layout_to_json, pack
from bitquilt.core.recipe import Recipe, TrainsBlocks, TunesModel
from bitquilt.core.types import Event, Layer, LayerPlan, LayerStats, Solution, check_finite
from bitquilt.errors import UserError
from bitquilt.model.linear import QuantizedLinear, linear_weight, replace_module
from bitquilt.stream.job import Job

ERROR_TOKENS = 256  # to report each layer's relative output error


@dataclass(eq=False)
class Done:
    """What is known of the solved layers: their record `{"layers": {path: ...}, "events": [...]}`, their stored tensors
    under their full names, and, for a recipe that trains blocks, what it is handed."""

    record: dict[str, Any] = field(default_factory=lambda: {"layers": {}, "events": []})
    tensors: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    plans: dict[str, LayerPlan] = field(default_factory=dict)
    solutions: dict[str, Solution] = field(default_factory=dict)


def quantize_layers(
    job: Job,
    number: int,
    linears: Mapping[str, nn.Module],
    stats: Mapping[str, LayerStats],
    observe: Observer,
    done: Done | None = None,
) -> Done:
    """Quantize `linears` (full path -> module) and put the quantized modules in their places in the model.

    What came of it is added to `done`. Raises UserError naming the layer that cannot be solved.
    """
    done = Done() if done is None else done
    prepare = preparing(job.recipe)
    for full, module in linears.items():
        started = time.perf_counter()
        try:
            layer, events = _layer(full, module, stats.get(full))
            plan, solution, notes = _solve(job, layer, prepare(layer.stats))
        except ValueError as error:
            text = str(error)
            raise UserError(text if full in text else f"{full}: {text}") from None
        entry = put_in_place(job, layer, plan, solution, module, done)
        entry |= notes
        entry["seconds"] = round(time.perf_counter() - started, 3)
        done.record["events"] += [asdict(event) for event in (*events, *solution.events)]
        if trains(job) or tunes(job):
            kept = replace(
                layer, stats=None if layer.stats is None else replace(layer.stats, hessian=torch.zeros(0, 0))
            )
            done.layers[full], done.plans[full], done.solutions[full] = kept, plan, solution
        bpw = bits_per_weight(solution.weight.layout)
        observe(LayerDone(number, full, bpw, entry["output_error"], entry["seconds"]))
    return done


def preparing(recipe: Recipe) -> Callable[[LayerStats | None], Any]:
    """`recipe.prepare`, called once for the layers of one input: they come one after the other."""
    last: tuple[LayerStats | None, Any] | None = None

    def prepare(stats: LayerStats | None) -> Any:
        nonlocal last
        if last is None or last[0] is not stats:
            last = (stats, recipe.prepare(stats))
        return last[1]

    return prepare


def put_in_place(
    job: Job, layer: Layer, plan: LayerPlan, solution: Solution, module: nn.Module, done: Done
) -> dict[str, Any]:
    """Put a quantized module where the layer `module` was; returns its record, which is in `done` too."""
    bias = getattr(module, "bias", None)
    quantized = QuantizedLinear.from_weight(solution.weight, None if bias is None else bias.data)
    replace_module(job.skeleton.model, layer.name, quantized)
    done.tensors |= {f"{layer.name}.{key}": value for key, value in pack(solution.weight).items()}
    done.record["layers"][layer.name] = _entry(layer, plan, solution, quantized)
    return done.record["layers"][layer.name]


def trains(job: Job) -> bool:
    """Whether blocks are trained once their layers are solved."""
    return job.ids is not None and isinstance(job.recipe, TrainsBlocks) and job.recipe.train_batch > 0


def tunes(job: Job) -> bool:
    """Whether all blocks are trained together once they are done."""
    return job.ids is not None and isinstance(job.recipe, TunesModel) and job.recipe.tune_batch > 0


def check_weights(linears: Mapping[str, nn.Module]) -> None:
    """Before anything is computed with them: afterwards the first layer to see a NaN is not the one that holds it."""
    try:
        for full, module in linears.items():
            check_finite(full, weight=linear_weight(module))
    except ValueError as error:
        raise UserError(f"{error}; the checkpoint is damaged, download or convert it again") from None


def mean_output_error(record: Mapping[str, Any]) -> float | None:
    """Mean of the layers' relative output errors, or None without data."""
    errors = [e for layer in record["layers"].values() if (e := layer["output_error"]) is not None]
    return sum(errors) / len(errors) if errors else None


def _layer(full: str, module: nn.Module, stats: LayerStats | None) -> tuple[Layer, list[Event]]:
    weight = linear_weight(module).float()
    bias = getattr(module, "bias", None)
    events = []
    if stats is not None and stats.tokens == 0:
        # an expert that no token was routed to: nothing is known about its input, so every channel counts the same
        stats = LayerStats(torch.eye(weight.shape[1], device=weight.device), 1, None)
        events.append(Event(full, "no calibration tokens", "no token reached this layer: all channels weigh the same"))
    return Layer(full, weight, None if bias is None else bias.data.float(), stats), events


def _solve(job: Job, layer: Layer, prepared: Any) -> tuple[LayerPlan, Solution, Mapping[str, Any]]:
    """Plan, solution, and what the report says about how the plan was found."""
    plan = None if job.plans is None else job.plans.get(layer.name)
    if plan is not None:
        return plan, job.recipe.quantize(layer, plan, prepared), job.notes.get(layer.name, {})
    cost = job.recipe.measure(layer, prepared)
    plan = job.recipe.allocate(cost, layer.weight.shape[1])
    return plan, job.recipe.quantize(layer, plan, prepared), cost.details


def _entry(layer: Layer, plan: LayerPlan, solution: Solution, module: QuantizedLinear) -> dict[str, Any]:
    stats = layer.stats
    difference = module.dequantize() - layer.weight
    weight_error = float(difference.square().sum() / layer.weight.square().sum().clamp_min(1e-30))
    output_error = None
    if stats is not None and stats.sample is not None:
        sample = stats.sample[:: max(1, len(stats.sample) // ERROR_TOKENS)]
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
