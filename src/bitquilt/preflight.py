"""What is known of a run before it computes: `settle`, `run_fingerprint`, `examine` and `planned_bytes`.

They take seconds, read headers and shapes, write nothing, and raise UserError for what these show to be impossible.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bitquilt._version import __version__
from bitquilt.core.events import Observer, Stage, Untouched
from bitquilt.core.plan_file import PlanFile, check_plan, check_plan_tables, plan_json
from bitquilt.core.recipe import ChecksLayers, Plannable
from bitquilt.core.types import Layout
from bitquilt.data.calibration import clip_to_context, describe_calibration
from bitquilt.engines.known import engine_named
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import Checkpoint
from bitquilt.model.free_tables import Table, free_tables
from bitquilt.model.shared_layers import shared_layers
from bitquilt.model.structure import Skeleton, open_skeleton
from bitquilt.planning.folder_size import promised_bytes
from bitquilt.planning.planner import Planner
from bitquilt.planning.sensitivities import Sensitivities, file_hash
from bitquilt.planning.untouched import untouched_tensors
from bitquilt.request import Request, check_bytes, planned_layout
from bitquilt.stream.embedding_and_head import RoundedTable, config_changes, rounded_tables
from bitquilt.stream.job import all_targets, shapes
from bitquilt.stream.model_training import TrainingMemory
from bitquilt.stream.run_report import recipe_json
from bitquilt.stream.workdir import Fingerprint


@dataclass(frozen=True, eq=False)
class ExaminedModel:
    """What a run works on: the model, its layers `[out, in]` by path, embedding and head where they share the budget,
    what stays untouched, and the run's planner."""

    skeleton: Skeleton
    layers: Mapping[str, tuple[int, int]]
    rounded: tuple[RoundedTable, ...]
    tables: tuple[Table, ...]
    untouched: tuple[Untouched, ...]
    planner: Planner | None


def settle(request: Request, checkpoint: Checkpoint, observe: Observer) -> Request:
    """Return the request with the sequence length that the model can take and the name of the output folder."""
    calibration, notice = clip_to_context(request.calibration, checkpoint)
    if notice and request.wish.recipe.needs.calibration:
        observe(Stage(notice))
    # the folder of a hub model is named after its commit, which says nothing
    stem = checkpoint.folder.resolve().name if Path(request.model).is_dir() else Path(request.model).name
    out = request.out or Path(f"{stem}-{request.wish.recipe.name}")
    return replace(request, calibration=calibration, out=out)


def run_fingerprint(request: Request, checkpoint: Checkpoint) -> Fingerprint:
    """Return everything that decides the bytes of the run: a run continues, or is done, where this is equal."""
    wish, selection = request.wish, request.selection
    settings: dict[str, object] = {
        "version": __version__,
        "model": {"sha256": checkpoint.fingerprint(), "files": checkpoint.companion_hashes()},
        "recipe": recipe_json(wish.recipe),
        "calibration": describe_calibration(request.calibration) if request.calibrates else None,
        "seed": request.calibration.seed,
        "skip": selection.skip,
        "include_head": selection.include_head,
        "embedding_bits": request.outer.embedding,
        "plan": None if wish.plan is None else wish.plan.sha256,
    }
    if wish.budget is not None:
        settings["budget"] = wish.budget_json
    if wish.engine is not None:
        settings["engine"] = wish.engine
    if request.outer.head is not None:
        settings["head_bits"] = request.outer.head
    if selection.keep_embedding:
        settings["keep_embedding"] = True
    if selection.blocks is not None:
        settings["blocks"] = selection.blocks
    if request.rounds == 2:
        settings["rounds"] = request.rounds
    if request.sensitivities is not None:
        settings["sensitivities"] = file_hash(request.sensitivities)
    return Fingerprint(settings)


def examine(request: Request, checkpoint: Checkpoint, known: Sensitivities | None) -> ExaminedModel:
    """Open the model without weights. Raises UserError for a run that cannot succeed."""
    wish, selection = request.wish, request.selection
    if wish.engine is not None:
        engine_named(wish.engine).check_family(checkpoint.config.get("model_type"))
    skeleton = open_skeleton(checkpoint, blocks=selection.blocks)
    layers = shapes(all_targets(skeleton, selection.skip, selection.include_head))
    rounded = rounded_tables(skeleton, request.outer, wish.recipe, layers)
    tables = wish.tables(skeleton, selection, layers)
    _check_training(request, skeleton, layers)
    planner = None
    if wish.plan is not None:
        tables = _followed_tables(request, wish.plan, skeleton, layers, rounded)
    elif wish.budget is not None:
        planner = Planner(skeleton, wish.recipe, layers, outer=rounded, tables=tables, engine=wish.engine)
        planner.check(wish.budget)
        planner.units.losses(known)  # refuses tables that do not fit the layers
    elif wish.engine is not None:  # every layer gets the same bits; refuse what the engine cannot hold
        Planner(skeleton, wish.recipe, layers, outer=rounded, engine=wish.engine)
    elif isinstance(wish.recipe, ChecksLayers):
        try:
            wish.recipe.check_layers(layers)
        except ValueError as error:
            raise UserError(str(error)) from None
    untouched = untouched_tensors(skeleton, {*layers, *(t.path for t in rounded), *(t.path for t in tables)})
    return ExaminedModel(skeleton, layers, rounded, tables, untouched, planner)


def _check_training(request: Request, skeleton: Skeleton, layers: Mapping[str, tuple[int, int]]) -> None:
    """Raise UserError for training of all blocks where they share weights, or with too little memory."""
    recipe = request.wish.recipe
    if recipe.training.model is not None and (shared := shared_layers(skeleton.model)):
        target, source = next(iter(shared.items()))
        raise UserError(
            f"{target} has the weight of {source}, and all blocks cannot be trained together where they share weights; "
            "effort=normal trains one block at a time"
        )
    TrainingMemory(recipe, skeleton, layers, request.calibration.seq_len).check(request.device)


def _followed_tables(
    request: Request,
    plan: PlanFile,
    skeleton: Skeleton,
    layers: Mapping[str, tuple[int, int]],
    rounded: tuple[RoundedTable, ...],
) -> tuple[Table, ...]:
    """Check the plan against the model, recipe and engine; return the tables whose rows it gives bits."""
    wish = request.wish
    channels = isinstance(wish.recipe, Plannable) and wish.recipe.plan_terms.unit_columns == 1
    check_plan(plan.plans, layers, channels=channels)
    check_bytes(wish, layers)
    free = {table.path: table for table in free_tables(skeleton, request.outer, layers)}
    check_plan_tables(plan.tables, {path: table.rows for path, table in free.items()})
    if wish.engine is not None and isinstance(wish.recipe, Plannable):
        planned = _planned_layouts(wish.recipe, plan, layers, rounded)
        Planner(skeleton, wish.recipe, layers, outer=rounded, engine=wish.engine).held(planned)
    return tuple(free[path] for path in plan.tables)


def planned_bytes(request: Request, model: ExaminedModel) -> int | None:
    """Return the bytes of the output where a given plan fixes them, else None."""
    recipe, plan = request.wish.recipe, request.wish.plan
    if plan is None or not isinstance(recipe, Plannable):
        return None
    layouts = _planned_layouts(recipe, plan, model.layers, model.rounded)
    for table in model.tables:
        layouts |= table.parts(np.bincount(plan.table_rows[table.path]))
    written = plan_json(recipe_json(recipe), plan.plans, request.outer, plan.table_rows)
    return promised_bytes(model.skeleton, layouts, written, config_changes([*model.rounded, *model.tables]))


def _planned_layouts(
    recipe: Plannable, plan: PlanFile, layers: Mapping[str, tuple[int, int]], tables: Sequence[RoundedTable]
) -> dict[str, Layout]:
    """Layouts of the layers of a given plan, and of embedding and head."""
    layouts = {name: planned_layout(recipe, name, layers[name], layer) for name, layer in plan.plans.items()}
    return layouts | {table.path: table.layout for table in tables}
