"""`RunReport` is what a run reports in report.json, `Promise` what it promised before; `recipe_json` spells a recipe.

`machine` describes the computer.
"""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from bitquilt._version import __version__
from bitquilt.core.events import StageClock, Untouched, peak_memory_bytes
from bitquilt.core.recipe import Recipe
from bitquilt.core.types import Event
from bitquilt.model.config import FORMAT_VERSION, total_bpw, total_nominal_bits
from bitquilt.model.hashes import file_sha256
from bitquilt.model.structure import Skeleton
from bitquilt.stream.records import BlockRecord
from bitquilt.stream.workdir import Fingerprint


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's name and fields."""
    return {"name": recipe.name, **asdict(recipe)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Promise:
    """What was predicted before the run: the folder's bytes, and the loss in nats per token.

    `budget`: as the fingerprint has it, `spent` of it by the plan. `losses`: by layer; `prediction`: of the model.
    """

    folder_bytes: int
    budget: Mapping[str, Any] | None = None
    spent: float | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    prediction: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class RunReport:
    """A finished run. `difference`: of the reloaded checkpoint's logits, relative to the largest.

    `mended`: an event for each file that the disk did not keep, and that was made again.
    """

    skeleton: Skeleton
    fingerprint: Fingerprint
    records: Sequence[BlockRecord]
    untouched: tuple[Untouched, ...]
    difference: float
    clock: StageClock
    device: torch.device
    mended: Sequence[Event] = ()

    def to_json(self, folder: Path, promise: Promise) -> dict[str, Any]:
        """Return the content of report.json for the checkpoint in `folder`. Seconds and bytes throughout.

        `files`: size and hash of every file of weights, which `bitquilt inspect --verify` compares.
        `stages` and `peak_memory_bytes` are of this process, `blocks` of all that took part; `continued_after_block` is
        how many blocks this process found done.
        """
        layouts = {name: layer.layout for record in self.records for name, layer in record.layers.items()}
        stages = self.clock.stages()
        value = {
            "format_version": FORMAT_VERSION,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "model": _model(self.skeleton),
            "fingerprint": self.fingerprint.settings,
            "bpw": total_bpw(layouts),
            "nominal_bits": total_nominal_bits(layouts),
            "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for path in sorted(folder.glob("*.safetensors"))
            },
            "logit_difference": self.difference,
            "untouched": [asdict(item) for item in self.untouched],
            "events": [asdict(e) for e in (*self.mended, *(e for record in self.records for e in record.events))],
            "training": {r.block: r.training.model_dump(mode="json") for r in self.records if r.training is not None},
            "tuning": next((r.tuning.model_dump(mode="json") for r in self.records if r.tuning is not None), None),
            "layers": self._layers(promise),
            "blocks": [
                {"name": record.block, "seconds": record.seconds, "output_error": record.mean_output_error}
                for record in self.records
            ],
            "stages": stages,
            "continued_after_block": self.clock.continued_after,
            "seconds": {
                "blocks": round(sum(record.seconds for record in self.records), 3),
                "this_process": round(sum(float(stage["seconds"]) for stage in stages), 3),
            },
            "peak_memory_bytes": peak_memory_bytes(),
            "machine": {**machine(), "device": str(self.device)},
            "folder_bytes": promise.folder_bytes,
        }
        if promise.budget is not None:
            size = {"spent": promise.spent, "bytes": promise.folder_bytes, "bpw": value["bpw"]}
            value["budget"] = {**promise.budget, **size}
        if promise.prediction is not None and promise.losses:
            value["prediction"] = promise.prediction
        return value

    def _layers(self, promise: Promise) -> dict[str, Any]:
        found = {}
        for record in self.records:
            for name, layer in record.layers.items():
                found[name] = layer.model_dump(mode="json", exclude={"layout"})
                if promise.prediction is not None and name in promise.losses:
                    found[name]["predicted_loss"] = promise.losses[name]
        return found


def machine() -> dict[str, Any]:
    """Describe the computer: processor, memory in bytes, accelerators, versions."""
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
    """Describe the model. A local one by its folder's name only: a path says more about the user than the model.

    `source`: how another tool had quantized it.
    """
    checkpoint = skeleton.checkpoint
    local = Path(checkpoint.name).is_dir()
    source = checkpoint.source.to_json()
    return {
        "name": checkpoint.folder.resolve().name if local else checkpoint.name,
        "class": type(skeleton.model).__name__,
        "blocks": len(skeleton.blocks),
        "bytes": checkpoint.nbytes,
        **({} if source is None else {"source": source}),
    }


def _processor() -> str:
    """Return the processor's name as Linux gives it, else as Python does; ARM kernels give none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
