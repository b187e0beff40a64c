"""How does a finished work directory become a checkpoint? assemble(...), then verify(...): reload, compare logits.

One shard per block, linked into place, so that a 70B model needs no second copy on the disk; the rest of the model
is copied tensor by tensor, under its own names and types.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bitquilt.core.packing import layout_from_json
from bitquilt.errors import UserError, VerificationError
from bitquilt.model.checkpoint import INDEX_NAME, open_checkpoint
from bitquilt.model.config import read_layouts, with_quantization
from bitquilt.model.structure import Skeleton, open_skeleton
from bitquilt.stream.block_calls import embed, finish, open_outer, record_calls
from bitquilt.stream.workdir import check_fingerprint, read_tensors, write_json, write_tensors

_SHARD_BYTES = 10**9
# The reloaded model runs the same ops on the same bytes: what differs is the order of thread sums at most.
_LOGIT_TOLERANCE = 1e-4


def assemble(skeleton: Skeleton, work: Path, records: list[dict[str, Any]]) -> Path:
    """Build the checkpoint folder inside the work directory, from scratch; returns its path."""
    folder = work / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files = [work / record["file"] for record in records]
    replaced = {f"{name}.weight" for record in records for name in record["layers"]}
    files += _write_rest(skeleton, work, replaced)
    weight_map: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _link(file, folder / name)
        with safe_open(file, framework="pt") as handle:
            weight_map |= dict.fromkeys(handle.keys(), name)
        total += file.stat().st_size
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    layouts = {
        name: layout_from_json(entry["layout"], name) for record in records for name, entry in record["layers"].items()
    }
    config = with_quantization(skeleton.checkpoint.config, layouts)
    for record in records:
        if "tied" in record:  # a config may call two tables tied that are stored apart; the loader must know which
            config["tie_word_embeddings"] = record["tied"]
    write_json(folder / "config.json", config)
    for companion in skeleton.checkpoint.companions():
        shutil.copyfile(companion, folder / companion.name)
    return folder


def verify(folder: Path, work: Path) -> float:
    """Reload the checkpoint block by block and compare its logits on the probe with the run's.

    Returns the largest difference relative to the largest logit. Raises VerificationError if it is not tiny.
    """
    checkpoint = open_checkpoint(folder)
    skeleton = open_skeleton(checkpoint, read_layouts(checkpoint.config))
    expected = read_tensors(work / "logits.safetensors")
    logits = streamed_logits(skeleton, expected["ids"])
    largest = float(expected["logits"].abs().max().clamp_min(1e-30))
    difference = float((logits - expected["logits"]).abs().max()) / largest
    if not difference <= _LOGIT_TOLERANCE:
        raise VerificationError(
            f"the checkpoint in {folder} does not compute what the run computed: logits differ by {difference:.2g} of "
            f"the largest (allowed {_LOGIT_TOLERANCE}); the disk may be failing. The work directory is kept"
        )
    return difference


@torch.no_grad()
def streamed_logits(skeleton: Skeleton, ids: Tensor) -> Tensor:
    """The model's logits for ids `[batch, tokens]` with one block in memory at a time."""
    extras = open_outer(skeleton, ids)
    calls = record_calls(skeleton, ids, extras)
    hidden = embed(skeleton, ids)
    for path, call in zip(skeleton.blocks, calls, strict=True):
        template = skeleton.template(path)
        hidden = call(skeleton.load(path), hidden)
        skeleton.reset(path, template)
    return finish(skeleton, ids, hidden, extras).float()


def _write_rest(skeleton: Skeleton, work: Path, replaced: set[str]) -> list[Path]:
    """Everything outside the blocks that was not quantized, unchanged, in shards of about a gigabyte."""
    files = []
    for number, names in enumerate(rest_shards(skeleton, replaced)):
        path = work / f"rest-{number:05d}.safetensors"
        write_tensors(path, skeleton.checkpoint.read(names))
        files.append(path)
    return files


def rest_shards(skeleton: Skeleton, replaced: set[str]) -> list[list[str]]:
    """Checkpoint names of what lies outside the blocks and is not `replaced`, cut into shards."""
    infos = skeleton.checkpoint.tensors
    shards: list[list[str]] = [[]]
    for name in skeleton.sources[""]:
        if skeleton.parameters.get(name) in replaced:
            continue
        if shards[-1] and sum(infos[n].nbytes for n in shards[-1]) + infos[name].nbytes > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    return [names for names in shards if names]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def write_reports(folder: Path, plan: dict[str, Any], report: dict[str, Any], total: int, promised: bool) -> None:
    """plan.json and report.json beside the weights, the report padded with blanks so that the folder takes `total`
    bytes. One that is too long for a total that was `promised` is written without line breaks, then without its last
    events, which it says; without a promise the folder is larger, and `folder_bytes` says how large."""
    write_json(folder / "plan.json", plan)
    others = sum(path.stat().st_size for path in folder.iterdir())
    room = total - others
    text = json.dumps(report, indent=1)
    if promised and len(text) >= room:
        text = json.dumps(report, separators=(",", ":"))
        kept = len(report["events"])
        while len(text) >= room and kept:
            kept //= 2
            gone = len(report["events"]) - kept
            left = {"layer": "", "kind": "events left out", "detail": f"{gone} for want of room"}
            text = json.dumps({**report, "events": [*report["events"][:kept], left]}, separators=(",", ":"))
    elif len(text) >= room:
        room = len(text) + 2  # one more digit in the number itself
        text = json.dumps({**report, "folder_bytes": others + room}, indent=1)
    (folder / "report.json").write_text(text + " " * (room - len(text) - 1) + "\n")


def finished(out: Path, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """The report of an output that is already there and is this run's. Raises UserError if it is anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    report = read_report(out) if out.is_dir() else None
    if report is None:
        raise UserError(f"{out} exists and was not made by bitquilt; give another output folder, or move it away")
    check_fingerprint(out, report["fingerprint"], fingerprint)
    return report


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of a finished output folder, or None if the folder is not ours."""
    path = folder / "report.json"
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text())
    except json.JSONDecodeError:
        return None
    return report if isinstance(report, dict) and "fingerprint" in report else None


def publish(folder: Path, out: Path) -> None:
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
