"""What was a run asked to do, and what came of it? fingerprint_of(...) and build_report(...): plain JSON values."""

import datetime
import importlib.metadata
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from bitquilt._version import __version__
from bitquilt.core.events import StageClock, Untouched, peak_memory_bytes
from bitquilt.core.plan_file import OuterBits
from bitquilt.core.recipe import Recipe
from bitquilt.core.settings import Calibration, Selection
from bitquilt.data.calibration import describe_calibration
from bitquilt.model.checkpoint import Checkpoint
from bitquilt.model.config import FORMAT_VERSION, read_layouts, total_bpw, total_nominal_bits
from bitquilt.model.structure import Skeleton
from bitquilt.stream.layers import mean_output_error


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe's name and fields."""
    return {"name": recipe.name, **asdict(recipe)}  # type: ignore[call-overload]


def fingerprint_of(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration | None,
    seed: int,
    selection: Selection,
    outer: OuterBits,
    plan: str | None,
) -> dict[str, Any]:
    """Everything that decides a run's result: two runs with the same fingerprint write the same bytes.

    `calibration`: None if the run reads no data; `plan`: hash of the plan file.
    """
    value = {
        "version": __version__,
        "model": {"sha256": checkpoint.fingerprint()},
        "recipe": recipe_json(recipe),
        "calibration": None if calibration is None else describe_calibration(calibration),
        "seed": seed,
        "skip": list(selection.skip),
        "include_head": selection.include_head,
        "embedding_bits": outer.embedding,
        "plan": plan,
    }
    if outer.head is not None:
        value["head_bits"] = outer.head
    return dict(json.loads(json.dumps(value)))


def build_report(
    folder: Path,
    skeleton: Skeleton,
    fingerprint: dict[str, Any],
    records: list[dict[str, Any]],
    untouched: tuple[Untouched, ...],
    difference: float,
    clock: StageClock,
    device: str,
) -> dict[str, Any]:
    """The content of report.json for the checkpoint in `folder`, computed on `device`.

    `stages` and `peak_memory_bytes` are of this process, `blocks` of all that took part; `continued_after_block` is
    how many blocks this process found done. Seconds and bytes throughout.
    """
    layouts = read_layouts(json.loads((folder / "config.json").read_text()))
    stages = clock.stages()
    return {
        "format_version": FORMAT_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": _model(skeleton),
        "fingerprint": fingerprint,
        "bpw": total_bpw(layouts),
        "nominal_bits": total_nominal_bits(layouts),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "logit_difference": difference,
        "untouched": [asdict(item) for item in untouched],
        "events": [event for record in records for event in record["events"]],
        "training": {record["block"]: record["training"] for record in records if "training" in record},
        "tuning": next((record["tuning"] for record in records if "tuning" in record), None),
        "layers": {
            name: {key: value for key, value in layer.items() if key != "layout"}
            for record in records
            for name, layer in record["layers"].items()
        },
        "blocks": [
            {"name": record["block"], "seconds": record["seconds"], "output_error": mean_output_error(record)}
            for record in records
        ],
        "stages": stages,
        "continued_after_block": clock.continued_after,
        "seconds": {
            "blocks": round(sum(record["seconds"] for record in records), 3),
            "this_process": round(sum(float(stage["seconds"]) for stage in stages), 3),
        },
        "peak_memory_bytes": peak_memory_bytes(),
        "machine": {**machine(), "device": device},
    }


def machine() -> dict[str, Any]:
    """What computed: processor, memory in bytes, accelerators, versions."""
    return {
        "platform": platform.platform(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "bitquilt": __version__,
    }


def _model(skeleton: Skeleton) -> dict[str, Any]:
    """Which model it was. Of a local one the folder's name only: a path says more about the user than the model."""
    checkpoint = skeleton.checkpoint
    local = Path(checkpoint.name).is_dir()
    return {
        "name": checkpoint.folder.resolve().name if local else checkpoint.name,
        "class": type(skeleton.model).__name__,
        "blocks": len(skeleton.blocks),
        "bytes": checkpoint.nbytes,
    }


def _processor() -> str:
    """The processor's name as Linux gives it, else as Python does; ARM kernels give none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def add_prediction(
    report: dict[str, Any],
    budget: dict[str, Any] | None,
    spent: float | None,
    folder_bytes: int,
    losses: dict[str, float],
    prediction: dict[str, Any] | None,
) -> None:
    """What was promised, beside what was measured: the budget, the whole folder's bytes, the predicted loss per layer
    (nats per token) and of all."""
    report["folder_bytes"] = folder_bytes
    if budget is not None:
        report["budget"] = {**budget, "spent": spent, "bytes": folder_bytes, "bpw": report["bpw"]}
    if prediction is not None and losses:
        report["prediction"] = prediction
        for name, loss in losses.items():
            report["layers"][name]["predicted_loss"] = loss
