"""The Python interface: `quantize`, `load`, `evaluate`. The only place where recipes and runtime meet."""

import contextlib
import hashlib
import json
import platform
import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitquilt._version import __version__
from bitquilt.errors import UserError
from bitquilt.models.checkpoint import Checkpoint, open_checkpoint
from bitquilt.models.config import FORMAT_VERSION, QUANT_METHOD
from bitquilt.models.linear import linear_weight
from bitquilt.models.structure import Skeleton, architecture, linear_layers, open_skeleton, vocabulary_size
from bitquilt.recipes import make_recipe
from bitquilt.runtime.calibration import SELF, context_limit, describe_source, make_calibration
from bitquilt.runtime.plans import check_plan, plan_to_json, read_plan
from bitquilt.runtime.progress import Observer, Stage, Started, Untouched, silent
from bitquilt.runtime.stream import Job, committed, stream, targets
from bitquilt.runtime.workdir import (
    check_fingerprint,
    discard,
    full_disk_is_an_error,
    open_workdir,
    read_mark,
    read_tensors,
    write_tensors,
)
from bitquilt.runtime.writer import assemble, read_report, verify, write_reports
from bitquilt.types import ChecksLayers, Recipe

# Tokens per forward pass of a block: enough for full matrix speed, few enough for memory (one 4096-wide block: 250 MB).
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Result:
    """A finished run: where the checkpoint lies and what report.json says. `already_done`: nothing was computed."""

    folder: Path
    report: dict[str, Any]
    already_done: bool = False


def quantize(
    model: str | Path,
    recipe: str | Recipe = "slim-llm",
    calibration: str | Path = SELF,
    out: str | Path | None = None,
    *,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    batch_size: int | None = None,
    work_dir: str | Path | None = None,
    skip: Sequence[str] = (),
    plan: str | Path | None = None,
    observer: Observer = silent,
    **options: Any,
) -> Result:
    """Quantize a model folder (or hub id) into the folder `out`, block by block; interrupted, it continues.

    `recipe`: a name, whose fields are taken from `options` (`bits=2, group_size=32, ...`), or a recipe.
    `calibration`: text, jsonl, parquet, a folder of them, a hub data set, token ids in a safetensors file, or
    "self": the model writes its own. `skip`: patterns of layers to leave alone. `plan`: a plan.json to follow.
    Raises UserError for anything the caller can mend, VerificationError if the reloaded checkpoint disagrees.
    """
    if isinstance(recipe, str):
        recipe = make_recipe(recipe, **options)
    elif options:
        raise UserError(f"options {sorted(options)} go with a recipe's name; set them on the recipe itself")
    checkpoint = open_checkpoint(model)
    _refuse_quantized(checkpoint)
    if out is None:  # the folder of a hub model is named after its commit
        local = Path(model).is_dir()
        out = f"{checkpoint.folder.resolve().name if local else Path(model).name}-{recipe.name}"
    out = Path(out)
    needs_data = bool(recipe.needs)
    seq_len, notice = _clip(seq_len, checkpoint)
    _check_counts(samples=samples, seq_len=seq_len, batch_size=1 if batch_size is None else batch_size)
    if notice and needs_data:
        observer(Stage(notice))
    plans = None if plan is None else read_plan(plan)
    fingerprint = _fingerprint(checkpoint, recipe, calibration, samples, seq_len, seed, skip, plan)
    work_path = Path(work_dir) if work_dir is not None else out.with_name(f"{out.name}.work")
    if (done := _finished(out, fingerprint)) is not None:
        if read_mark(work_path) == fingerprint:  # killed after the checkpoint was in place
            discard(work_path)
        return Result(out, done, already_done=True)
    skeleton = open_skeleton(checkpoint)
    untouched, layers = survey(skeleton, skip)
    if plans is not None:
        widths = {name: shape[1] for name, shape in _shapes(skeleton, skip).items()}
        check_plan(plans, widths, channels=getattr(recipe, "channelwise", False))
    elif isinstance(recipe, ChecksLayers):
        try:
            recipe.check_layers(_shapes(skeleton, skip))
        except ValueError as error:
            raise UserError(str(error)) from None
    started = time.perf_counter()
    with open_workdir(work_path, fingerprint) as work, full_disk_is_an_error(work):
        blocks = len(skeleton.blocks)
        done_blocks = len(committed(work, blocks))
        observer(Started(str(model), blocks, done_blocks, layers, checkpoint.nbytes, untouched))
        _check_disk(work, checkpoint, samples * seq_len if needs_data else 0)
        ids = None
        if needs_data:
            ids = _calibration(skeleton, work, calibration, samples, seq_len, seed, observer)
        batch = batch_size or max(1, _BATCH_TOKENS // seq_len)
        job = Job(skeleton, recipe, ids, work, batch, tuple(skip), plans)
        records = stream(job, observer)
        observer(Stage("writing the checkpoint and comparing its logits with the run's"))
        folder = assemble(skeleton, work, records)
        difference = verify(folder, work)
        report = _report(folder, fingerprint, records, untouched, difference, time.perf_counter() - started)
        write_reports(folder, plan_to_json(_recipe_json(recipe), records), report)
        out.parent.mkdir(parents=True, exist_ok=True)
        _publish(folder, out)
        discard(work)
    return Result(out, report)


def load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The quantized model in `folder`, ready to run; keyword arguments go to `from_pretrained`.

    Raises UserError if the folder is not a bitquilt checkpoint or is damaged.
    """
    checkpoint = open_checkpoint(folder)
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method != QUANT_METHOD:
        raise UserError(f"{folder} is no bitquilt checkpoint (quant_method is {method!r}); quantize the model first")
    kind = architecture(checkpoint.config.get("architectures")) or AutoModelForCausalLM
    model: PreTrainedModel = kind.from_pretrained(checkpoint.folder, **kwargs)
    return model


def survey(skeleton: Skeleton, skip: Sequence[str] = ()) -> tuple[tuple[Untouched, ...], int]:
    """What a run will leave as it is, by reason with its bytes, and how many layers it will quantize.

    Raises UserError if nothing would be quantized.
    """
    quantized = set()
    linear = set()
    for path in skeleton.blocks:
        block = skeleton.model.get_submodule(path)
        quantized |= {f"{path}.{name}.weight" for name in targets(skeleton, path, block, skip)}
        linear |= {f"{path}.{name}.weight" for name in linear_layers(block)}
    if not quantized:
        raise UserError("every linear layer is skipped: nothing to quantize")
    own = dict(skeleton.model.state_dict())
    grouped: dict[str, list[str]] = {}
    for path, sources in skeleton.sources.items():
        for source in sources:
            name = skeleton.parameters.get(source)
            if name in quantized:
                continue
            info = skeleton.checkpoint.tensors[source]
            if name is not None and name not in own:
                reason = "not part of this model class, kept as it is"
            elif not path:
                reason = "outside the blocks (embedding, final norm, head)"
            elif name in linear:
                reason = "skipped on request"
            elif len(info.shape) < 2:
                reason = "vectors inside the blocks (norms, biases)"
            else:
                reason = "inside the blocks, not a plain linear layer (experts, routers, convolutions)"
            grouped.setdefault(reason, []).append(source)
    infos = skeleton.checkpoint.tensors
    summary = [
        Untouched(reason, len(names), sum(infos[n].nbytes for n in names), names[0])
        for reason, names in grouped.items()
    ]
    return tuple(sorted(summary, key=lambda item: -item.nbytes)), len(quantized)


def _shapes(skeleton: Skeleton, skip: Sequence[str]) -> dict[str, tuple[int, int]]:
    """`[out, in]` of the layers to quantize, by path."""
    return {
        f"{path}.{name}": (linear_weight(module).shape[0], linear_weight(module).shape[1])
        for path in skeleton.blocks
        for name, module in targets(skeleton, path, skeleton.model.get_submodule(path), skip).items()
    }


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    entry = checkpoint.config.get("quantization_config")
    if entry:
        method = entry.get("quant_method", "unknown") if isinstance(entry, dict) else entry
        raise UserError(f"{checkpoint.name} is already quantized ({method}); give the full-precision model")


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} is {value}; wanted at least 1")


def _clip(seq_len: int, checkpoint: Checkpoint) -> tuple[int, str | None]:
    limit = context_limit(checkpoint.config)
    if limit is not None and seq_len > limit:
        return (
            limit,
            f"calibration sequences are clipped from {seq_len} to the model's context of {limit} tokens",
        )
    return seq_len, None


def _recipe_json(recipe: Recipe) -> dict[str, Any]:
    return {"name": recipe.name, **asdict(recipe)}  # type: ignore[call-overload]


def _fingerprint(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: str | Path,
    samples: int,
    seq_len: int,
    seed: int,
    skip: Sequence[str],
    plan: str | Path | None,
) -> dict[str, Any]:
    described = None
    if recipe.needs:
        described = {**describe_source(calibration), "samples": samples, "seq_len": seq_len}
    value = {
        "version": __version__,
        "model": {"sha256": checkpoint.fingerprint()},
        "recipe": _recipe_json(recipe),
        "calibration": described,
        "seed": seed,
        "skip": list(skip),
        "plan": None if plan is None else hashlib.sha256(Path(plan).read_bytes()).hexdigest(),
    }
    return dict(json.loads(json.dumps(value)))


def _finished(out: Path, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """The report of an output that is already there and is this run's. Raises UserError if it is anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    report = read_report(out) if out.is_dir() else None
    if report is None:
        raise UserError(f"{out} exists and was not made by bitquilt; give another output folder, or move it away")
    check_fingerprint(out, report["fingerprint"], fingerprint)
    return report


def _check_disk(work: Path, checkpoint: Checkpoint, tokens: int) -> None:
    """Refuse early when the disk cannot hold what the run will certainly write: activations, twice."""
    text = checkpoint.config.get("text_config", checkpoint.config)
    width = text.get("hidden_size") or text.get("n_embd") or 0
    there = sum(path.stat().st_size for path in work.glob("activations-*.f32"))
    wanted = max(0, 2 * 4 * tokens * width - there)
    free = shutil.disk_usage(work).free
    if wanted > free:
        raise UserError(
            f"the calibration activations need {wanted / 1e9:.1f} GB in {work}, {free / 1e9:.1f} GB are free; "
            "give --work-dir on another disk, or fewer --samples"
        )


def _calibration(
    skeleton: Skeleton,
    work: Path,
    source: str | Path,
    samples: int,
    seq_len: int,
    seed: int,
    observer: Observer,
) -> torch.Tensor:
    path = work / "calibration.safetensors"
    if path.is_file():
        return read_tensors(path)["input_ids"]
    ids = make_calibration(
        skeleton.checkpoint,
        source,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        vocabulary=vocabulary_size(skeleton.model),
        progress=lambda text: observer(Stage(text)),
    )
    write_tensors(path, {"input_ids": ids})
    return ids


def _report(
    folder: Path,
    fingerprint: dict[str, Any],
    records: list[dict[str, Any]],
    untouched: tuple[Untouched, ...],
    difference: float,
    seconds: float,
) -> dict[str, Any]:
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "bpw": entry["bpw"],
        "nominal_bits": entry["nominal_bits"],
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "logit_difference": difference,
        "untouched": [asdict(item) for item in untouched],
        "events": [event for record in records for event in record["events"]],
        "layers": {
            name: {key: value for key, value in layer.items() if key != "layout"}
            for record in records
            for name, layer in record["layers"].items()
        },
        "seconds": {
            "blocks": round(sum(record["seconds"] for record in records), 3),
            "this_process": round(seconds, 3),
        },
        # of this process; Linux counts in KiB
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        },
    }


def _publish(folder: Path, out: Path) -> None:
    """Make the finished folder appear under its name; across disks a rename is a copy to a neighbour, then a rename."""
    with contextlib.suppress(OSError):
        out.rmdir()  # an empty folder the user made
    try:
        folder.rename(out)
    except OSError:
        neighbour = out.with_name(f".{out.name}.tmp")
        shutil.rmtree(neighbour, ignore_errors=True)
        shutil.copytree(folder, neighbour)
        neighbour.rename(out)
