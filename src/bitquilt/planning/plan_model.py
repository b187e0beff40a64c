"""`plan` says what a budget buys before anything is quantized; `measure_model` measures what each bit is worth."""

import tempfile
from pathlib import Path
from typing import Any

from bitquilt.core.budget import Budget
from bitquilt.core.events import Observer, Stage, silent
from bitquilt.core.plan_file import OuterBits
from bitquilt.core.recipe import Plannable, Recipe
from bitquilt.core.settings import GENERAL, Calibration, Selection, grouped
from bitquilt.data.calibration import check_calibration, clip_to_context, make_calibration
from bitquilt.engines.known import engine_named
from bitquilt.errors import UserError, not_plannable
from bitquilt.model.checkpoint import Checkpoint, open_checkpoint
from bitquilt.model.free_tables import free_tables
from bitquilt.model.outline import open_outline
from bitquilt.model.remote import open_headers
from bitquilt.model.structure import Skeleton, open_skeleton, vocabulary_size
from bitquilt.model.ties import tied_layers
from bitquilt.planning.contents import folder_contents
from bitquilt.planning.estimate import estimate, permits
from bitquilt.planning.forecast import Forecast
from bitquilt.planning.measure_sensitivities import measure
from bitquilt.planning.own_rule import most_bytes
from bitquilt.planning.planner import Planned, Planner
from bitquilt.planning.sensitivities import Sensitivities, load_sensitivities
from bitquilt.planning.untouched import untouched_tensors
from bitquilt.request import Wish, own_budget, wish
from bitquilt.stream.devices import choose_device
from bitquilt.stream.embedding_and_head import rounded_tables
from bitquilt.stream.job import CalibratedJob, all_targets
from bitquilt.stream.job import shapes as shapes_of

_CTX = 2048  # tokens in the cache whose memory `plan` states unless a context is given


def plan(
    model: str | Path,
    recipe: str | Recipe | None = None,
    *,
    budget: Budget | None = None,
    scope: str | None = None,
    sensitivities: str | Path | None = None,
    ctx: int | None = None,
    tie: bool = False,
    engine: str | None = None,
    calibration: Calibration = Calibration(),
    selection: Selection = Selection(),
    **options: Any,
) -> Forecast:
    """Say what a budget buys, from safetensors headers alone; of a hub id nothing else is downloaded.

    - `budget`, `scope`: as in `quantize`. Default: the recipe's own bits.
    - `sensitivities`: a file that `measure_model` wrote, to put bits where they lower the loss most. Without it every
      layer gets the same bits.
    - `ctx`: tokens of context for the memory that the model needs. Default: that of a vram budget, else 2048.
    - `tie`: layers that serving engines fuse share their bits.
    - `engine`: as in `quantize`; sizes are those of the engine's files.
    - `calibration`: amount of data for the time estimate.
    - `selection`: the layers to quantize.
    - `options`: fields of the recipe, of `Calibration` and of `Selection`, as in `quantize`.

    Raises UserError for anything that the caller can correct; `UnreachableError` where no plan is within the budget.
    """
    calibration, selection = grouped(options, calibration, selection)
    wanted = wish(recipe, options, budget, scope, engine=engine)
    checkpoint = open_headers(model)
    refuse_quantized(checkpoint)
    skeleton = _opened(checkpoint, selection.blocks, engine)
    shapes = shapes_of(all_targets(skeleton, selection.skip, selection.include_head))
    known = None if sensitivities is None else load_sensitivities(sensitivities, checkpoint, wanted.recipe)
    ties = tied_layers(skeleton.model, shapes) if tie else []
    outer = rounded_tables(skeleton, selection.outer, wanted.recipe, shapes)
    tables = wanted.tables(skeleton, selection, shapes)
    planner = Planner(skeleton, wanted.recipe, shapes, ties=ties, outer=outer, tables=tables, engine=engine)
    planned, own_rule_bytes = _planned(planner, wanted, known)
    calibration, _ = clip_to_context(calibration, checkpoint)
    ctx = ctx or (wanted.budget.ctx if wanted.budget else None) or _CTX
    least, most = planner.reach(Budget("size", 1.0))
    return Forecast(
        model=model,
        wish=wanted,
        planned=planned,
        outer=selection.outer,
        reachable_bytes=(int(least), int(most)),
        ctx=ctx,
        memory=planner.memory(planned.layouts, ctx),
        estimate=estimate(skeleton, shapes, planner.recipe, calibration, measures=wanted.by_loss and known is None),
        permits=permits({name: planned.layouts[name] for name in shapes}),
        ties=tuple(tuple(names) for names in ties),
        untouched=untouched_tensors(skeleton, {*shapes, *(t.path for t in outer), *(t.path for t in tables)}),
        sensitivities=None if sensitivities is None else Path(sensitivities),
        own_rule_bytes=own_rule_bytes,
        contents=folder_contents(skeleton, planned.layouts, planned.size.total),
        parameters=skeleton.checkpoint.weights,
    )


def _opened(checkpoint: Checkpoint, blocks: str | None, engine: str | None) -> Skeleton:
    """Return the skeleton; for an engine the model's own class, which alone knows all settings that its files hold."""
    if engine is None:
        return open_outline(checkpoint, blocks)
    engine_named(engine).check_family(checkpoint.config.get("model_type"))
    return open_skeleton(checkpoint, blocks=blocks)


def _planned(planner: Planner, wanted: Wish, known: Sensitivities | None) -> tuple[Planned, int | None]:
    """Return the plan, and the bound of a recipe that follows a rule of its own because no budget is given."""
    if wanted.budget is not None:
        return planner.plan(wanted.budget, wanted.scope, known), None
    own, terms = own_budget(wanted.recipe), planner.recipe.plan_terms
    planned = planner.plan_own(own, terms.scope or "uniform", known)
    return planned, most_bytes(planner, own) if terms.own_widths else None


def measure_model(
    model: str | Path,
    path: str | Path,
    recipe: str | Recipe | None = None,
    calibration: str | Path | Calibration = GENERAL,
    *,
    selection: Selection = Selection(),
    work_dir: str | Path | None = None,
    device: str = "cpu",
    observer: Observer = silent,
    **options: Any,
) -> Sensitivities:
    """Measure what every width costs and write it to `path`; plans for any budget read the file in seconds.

    Parameters are those of `quantize`. Raises UserError for anything that the caller can correct.
    """
    where = choose_device(device)
    calibration, selection = grouped(options, calibration, selection)
    recipe = wish(recipe, options).recipe
    if not isinstance(recipe, Plannable):
        raise not_plannable(recipe.name)
    check_calibration(calibration)
    _check_writable(Path(path))
    checkpoint = open_checkpoint(model)
    refuse_quantized(checkpoint)
    skeleton = open_skeleton(checkpoint, blocks=selection.blocks)
    layers = all_targets(skeleton, selection.skip, selection.include_head)
    calibration, _ = clip_to_context(calibration, checkpoint)
    vocabulary = vocabulary_size(skeleton.model)
    ids = make_calibration(checkpoint, calibration, vocabulary=vocabulary, progress=lambda t: observer(Stage(t)))
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        job = CalibratedJob(
            skeleton=skeleton,
            recipe=recipe,
            folder=Path(folder),
            skip=tuple(selection.skip),
            include_head=selection.include_head,
            device=where,
            ids=ids,
            batch_size=1,
        )
        tables = () if selection.keep_embedding else free_tables(skeleton, OuterBits(), shapes_of(layers))
        found = measure(job, observer, seed=calibration.seed, tables=tables)
    found.save(Path(path))
    return found


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise UserError for a model that is already quantized, unless its weights can be decoded."""
    checkpoint.refuse_undecodable()
    if (method := checkpoint.model_config.quantized_by) and not checkpoint.source.weights:
        raise UserError(f"{checkpoint.name} is already quantized ({method}); give the full-precision model")


def _check_writable(path: Path) -> None:
    """Raise UserError if `path` cannot be written, before the measurement takes minutes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write the sensitivities to {path}: {error.strerror}; give a file in a folder that can be written"
        ) from None
    if path.is_dir():
        raise UserError(f"cannot write the sensitivities to {path}: it is a folder; give a file")
