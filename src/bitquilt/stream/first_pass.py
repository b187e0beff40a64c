"""How does a recipe that plans all layers together see them? planned(job, full_pass) -> the job with its plans.

A pass over the full-precision model before anything is quantized, one block in memory; what it finds is kept in
`sensitivities.json` in the work directory, so that a run that continues does not repeat it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from bitquilt.core.events import Observer, Stage
from bitquilt.core.recipe import PlansModel
from bitquilt.core.types import Layer, LayerPlan
from bitquilt.errors import UserError
from bitquilt.model.linear import linear_weight
from bitquilt.stream.gradients import Gradients, collect_gradients
from bitquilt.stream.job import Job
from bitquilt.stream.workdir import write_json

_FILE = "sensitivities.json"
Look = Callable[[nn.Module, Mapping[str, nn.Module], Iterator[Tensor] | None], None]
"""(block, its layers by full path, one forward pass of it per batch)"""


def planned(job: Job, full_pass: Callable[[int, Look], None], observe: Observer) -> Job:
    """`job` with a plan for every layer where the recipe plans the model and no plan is given.

    `full_pass(i, look)` shows block i. Raises UserError if the recipe cannot meet its budget.
    """
    if job.plans is not None or not isinstance(job.recipe, PlansModel):
        return job
    recipe, path = job.recipe, job.folder / _FILE
    if path.is_file():
        sensed = json.loads(path.read_text())
    else:
        sensed = {}
        blocks = len(job.skeleton.blocks)

        def look(block: nn.Module, linears: Mapping[str, nn.Module], passes: Iterator[Tensor] | None) -> None:
            found = gradients_of(job, block, linears, passes, hessian=False)
            for name, module in linears.items():
                layer = Layer(name, linear_weight(module).float(), None, None)
                sensed[name] = recipe.sense(layer, found[name].trace)

        for i in range(blocks):
            observe(Stage(f"looking at block {i + 1} of {blocks} before any is quantized"))
            full_pass(i, look)
        write_json(path, sensed)
    try:
        plans: dict[str, LayerPlan] = recipe.plan_model(sensed)
    except ValueError as error:
        raise UserError(str(error)) from None
    return replace(job, plans=plans, notes=sensed)


def gradients_of(
    job: Job,
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    passes: Iterator[Tensor] | None,
    *,
    hessian: bool,
) -> dict[str, Gradients]:
    """`collect_gradients` as the recipe asks for it."""
    probes = job.recipe.needs.probes

    def own(path: str) -> bool:
        return probes.feed_forward_at_layer and not is_attention(block, path)

    return collect_gradients(
        block, linears, passes or (), hessian=hessian, probes=probes.count, seed=probes.seed, own=own
    )


def is_attention(block: nn.Module, path: str) -> bool:
    """Whether the sub-block at `path` computes attention, by its name or its class's."""
    module = block.get_submodule(path)
    words = f"{path} {type(module).__name__}".lower() if path else ""
    return "attn" in words or "attention" in words
