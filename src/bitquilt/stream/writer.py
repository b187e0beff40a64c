"""`assemble` turns a finished work directory into a checkpoint folder, `verify` reloads it and compares logits.

`write_reports` adds plan.json and report.json, `publish` moves the folder to its place, and `finished` recognizes an
output that is already there. `check_output` and `reserved` make sure of its place before the run. One shard per block,
linked into place, so that a 70B model needs no second copy on the disk; the rest of the model is copied tensor by
tensor, under its own names and types.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor

from bitquilt.core.json_files import read_json
from bitquilt.core.units import size_text
from bitquilt.errors import UserError, VerificationError
from bitquilt.model.checkpoint import INDEX_NAME, open_checkpoint
from bitquilt.model.config import read_layouts, with_quantization
from bitquilt.model.replace import replaced_weights
from bitquilt.model.structure import Skeleton, open_skeleton
from bitquilt.stream.block_calls import learn_calls
from bitquilt.stream.records import BlockRecord
from bitquilt.stream.workdir import Fingerprint, make_folder, read_tensors, write_json, write_tensors

_SHARD_BYTES = 10**9
# The reloaded model runs the same ops on the same bytes: what differs is the order of thread sums at most.
_LOGIT_TOLERANCE = 1e-4


def assemble(skeleton: Skeleton, work: Path, records: Sequence[BlockRecord]) -> Path:
    """Build the checkpoint folder inside the work directory from scratch and return its path."""
    folder = work / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    layouts = {name: layer.layout for record in records for name, layer in record.layers.items()}
    files = [work / record.file for record in records]
    for number, names in enumerate(rest_shards(skeleton, replaced_weights(layouts))):
        files.append(work / f"rest-{number:05d}.safetensors")
        write_tensors(files[-1], skeleton.checkpoint.read(names))
    weight_map: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _link(file, folder / name)
        with safe_open(file, framework="pt") as handle:
            weight_map |= dict.fromkeys(handle.keys(), name)
        total += file.stat().st_size
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = with_quantization(skeleton.checkpoint.config, layouts)
    for record in records:
        if record.tied is not None:  # a config may call two tables tied that are stored apart
            config["tie_word_embeddings"] = record.tied
    write_json(folder / "config.json", config)
    for companion in skeleton.checkpoint.companions():
        shutil.copyfile(companion, folder / companion.name)
    return folder


def verify(folder: Path, work: Path) -> float:
    """Reload the checkpoint block by block and compare its logits on the probe with the run's.

    Return the largest difference relative to the largest logit. Raises VerificationError if it is not tiny.
    """
    checkpoint = open_checkpoint(folder)
    skeleton = open_skeleton(checkpoint, read_layouts(checkpoint.config))
    expected = read_tensors(work / "logits.safetensors")
    logits = streamed_logits(skeleton, expected["ids"])
    largest = float(expected["logits"].abs().max().clamp_min(1e-30))
    difference = float((logits - expected["logits"]).abs().max()) / largest
    if not difference <= _LOGIT_TOLERANCE:
        raise VerificationError(
            f"the checkpoint in {folder} does not compute what the run computed: on {expected['ids'].numel()} tokens "
            f"their logits differ by {difference:.2g} of the largest (allowed {_LOGIT_TOLERANCE}). Nothing was "
            f"published, and the work directory {work} is kept. Delete it and run the same command again. If that ends "
            f"the same way, bitquilt computes {type(skeleton.model).__name__} wrongly: please report it"
        )
    return difference


@torch.no_grad()
def streamed_logits(skeleton: Skeleton, ids: Tensor) -> Tensor:
    """Return the model's logits for ids `[batch, tokens]` with one block in memory at a time."""
    with skeleton.resident(""):
        calls = learn_calls(skeleton, [ids], ids.device)
        hidden = calls.start(ids)
        for i, path in enumerate(skeleton.blocks):
            with skeleton.resident(path) as block:
                hidden = calls.run(i, block, hidden)
        return calls.finish(ids, hidden).float()


def rest_shards(skeleton: Skeleton, replaced: set[str]) -> list[list[str]]:
    """Split what is outside the blocks and not `replaced` into shards of a gigabyte; return the checkpoint's names."""
    infos = skeleton.checkpoint.tensors
    shards: list[list[str]] = [[]]
    for name in skeleton.kept_sources("", replaced):
        if shards[-1] and sum(infos[n].nbytes for n in shards[-1]) + infos[name].nbytes > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    return [names for names in shards if names]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def write_reports(folder: Path, plan: Mapping[str, Any], report: Mapping[str, Any], total: int, promised: bool) -> None:
    """Write plan.json and report.json, the report padded with blanks so that the folder takes `total` bytes.

    A report too long for a `promised` total loses its line breaks, then its last events, and says so. Without a promise
    the folder becomes larger instead, and the report's `folder_bytes` says how large.
    """
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


def finished(out: Path, fingerprint: Fingerprint) -> dict[str, Any] | None:
    """Return the report of an output that this run finished before, or None if `out` is free.

    Raises UserError if another run, or something else, made `out`.
    """
    if not out.exists() or _is_empty_folder(out):
        return None
    try:
        report = read_json(out / "report.json")
        found = Fingerprint(report["fingerprint"])
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(
            f"{out} exists and was not made by bitquilt; give another output folder, or move it away"
        ) from None
    fingerprint.check_same(out, found)
    return dict(report)


def check_output(out: Path, work: Path, promised: float = 0.0) -> None:
    """Raise UserError if the finished folder could not be moved to `out`, before anything is computed.

    `work`: the work directory. `promised`: bytes of the output, needed on a disk of its own.
    """
    if out.is_symlink():
        raise UserError(f"{out} is a symbolic link to {os.readlink(out)}; give the output folder itself")
    one, other = Path(os.path.realpath(out)), Path(os.path.realpath(work))
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise UserError(
            f"the output folder {out} and the work directory {work} contain each other; give a --work-dir elsewhere"
        )
    place = _existing(out.absolute().parent)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "is not a folder" if not place.is_dir() else "is read-only for you"
        raise UserError(f"{out} cannot be created: {place} {what}; give another output folder")
    check_room(out, work, promised)


def check_room(out: Path, work: Path, wanted: float) -> None:
    """Raise UserError if a checkpoint of `wanted` bytes does not fit the disk of `out`; it is renamed on one disk."""
    place, existing = _existing(out.absolute().parent), _existing(work.absolute())
    free = shutil.disk_usage(place).free
    if wanted > free and _disk(place) != _disk(existing):
        raise UserError(
            f"the checkpoint takes {size_text(int(wanted))} and in {place} {size_text(free)} are free; give another "
            "output folder, or free some space"
        )


def _disk(path: Path) -> int:
    return path.stat().st_dev


def _existing(path: Path) -> Path:
    """The nearest of `path` and its parents that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


@contextlib.contextmanager
def reserved(out: Path) -> Iterator[None]:
    """Hold a lock on the name `out`. Raises UserError if another run writes there, whatever its work directory."""
    make_folder(out.parent)
    path = out.with_name(f".{out.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another run is writing {out}; wait for it or give another output folder") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def publish(folder: Path, out: Path) -> None:
    """Rename the finished folder to `out`; on another disk, copy it next to `out` first.

    Raises UserError if that fails; the finished folder then stays where it is, and the message says so.
    """
    neighbour = out.with_name(f".{out.name}.tmp")
    try:
        if out.is_symlink() or (out.exists() and not _is_empty_folder(out)):
            raise FileExistsError(errno.EEXIST, "something else was put there during the run")
        with contextlib.suppress(OSError):
            out.rmdir()  # an empty folder that the user made
        try:
            folder.rename(out)
        except OSError:
            shutil.rmtree(neighbour, ignore_errors=True)
            shutil.copytree(folder, neighbour)
            for file in neighbour.iterdir():  # the original is deleted next
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            neighbour.rename(out)
    except OSError as error:
        shutil.rmtree(neighbour, ignore_errors=True)
        raise UserError(
            f"the checkpoint is finished but could not be moved to {out} ({_reason(error)}); it is complete in "
            f"{folder}. Move it yourself, or mend the cause and run the same command again, which only moves it"
        ) from None


def _reason(error: OSError) -> str:
    """Why files could not be moved; `shutil.Error` lists every file that failed."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list) and error.args[0]:
        return str(error.args[0][0][-1])
    return error.strerror or str(error)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
