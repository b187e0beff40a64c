"""`planned` gives a job its plans where the recipe plans all layers together.

A pass over the full-precision model before any block is quantized, one block in memory. Its findings are kept in
`sensitivities.json` in the work directory, so that a continued run does not repeat it.
"""

from dataclasses import replace

import torch

from bitquilt.core.events import Observer, Stage
from bitquilt.core.recipe import PlansModel
from bitquilt.core.types import Layer, LayerPlan
from bitquilt.errors import UserError
from bitquilt.model.linear import linear_weight
from bitquilt.stream.gradients import collect_gradients
from bitquilt.stream.hidden_states import CalibratedStates, HiddenStates
from bitquilt.stream.job import Job, LoadedBlock, check_weights
from bitquilt.stream.prefetch import BlockReader
from bitquilt.stream.workdir import read_mark, write_mark

SENSED_FILE = "sensitivities.json"
Sensed = dict[str, dict[str, float]]
"""Numbers that the recipe needs of each layer, by full path."""


def planned(states: HiddenStates, blocks: BlockReader, observe: Observer) -> Job:
    """Return the job with a plan for every layer, if the recipe plans the model and no plan is given.

    Raises UserError if the recipe cannot meet its budget.
    """
    job, recipe = states.job, states.job.recipe
    if job.plans is not None or not isinstance(recipe, PlansModel):
        return job
    path, count = job.folder / SENSED_FILE, len(job.skeleton.blocks)
    sensed: Sensed = {}
    if path.is_file():
        sensed = read_mark(path)
    else:
        for i in range(count):
            observe(Stage(f"looking at block {i + 1} of {count} before any is quantized"))
            with blocks.open(i) as block:
                sensed |= _sense(states, block, recipe)
        write_mark(path, sensed)
    try:
        plans: dict[str, LayerPlan] = recipe.plan_model(sensed)
    except ValueError as error:
        raise UserError(str(error)) from None
    return replace(job, plans=plans, notes=sensed)


@torch.no_grad()
def _sense(states: HiddenStates, block: LoadedBlock, recipe: PlansModel) -> Sensed:
    """Measure the layers of a full-precision block, and make the next one's inputs."""
    check_weights(block.linears)
    passes = states.passes(block, "first pass") if isinstance(states, CalibratedStates) else ()
    only = states.job.recipe.needs.attention_only
    found = collect_gradients(block.module, block.linears, passes, hessian=False, attention_only=only)
    if isinstance(states, CalibratedStates):
        states.advance_calibration(block.number, block.module, "first pass")
    return {
        name: recipe.sense(Layer(name, linear_weight(module).float(), None, None), found[name].trace)
        for name, module in block.linears.items()
    }
