"""One run from request to checkpoint: run(request, observe) -> Result. The only place where recipes and runtime meet.

    settle what is asked for -> is it done already? -> refuse early -> calibrate -> give the bits out -> block by block
    -> write, reload, compare -> publish

Everything up to the calibration is seconds and touches no disk; everything after it continues where it was interrupted.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bitquilt._version import __version__
from bitquilt.core.events import BlockDone, Observer, Stage, StageClock, Started, Untouched
from bitquilt.core.plan_file import check_plan, plan_json
from bitquilt.core.recipe import ChecksLayers, Plannable
from bitquilt.core.types import LayerPlan
from bitquilt.data.calibration import SELF, check_calibration, clip_to_context, describe_source, make_calibration
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import Checkpoint, open_checkpoint
from bitquilt.model.structure import Skeleton, open_skeleton, vocabulary_size
from bitquilt.planning.folder_size import folder_bytes
from bitquilt.planning.plan_model import (
    file_hash,
    load_sensitivities,
    measure_sensitivities,
    open_planner,
    prediction,
    refuse_quantized,
)
from bitquilt.planning.planner import Planned, predicted_losses
from bitquilt.planning.sensitivities import Sensitivities, read_sensitivities
from bitquilt.planning.untouched import survey
from bitquilt.request import Request, Result, check_bytes
from bitquilt.stream.embedding_and_head import rounded_tables
from bitquilt.stream.hidden_states import check_activations_fit
from bitquilt.stream.job import Job, all_targets, shapes
from bitquilt.stream.loop import committed, stream
from bitquilt.stream.model_training import TrainingMemory
from bitquilt.stream.run_report import Promise, RunReport, recipe_json
from bitquilt.stream.workdir import (
    Fingerprint,
    delete_workdir,
    full_disk_is_an_error,
    open_workdir,
    read_fingerprint,
    read_tensors,
    write_tensors,
)
from bitquilt.stream.writer import assemble, finished, publish, verify, write_reports

# Tokens per forward pass of a block: enough for full matrix speed, few enough for memory (one 4096-wide block: 250 MB).
_BATCH_TOKENS = 4096
_IDS = "calibration.safetensors"
_TABLES, _TABLES_AGAIN = "sensitivities.safetensors", "sensitivities-2.safetensors"


def run(request: Request, observe: Observer) -> Result:
    """Make the checkpoint, or find it done. Raises UserError and VerificationError as `api.quantize` says."""
    _check(request)
    checkpoint = open_checkpoint(request.model)
    refuse_quantized(checkpoint)
    recipe = request.wanted.recipe
    seq_len, notice = clip_to_context(request.seq_len, checkpoint)
    if notice and recipe.needs.calibration:
        observe(Stage(notice))
    out = request.out or Path(f"{_stem(request.model, checkpoint)}-{recipe.name}")
    request = replace(request, seq_len=seq_len, out=out)
    known = None
    if request.sensitivities is not None:
        known = load_sensitivities(request.sensitivities, checkpoint, recipe)
    fingerprint = _fingerprint(request, checkpoint)
    work_path = request.work_dir or out.with_name(f"{out.name}.work")
    if (done := finished(out, fingerprint)) is not None:
        if read_fingerprint(work_path) == fingerprint:  # killed after the checkpoint was in place
            delete_workdir(work_path)
        return Result(out, done, already_done=True)
    skeleton = open_skeleton(checkpoint)
    layers = shapes(all_targets(skeleton, request.skip, request.include_head))
    untouched = _refuse_early(request, skeleton, layers)
    clock = StageClock(observe)
    observe = clock.observe
    with open_workdir(work_path, fingerprint) as work, full_disk_is_an_error(work):
        blocks, done_blocks = len(skeleton.blocks), len(committed(work, len(skeleton.blocks)))
        observe(Started(str(request.model), blocks, done_blocks, len(layers), checkpoint.nbytes, untouched))
        ids = _calibration(request, skeleton, work, observe) if request.calibrates else None
        known, planned = _given_out(request, skeleton, layers, work, ids, known, observe)
        source = planned or request.file
        plans = None if source is None else source.plans
        records = stream(_job(request, skeleton, work, plans, ids), observe)
        observe(Stage("writing the checkpoint and comparing its logits with the run's"))
        folder = assemble(skeleton, work, records)
        difference = verify(folder, work)
        outcome = RunReport(skeleton, fingerprint, records, untouched, difference, clock, request.device)
        report = _write_reports(request, folder, outcome, plans, known, planned)
        out.parent.mkdir(parents=True, exist_ok=True)
        publish(folder, out)
        delete_workdir(work)
    return Result(out, report)


def _check(request: Request) -> None:
    """Raise UserError for what needs no model to be seen."""
    batch_size = 1 if request.batch_size is None else request.batch_size
    for name, value in (("samples", request.samples), ("seq_len", request.seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}; wanted at least 1")
    if request.calibrates:
        check_calibration(request.calibration)
    if request.self_samples < 0:
        raise UserError(f"self_samples is {request.self_samples}; wanted 0 or more")
    if request.self_samples and str(request.calibration) == SELF:
        raise UserError(
            "the model writes all of its calibration text already; give more samples instead of self_samples"
        )
    if request.rounds not in (1, 2) or (request.rounds == 2 and not request.by_worth):
        raise UserError(
            f"rounds is {request.rounds}; wanted 1, or 2 with a budget that is given out by worth, such as a size"
        )


def _stem(model: str | Path, checkpoint: Checkpoint) -> str:
    """The folder of a hub model is named after its commit: that says nothing."""
    return checkpoint.folder.resolve().name if Path(model).is_dir() else Path(model).name


def _fingerprint(request: Request, checkpoint: Checkpoint) -> Fingerprint:
    recipe, outer = request.wanted.recipe, request.outer
    calibration = None
    if request.calibrates:
        size = {"samples": request.samples, "seq_len": request.seq_len}
        calibration = {**describe_source(request.calibration), **size}
        if request.self_samples:
            calibration["self_samples"] = request.self_samples
    settings: dict[str, object] = {
        "version": __version__,
        "model": {"sha256": checkpoint.fingerprint()},
        "recipe": recipe_json(recipe),
        "calibration": calibration,
        "seed": request.seed,
        "skip": request.skip,
        "include_head": request.include_head,
        "embedding_bits": outer.embedding,
        "plan": None if request.plan is None else file_hash(request.plan),
        **request.wanted.values,
    }
    if outer.head is not None:
        settings["head_bits"] = outer.head
    if request.rounds == 2:
        settings["rounds"] = request.rounds
    if request.sensitivities is not None:
        settings["sensitivities"] = file_hash(request.sensitivities)
    return Fingerprint(settings)


def _job(
    request: Request,
    skeleton: Skeleton,
    work: Path,
    plans: Mapping[str, LayerPlan] | None,
    ids: torch.Tensor | None,
) -> Job:
    """The run's job, with token ids where the recipe itself calibrates."""
    job = Job(
        skeleton=skeleton,
        recipe=request.wanted.recipe,
        folder=work,
        skip=request.skip,
        include_head=request.include_head,
        outer=request.outer,
        plans=plans,
        device=request.device,
    )
    if ids is None or not job.recipe.needs.calibration:
        return job
    return job.calibrated(ids, request.batch_size or max(1, _BATCH_TOKENS // request.seq_len))


def _refuse_early(request: Request, skeleton: Skeleton, layers: Mapping[str, tuple[int, int]]) -> tuple[Untouched, ...]:
    """Raise UserError for whatever headers and shapes say cannot end well; else what stays as it is."""
    recipe, file, budget = request.wanted.recipe, request.file, request.wanted.budget
    tables = rounded_tables(skeleton, request.outer, layers)
    TrainingMemory(recipe, skeleton, layers, request.seq_len).check(request.device)
    if file is not None:
        check_plan(file.plans, layers, channels=isinstance(recipe, Plannable) and recipe.plan_terms.unit_columns == 1)
        check_bytes(file.recipe, recipe, layers, file.plans)
    elif budget is not None:
        open_planner(skeleton, recipe, layers, outer=request.outer).check(budget)
    elif isinstance(recipe, ChecksLayers):
        try:
            recipe.check_layers(layers)
        except ValueError as error:
            raise UserError(str(error)) from None
    return survey(skeleton, {*layers, *(table.path for table in tables)})


def _calibration(request: Request, skeleton: Skeleton, work: Path, observe: Observer) -> torch.Tensor:
    """Token ids `[samples, tokens]`; a continued run reads what it wrote."""
    tokens = (request.samples + request.self_samples) * request.seq_len
    check_activations_fit(work, skeleton.checkpoint, request.wanted.recipe, tokens)
    path = work / _IDS
    if path.is_file():
        return read_tensors(path)["input_ids"]
    ids = make_calibration(
        skeleton.checkpoint,
        request.calibration,
        samples=request.samples,
        self_samples=request.self_samples,
        seq_len=request.seq_len,
        seed=request.seed,
        vocabulary=vocabulary_size(skeleton.model),
        progress=lambda text: observe(Stage(text)),
    )
    write_tensors(path, {"input_ids": ids})
    return ids


def _given_out(
    request: Request,
    skeleton: Skeleton,
    layers: Mapping[str, tuple[int, int]],
    work: Path,
    ids: torch.Tensor | None,
    known: Sensitivities | None,
    observe: Observer,
) -> tuple[Sensitivities | None, Planned | None]:
    """The budget's plan and the first round's tables, which what is predicted stays with: the law was measured for
    them. (None, None) where the recipe or a plan file decides."""
    wanted = request.wanted
    if wanted.budget is None:
        return known, None
    if request.measures:
        assert ids is not None
        known = _tables(request, skeleton, work, ids, observe)
    tables = known
    if request.rounds == 2:
        assert ids is not None
        tables = _second_round(request, skeleton, work, ids, observe)
    planner = open_planner(skeleton, wanted.recipe, layers, tables, outer=request.outer)
    return known, planner.plan(wanted.budget, wanted.scope)


def _tables(
    request: Request, skeleton: Skeleton, work: Path, ids: torch.Tensor, observe: Observer, at: Path | None = None
) -> Sensitivities:
    """Measured once per run: a run that continues reads what it wrote. `at`: in this quantized checkpoint."""
    path = work / (_TABLES if at is None else _TABLES_AGAIN)
    if not path.is_file():
        found = measure_sensitivities(
            skeleton, request.wanted.recipe, ids, work, skip=request.skip, include_head=request.include_head,
            seed=request.seed, observer=observe, at=at, device=request.device,
        )  # fmt: skip
        found.save(path)
    return read_sensitivities(path)


def _second_round(
    request: Request, skeleton: Skeleton, work: Path, ids: torch.Tensor, observe: Observer
) -> Sensitivities:
    """Tables measured in the model that the first round's tables lead to."""

    def retell(event: object) -> None:
        if isinstance(event, Stage):
            observe(Stage(f"first round: {event.text}"))
        elif isinstance(event, BlockDone):
            observe(Stage(f"first round: block {event.block + 1} of {event.blocks} is done"))

    if (work / _TABLES_AGAIN).is_file():
        return read_sensitivities(work / _TABLES_AGAIN)
    once = replace(
        request, calibration=work / _IDS, samples=len(ids), self_samples=0, seq_len=ids.shape[1], out=work / "first",
        work_dir=None, sensitivities=request.sensitivities or work / _TABLES, rounds=1,
    )  # fmt: skip
    first = run(once, retell).folder
    found = _tables(request, skeleton, work, ids, observe, at=first)
    shutil.rmtree(first)
    return found


def _write_reports(
    request: Request,
    folder: Path,
    outcome: RunReport,
    plans: Mapping[str, LayerPlan] | None,
    known: Sensitivities | None,
    planned: Planned | None,
) -> dict[str, Any]:
    """Write plan.json and report.json, with the prediction next to the result, and return the report."""
    recipe = request.wanted.recipe
    layers = {n: layer.plan for r in outcome.records if r.planned for n, layer in r.layers.items()}
    plan = plan_json(recipe_json(recipe), layers, request.outer)
    losses: dict[str, float] = {}
    predicted = None
    if known is not None and plans is not None and known.method == "kfac":
        losses = predicted_losses(known, plans, recipe)
        predicted = prediction(losses, known, request.outer)
    promise = Promise(
        folder_bytes(outcome.skeleton, folder, plan),
        request.wanted.values.get("budget"),
        None if planned is None else planned.spent,
        losses,
        predicted,
    )
    report = outcome.to_json(folder, promise)
    write_reports(folder, plan, report, promise.folder_bytes, promised=request.wanted.budget is not None)
    return report
