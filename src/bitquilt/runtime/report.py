"""What was a run asked to do, and what came of it? fingerprint_of(...) and build_report(...): plain JSON values."""

import hashlib
import json
import platform
import resource
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from bitquilt._version import __version__
from bitquilt.models.checkpoint import Checkpoint
from bitquilt.models.config import FORMAT_VERSION
from bitquilt.runtime.calibration import describe_source
from bitquilt.runtime.progress import Untouched
from bitquilt.types import Recipe


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe's name and fields."""
    return {"name": recipe.name, **asdict(recipe)}  # type: ignore[call-overload]


def fingerprint_of(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: str | Path,
    samples: int,
    seq_len: int,
    seed: int,
    skip: Sequence[str],
    include_head: bool,
    plan: str | Path | None,
    measures: bool = False,
) -> dict[str, Any]:
    """Everything that decides a run's result: two runs with the same fingerprint write the same bytes."""
    described = None
    if recipe.needs or measures:
        described = {**describe_source(calibration), "samples": samples, "seq_len": seq_len}
    value = {
        "version": __version__,
        "model": {"sha256": checkpoint.fingerprint()},
        "recipe": recipe_json(recipe),
        "calibration": described,
        "seed": seed,
        "skip": list(skip),
        "include_head": include_head,
        "plan": None if plan is None else hashlib.sha256(Path(plan).read_bytes()).hexdigest(),
    }
    return dict(json.loads(json.dumps(value)))


def build_report(
    folder: Path,
    fingerprint: dict[str, Any],
    records: list[dict[str, Any]],
    untouched: tuple[Untouched, ...],
    difference: float,
    seconds: float,
) -> dict[str, Any]:
    """The content of report.json for the checkpoint in `folder`."""
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
