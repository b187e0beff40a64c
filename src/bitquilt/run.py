"""`run` turns a request into a checkpoint: the only place where planning and the loop over blocks meet.

    already done? -> refuse early -> calibrate -> allocate bits -> quantize block by block -> write, reload, compare
    -> publish

Everything up to the calibration takes seconds and writes nothing. Everything after it continues after an interruption.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitquilt.core.events import BlockDone, Observer, Stage, StageClock, Started
from bitquilt.core.plan_file import plan_json
from bitquilt.core.settings import Calibration
from bitquilt.core.types import Event, LayerPlan
from bitquilt.data.calibration import make_calibration, tokens_read
from bitquilt.errors import UserError, VerificationError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.structure import vocabulary_size
from bitquilt.planning.folder_size import folder_bytes
from bitquilt.planning.interaction import LossPrediction, predict
from bitquilt.planning.measure_sensitivities import measure
from bitquilt.planning.plan_model import refuse_quantized
from bitquilt.planning.planner import Planned
from bitquilt.planning.sensitivities import Sensitivities, load_sensitivities, read_sensitivities
from bitquilt.preflight import ExaminedModel, examine, planned_bytes, run_fingerprint, settle
from bitquilt.request import Request, Result
from bitquilt.stream.hidden_states import check_activations_fit
from bitquilt.stream.job import CalibratedJob, Job
from bitquilt.stream.loop import committed, stream
from bitquilt.stream.resume.damage import WorkFiles, drop_damaged
from bitquilt.stream.run_report import Promise, RunReport, recipe_json
from bitquilt.stream.workdir import (
    DamagedError,
    Fingerprint,
    check_state,
    delete_workdir,
    full_disk_is_an_error,
    open_workdir,
    read_fingerprint,
    read_tensors,
    write_state,
)
from bitquilt.stream.writer import (
    assemble,
    check_output,
    check_room,
    finished,
    publish,
    reserved,
    verify,
    write_reports,
)

# Tokens per forward pass of a block: enough for full matrix speed, few enough for memory (one 4096-wide block: 250 MB).
_BATCH_TOKENS = 4096
_IDS = "calibration.safetensors"
_TABLES, _TABLES_AGAIN = "sensitivities.safetensors", "sensitivities-2.safetensors"


def run(request: Request, observe: Observer) -> Result:
    """Make the checkpoint, or find it done. Raises UserError and VerificationError as `api.quantize` does."""
    checkpoint = open_checkpoint(request.model)
    refuse_quantized(checkpoint)
    request = settle(request, checkpoint, observe)
    assert request.out is not None
    known = None
    if request.sensitivities is not None:
        known = load_sensitivities(request.sensitivities, checkpoint, request.wish.recipe)
    fingerprint = run_fingerprint(request, checkpoint)
    work_path = request.work_dir or request.out.with_name(f"{request.out.name}.work")
    if (done := finished(request.out, fingerprint)) is not None:
        if read_fingerprint(work_path) == fingerprint:  # killed after the checkpoint was in place
            delete_workdir(work_path)
        return Result(request.out, done, already_done=True)
    budget = request.wish.budget
    check_output(request.out, work_path, budget.value if budget is not None and budget.kind == "size" else 0.0)
    model = examine(request, checkpoint, known)
    if (wanted := planned_bytes(request, model)) is not None:
        check_room(request.out, work_path, wanted)
    clock = StageClock(observe)
    with open_workdir(work_path, fingerprint) as work, reserved(request.out), full_disk_is_an_error(work):
        report = _RunInFolder(request, model, work, clock.observe).make(fingerprint, clock, known)
        delete_workdir(work)
    return Result(request.out, report)


@dataclass(eq=False)
class _RunInFolder:
    """A run in its work directory `work`. `mended`: an event for each damaged file found there so far."""

    request: Request
    model: ExaminedModel
    work: Path
    observe: Observer
    mended: list[Event] = field(default_factory=list)

    def make(self, fingerprint: Fingerprint, clock: StageClock, known: Sensitivities | None) -> dict[str, Any]:
        """Quantize, write, verify and publish; return the content of report.json."""
        request, skeleton, untouched = self.request, self.model.skeleton, self.model.untouched
        assert request.out is not None
        self._mend()
        blocks, done = len(skeleton.blocks), len(committed(self.work, len(skeleton.blocks)))
        layers, nbytes = len(self.model.layers), skeleton.checkpoint.nbytes
        self.observe(Started(str(request.model), blocks, done, layers, nbytes, untouched))
        ids = self._calibration() if request.calibrates else None
        known, planned = self._allocated(ids, known)
        if planned is not None:
            check_room(request.out, self.work, planned.size.total)
        source = planned or request.wish.plan
        plans = None if source is None else source.plans
        job = self._job(plans, {} if source is None else source.table_rows, known)
        if ids is not None and request.wish.recipe.needs.calibration:
            job = self._with_ids(job, ids)
        records = stream(job, self.observe)
        if self._mend():  # the disk did not keep what this very run wrote
            records = stream(job, self.observe)
            if lost := self._mend():
                raise VerificationError(
                    f"{self.work} did not keep what was written there, twice: {lost[0].detail}; check the disk and the "
                    "memory of this machine, or give --work-dir on another disk"
                )
        self.observe(Stage("writing the checkpoint and comparing its logits with the run's"))
        folder = assemble(skeleton, self.work, records)
        difference = verify(folder, self.work)
        outcome = RunReport(
            skeleton, fingerprint, records, untouched, difference, clock, request.device, mended=self.mended
        )
        prediction = None
        if plans is not None:
            prediction = predict(known, plans, request.wish.recipe, request.outer, job.table_rows)
        report = self._write_reports(folder, outcome, planned, prediction)
        publish(folder, request.out)
        return report

    def _mend(self) -> list[Event]:
        """Delete what is damaged in the work directory, report it, and return an event for each file."""
        wish, selection = self.request.wish, self.request.selection
        given = wish.plan is not None or wish.budget is not None
        blocks = len(self.model.skeleton.blocks)
        kinds = *(table.kind for table in self.model.rounded), *(table.kind for table in self.model.tables)
        others = {_IDS: check_state, _TABLES: _check_tables, _TABLES_AGAIN: _check_tables}
        events = drop_damaged(WorkFiles(self.work, blocks, wish.recipe, selection.include_head, kinds, given, others))
        for event in events:
            self.observe(Stage(f"{event.kind}: {event.detail}"))
        self.mended.extend(events)
        return events

    def _job(
        self,
        plans: Mapping[str, LayerPlan] | None = None,
        rows: Mapping[str, NDArray[np.uint8]] | None = None,
        known: Sensitivities | None = None,
    ) -> Job:
        request = self.request
        return Job(
            skeleton=self.model.skeleton,
            recipe=request.wish.recipe,
            folder=self.work,
            skip=tuple(request.selection.skip),
            include_head=request.selection.include_head,
            outer=request.outer,
            plans=plans,
            device=request.device,
            tables=self.model.tables if rows else (),
            table_rows=rows or {},
            uses={} if known is None else {path: table.use for path, table in known.tables.items()},
        )

    def _with_ids(self, job: Job, ids: torch.Tensor) -> CalibratedJob:
        return job.calibrated(ids, self.request.batch_size or max(1, _BATCH_TOKENS // self.request.calibration.seq_len))

    def _calibration(self) -> torch.Tensor:
        """Token ids `[samples, tokens]`; a continued run reads those that it wrote."""
        asked, skeleton = self.request.calibration, self.model.skeleton
        tokens = tokens_read(skeleton.checkpoint, asked)
        check_activations_fit(self.work, skeleton.checkpoint, self.request.wish.recipe, tokens)
        path = self.work / _IDS
        if path.is_file():  # whole: see `_mend`
            return read_tensors(path)["input_ids"]
        vocabulary = vocabulary_size(skeleton.model)
        ids = make_calibration(
            skeleton.checkpoint, asked, vocabulary=vocabulary, progress=lambda text: self.observe(Stage(text))
        )
        write_state(path, {"input_ids": ids})
        return ids

    def _allocated(
        self, ids: torch.Tensor | None, known: Sensitivities | None
    ) -> tuple[Sensitivities | None, Planned | None]:
        """Return the first round's sensitivities and the budget's plan; (known, None) where there is no budget.

        The loss prediction always uses the first round, because its correction was fitted on that.
        """
        wish, planner = self.request.wish, self.model.planner
        if self.request.measures:
            assert ids is not None
            known = self._measured(_TABLES, ids)
        if wish.budget is None or planner is None:
            return known, None
        tables = known
        if self.request.rounds == 2:
            assert ids is not None
            tables = self._second_round(ids)
        return known, planner.plan(wish.budget, wish.scope, tables)

    def _measured(self, name: str, ids: torch.Tensor, at: Path | None = None) -> Sensitivities:
        """Measure once per run, optionally in the quantized checkpoint `at`; a continued run reads the file."""
        path = self.work / name
        if not path.is_file():
            job = self._with_ids(self._job(), ids)
            found = measure(job, self.observe, seed=self.request.calibration.seed, at=at, tables=self.model.tables)
            found.save(path)
        return read_sensitivities(path)

    def _second_round(self, ids: torch.Tensor) -> Sensitivities:
        """Measure in the model that the first round's sensitivities lead to."""
        if (self.work / _TABLES_AGAIN).is_file():
            return read_sensitivities(self.work / _TABLES_AGAIN)
        asked = self.request.calibration
        once = replace(
            self.request,
            calibration=Calibration(self.work / _IDS, len(ids), seq_len=ids.shape[1], seed=asked.seed),
            out=self.work / "first",
            work_dir=None,
            sensitivities=self.request.sensitivities or self.work / _TABLES,
            rounds=1,
        )
        first = run(once, partial(_tell_first_round, self.observe)).folder
        found = self._measured(_TABLES_AGAIN, ids, at=first)
        shutil.rmtree(first)
        return found

    def _write_reports(
        self, folder: Path, outcome: RunReport, planned: Planned | None, prediction: LossPrediction | None
    ) -> dict[str, Any]:
        """Write plan.json and report.json, with the prediction next to the result; return the report."""
        wish = self.request.wish
        layers = {name: layer.plan for r in outcome.records if r.planned for name, layer in r.layers.items()}
        rows = {} if (source := planned or wish.plan) is None else source.table_rows
        plan = plan_json(recipe_json(wish.recipe), layers, self.request.outer, rows)
        promise = Promise(
            folder_bytes(self.model.skeleton, folder, plan),
            wish.budget_json,
            None if planned is None else planned.spent,
            {} if prediction is None else prediction.losses,
            None if prediction is None else prediction.to_json(),
        )
        report = outcome.to_json(folder, promise)
        write_reports(folder, plan, report, promise.folder_bytes, promised=wish.budget is not None)
        return report


def _check_tables(path: Path) -> None:
    try:
        read_sensitivities(path)
    except UserError:
        raise DamagedError("is damaged") from None


def _tell_first_round(observe: Observer, event: object) -> None:
    """Report the events of the first of two rounds as stages."""
    if isinstance(event, Stage):
        observe(Stage(f"first round: {event.text}"))
    elif isinstance(event, BlockDone):
        observe(Stage(f"first round: block {event.block + 1} of {event.blocks} is done"))
