"""The Python interface: `quantize` and `load`. The only place where recipes and runtime meet."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitquilt.allocation.budget import Budget
from bitquilt.errors import UserError
from bitquilt.fit import (
    file_hash,
    load_sensitivities,
    measure_sensitivities,
    open_planner,
    prediction,
    refuse_quantized,
)
from bitquilt.models.checkpoint import Checkpoint, open_checkpoint
from bitquilt.models.config import QUANT_METHOD
from bitquilt.models.structure import Skeleton, architecture, open_skeleton, vocabulary_size
from bitquilt.protocols import ChecksLayers, PlansModel, Recipe, TunesModel
from bitquilt.runtime.calibration import SELF, clip_to_context, make_calibration
from bitquilt.runtime.devices import choose_device
from bitquilt.runtime.embedding import embedding_to_be
from bitquilt.runtime.job import Job, all_targets, shapes
from bitquilt.runtime.planning import predicted_losses
from bitquilt.runtime.plans import check_plan, plan_to_json, read_plan
from bitquilt.runtime.progress import BlockDone, Observer, Stage, StageClock, Started, silent
from bitquilt.runtime.report import add_prediction, build_report, fingerprint_of, recipe_json
from bitquilt.runtime.size import folder_bytes
from bitquilt.runtime.stream import committed, stream
from bitquilt.runtime.survey import survey
from bitquilt.runtime.tables import Sensitivities, read_sensitivities
from bitquilt.runtime.tune import check_memory
from bitquilt.runtime.workdir import (
    discard,
    full_disk_is_an_error,
    open_workdir,
    read_mark,
    read_tensors,
    write_tensors,
)
from bitquilt.runtime.writer import assemble, finished, publish, verify, write_reports
from bitquilt.wish import Wish, check_bytes, same_embedding, wish, wish_for_plan

# Tokens per forward pass of a block: enough for full matrix speed, few enough for memory (one 4096-wide block: 250 MB).
_BATCH_TOKENS = 4096
_IDS = "calibration.safetensors"
_TABLES, _TABLES_AGAIN = "sensitivities.safetensors", "sensitivities-2.safetensors"


@dataclass(frozen=True)
class Result:
    """A finished run: where the checkpoint lies and what report.json says. `already_done`: nothing was computed."""

    folder: Path
    report: dict[str, Any]
    already_done: bool = False


def quantize(
    model: str | Path,
    recipe: str | Recipe | None = None,
    calibration: str | Path = SELF,
    out: str | Path | None = None,
    *,
    samples: int = 128,
    self_samples: int = 0,
    seq_len: int = 2048,
    seed: int = 0,
    batch_size: int | None = None,
    work_dir: str | Path | None = None,
    skip: Sequence[str] = (),
    include_head: bool = False,
    embedding_bits: int | None = None,
    plan: str | Path | None = None,
    budget: Budget | None = None,
    scope: str | None = None,
    sensitivities: str | Path | None = None,
    rounds: int = 1,
    device: str = "cpu",
    observer: Observer = silent,
    **options: Any,
) -> Result:
    """Quantize a model folder (or hub id) into the folder `out`, block by block; interrupted, it continues.

    `recipe`: a name, whose fields are taken from `options` (`bits=2, group_size=32, ...`), or a recipe; without, the
    plan's, else slim-llm. `calibration`: text, jsonl, parquet, a folder of them, a hub data set, token ids in a
    safetensors file, or "self": the model writes its own. `self_samples`: so many sequences of the model's own beside
    those of the text, for recipes that train. `skip`: patterns of layers to leave alone. `include_head`: quantize the
    layer that makes logits too, where it is not tied to the embedding. `embedding_bits`: round the token embedding to
    so many bits (2 to 8; groups of 32, one scale each), and with it a head that is tied to it; a budget counts it.
    `plan`: a plan.json to follow, made for this recipe and embedding or for ones that take the same bytes.
    `budget`: what the whole model may take, such as `Budget.of(size="6.5GiB")`, given out where it hurts least;
    `scope`: "global" (any column group of any layer), "layers" (one width a layer), "layer" (every layer the same
    bits per weight), "pairs" (inside it N-1, N, N+1 in pairs, as SliM-LLM), "uniform". What a width costs is measured
    first, unless `sensitivities` names a file of it. `rounds`: 2 = quantize once, measure again what the errors really
    made there cost, plan and quantize again: twice the time, less loss where a first plan trusts its tables too far.
    `device`: "cuda", "cuda:N", or "auto" (a GPU where there is one) computes the blocks there, one at a time, the next
    one's weights being read meanwhile; embedding and head stay on the processor. Sums are rounded differently, so a few
    codes in ten thousand may differ.
    Raises UserError for anything the caller can mend, VerificationError if the reloaded checkpoint disagrees.
    """
    where = choose_device(device)
    file = None if plan is None else read_plan(plan)
    if file is None:
        wanted = wish(recipe or "slim-llm", options, budget, scope)
    else:
        wanted = wish_for_plan(file.recipe, recipe, options, budget, scope)
        embedding_bits = same_embedding(file.embedding_bits, embedding_bits)
    recipe = wanted.recipe
    if where.type != "cpu" and isinstance(recipe, TunesModel) and recipe.tune_batch > 0:
        raise UserError(f"{recipe.name} with these settings trains all blocks together, which the processor does; "
                        "leave out the device, or take effort=normal")  # fmt: skip
    checkpoint = open_checkpoint(model)
    refuse_quantized(checkpoint)
    if out is None:  # the folder of a hub model is named after its commit
        local = Path(model).is_dir()
        out = f"{checkpoint.folder.resolve().name if local else Path(model).name}-{recipe.name}"
    out = Path(out)
    seq_len, notice = clip_to_context(seq_len, checkpoint)
    _check_self_samples(self_samples, calibration)
    _check_counts(samples=samples, seq_len=seq_len, batch_size=1 if batch_size is None else batch_size)
    if notice and recipe.needs:
        observer(Stage(notice))
    plans = None if file is None else file.plans
    known = None if sensitivities is None else load_sensitivities(sensitivities, checkpoint, recipe)
    worth = wanted.budget is not None and wanted.scope != "uniform"
    if rounds not in (1, 2) or (rounds == 2 and not worth):
        raise UserError(f"rounds is {rounds}; wanted 1, or 2 with a budget that is given out by worth, such as a size")
    measures = worth and known is None
    fingerprint = fingerprint_of(
        checkpoint, recipe, calibration, samples, seq_len, seed, skip, include_head, embedding_bits, plan,
        measures=measures or rounds == 2, self_samples=self_samples,
    )  # fmt: skip
    fingerprint |= wanted.values
    if rounds == 2:
        fingerprint["rounds"] = rounds
    if sensitivities is not None:
        fingerprint["sensitivities"] = file_hash(sensitivities)
    work_path = Path(work_dir) if work_dir is not None else out.with_name(f"{out.name}.work")
    if (done := finished(out, fingerprint)) is not None:
        if read_mark(work_path) == fingerprint:  # killed after the checkpoint was in place
            discard(work_path)
        return Result(out, done, already_done=True)
    skeleton = open_skeleton(checkpoint)
    layers = all_targets(skeleton, skip, include_head)
    embedding = embedding_to_be(skeleton, embedding_bits)
    check_memory(recipe, skeleton, shapes(layers), seq_len)
    untouched = survey(skeleton, {*layers, *([] if embedding is None else [embedding.path])})
    if file is not None and plans is not None:
        columns = getattr(recipe, "channelwise", False) or getattr(recipe, "plans_columns", False)
        check_plan(plans, shapes(layers), channels=columns)
        check_bytes(file.recipe, recipe, shapes(layers), plans)
    elif wanted.budget is not None:
        open_planner(skeleton, recipe, shapes(layers), embedding_bits=embedding_bits).check(wanted.budget)
    elif isinstance(recipe, ChecksLayers):
        try:
            recipe.check_layers(shapes(layers))
        except ValueError as error:
            raise UserError(str(error)) from None
    clock = StageClock(observer)
    observer = clock.observe
    with open_workdir(work_path, fingerprint) as work, full_disk_is_an_error(work):
        blocks, done_blocks = len(skeleton.blocks), len(committed(work, len(skeleton.blocks)))
        observer(Started(str(model), blocks, done_blocks, len(layers), checkpoint.nbytes, untouched))
        ids = None
        if recipe.needs or measures or rounds == 2:
            _check_disk(work, checkpoint, (samples + self_samples) * seq_len, _copies(recipe))
            ids = _calibration(skeleton, work, calibration, samples, self_samples, seq_len, seed, observer)
        planned = None
        if wanted.budget is not None:
            if measures:
                assert ids is not None
                known = _sensitivities(skeleton, recipe, ids, work, skip, include_head, seed, observer)
            tables = known  # what is predicted stays with the first round's, which the law was measured for
            if rounds == 2:
                options = {"seed": seed, "skip": skip, "include_head": include_head}
                tables = _second_round(
                    model, skeleton, wanted, work, observer, sensitivities or work / _TABLES,
                    batch_size=batch_size, embedding_bits=embedding_bits, **options,
                )  # fmt: skip
            planner = open_planner(skeleton, recipe, shapes(layers), tables, embedding_bits=embedding_bits)
            planned = planner.plan(wanted.budget, wanted.scope)
            plans = planned.plans
        batch = batch_size or max(1, _BATCH_TOKENS // seq_len)
        used = ids if recipe.needs else None
        job = Job(skeleton, recipe, used, work, batch, tuple(skip), include_head, embedding_bits, plans, where)
        records = stream(job, observer)
        observer(Stage("writing the checkpoint and comparing its logits with the run's"))
        folder = assemble(skeleton, work, records)
        difference = verify(folder, work)
        report = build_report(folder, skeleton, fingerprint, records, untouched, difference, clock)
        report["machine"]["device"] = str(where)
        plan_value = plan_to_json(recipe_json(recipe), records, embedding_bits)
        losses: dict[str, float] = {}
        predicted = None
        if known is not None and plans is not None and known.method == "kfac":
            losses = predicted_losses(known, plans)
            predicted = prediction(losses, plans, known, embedding is not None)
        room = folder_bytes(skeleton, folder, plan_value)
        spent = None if planned is None else planned.spent
        add_prediction(report, wanted.values.get("budget"), spent, room, losses, predicted)
        write_reports(folder, plan_value, report, room, promised=wanted.budget is not None)
        out.parent.mkdir(parents=True, exist_ok=True)
        publish(folder, out)
        discard(work)
    return Result(out, report)


def load(folder: str | Path, *, device: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """The quantized model in `folder`, ready to run; keyword arguments go to `from_pretrained`.

    `device`: "cuda", "cuda:N" or "auto" puts the packed weights on a GPU, where Triton's kernels read them as they are;
    more than one GPU: leave it out and give `device_map`.
    Raises UserError if the folder is not a bitquilt checkpoint or is damaged, or the device is not here.
    """
    checkpoint = open_checkpoint(folder)
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method != QUANT_METHOD:
        raise UserError(f"{folder} is no bitquilt checkpoint (quant_method is {method!r}); quantize the model first")
    if device is not None and "device_map" in kwargs:
        raise UserError(f"device={device!r} and device_map both say where the model goes; give one")
    if device is not None and (where := choose_device(device)).type != "cpu":
        kwargs["device_map"] = {"": where}
    kind = architecture(checkpoint.config.get("architectures")) or AutoModelForCausalLM
    model: PreTrainedModel = kind.from_pretrained(checkpoint.folder, **kwargs)
    return model


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} is {value}; wanted at least 1")


def _check_self_samples(count: int, calibration: str | Path) -> None:
    if count < 0:
        raise UserError(f"self_samples is {count}; wanted 0 or more")
    if count and str(calibration) == SELF:
        raise UserError(
            "the model writes all of its calibration text already; give more samples instead of self_samples"
        )


def _copies(recipe: Recipe) -> int:
    """Of the calibration's hidden states that lie on the disk at once: a block's inputs and outputs, those of the
    full-precision model beside them, or, in a pass before the first block or for one after the last, what the first
    block reads."""
    if recipe.needs & {"drift", "full"}:
        return 5 if isinstance(recipe, TunesModel) and recipe.tune_batch else 4
    return 3 if isinstance(recipe, PlansModel) else 2


def _check_disk(work: Path, checkpoint: Checkpoint, tokens: int, copies: int) -> None:
    """Refuse early when the disk cannot hold what the run will certainly write: the hidden states of `tokens`."""
    text = checkpoint.config.get("text_config", checkpoint.config)
    width = text.get("hidden_size") or text.get("n_embd") or 0
    there = sum(path.stat().st_size for path in work.glob("activations-*.f32"))
    wanted = max(0, copies * 4 * tokens * width - there)
    free = shutil.disk_usage(work).free
    if wanted > free:
        raise UserError(
            f"the calibration activations need {wanted / 1e9:.1f} GB in {work}, {free / 1e9:.1f} GB are free; "
            "give --work-dir on another disk, or fewer --samples"
        )


def _sensitivities(
    skeleton: Skeleton,
    recipe: Recipe,
    ids: torch.Tensor,
    work: Path,
    skip: Sequence[str],
    include_head: bool,
    seed: int,
    observer: Observer,
) -> Sensitivities:
    """Measured once per run: a run that continues reads what it wrote."""
    path = work / _TABLES
    if not path.is_file():
        found = measure_sensitivities(
            skeleton, recipe, ids, work, skip=skip, include_head=include_head, seed=seed, observer=observer
        )
        found.save(path)
    return read_sensitivities(path)


def _second_round(
    model: str | Path,
    skeleton: Skeleton,
    wanted: Wish,
    work: Path,
    observer: Observer,
    tables: str | Path,
    *,
    batch_size: int | None,
    embedding_bits: int | None,
    **options: Any,
) -> Sensitivities:
    """Tables measured in the model that the first round's `tables` lead to; a continued run reads what it wrote."""

    def retell(event: object) -> None:
        if isinstance(event, Stage):
            observer(Stage(f"first round: {event.text}"))
        elif isinstance(event, BlockDone):
            observer(Stage(f"first round: block {event.block + 1} of {event.blocks} is done"))

    path = work / _TABLES_AGAIN
    if not path.is_file():
        ids = read_tensors(work / _IDS)["input_ids"]
        first = quantize(
            model, wanted.recipe, work / _IDS, work / "first", samples=len(ids), seq_len=ids.shape[1],
            batch_size=batch_size, embedding_bits=embedding_bits, budget=wanted.budget, scope=wanted.scope,
            sensitivities=tables, observer=retell, **options,
        )  # fmt: skip
        found = measure_sensitivities(skeleton, wanted.recipe, ids, work, observer=observer, at=first.folder, **options)
        found.save(path)
        shutil.rmtree(first.folder)
    return read_sensitivities(path)


def _calibration(
    skeleton: Skeleton,
    work: Path,
    source: str | Path,
    samples: int,
    self_samples: int,
    seq_len: int,
    seed: int,
    observer: Observer,
) -> torch.Tensor:
    path = work / _IDS
    if path.is_file():
        return read_tensors(path)["input_ids"]
    ids = make_calibration(
        skeleton.checkpoint,
        source,
        samples=samples,
        self_samples=self_samples,
        seq_len=seq_len,
        seed=seed,
        vocabulary=vocabulary_size(skeleton.model),
        progress=lambda text: observer(Stage(text)),
    )
    write_tensors(path, {"input_ids": ids})
    return ids
