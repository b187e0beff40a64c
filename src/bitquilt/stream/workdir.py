"""What survives `kill -9`? A work directory: every file appears under its name by one rename, when it is complete.

fingerprint.json           what the run was asked to do; another run is refused, with the difference named
calibration.safetensors    token ids
block-00003.safetensors    the tensors of block 3 as the checkpoint will hold them
activations-00004.f32      what block 4 will read, one memory-mapped matrix, and probe-00004.safetensors
block-00003.json           the commit mark of block 3: written last
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitquilt.errors import UserError

FINGERPRINT = "fingerprint.json"


@contextmanager
def open_workdir(folder: Path, fingerprint: dict[str, Any]) -> Iterator[Path]:
    """Create or re-enter `folder` for this run, holding its lock.

    Raises UserError if another process holds it, if it belongs to a run with other inputs, or if it is not ours.
    """
    mark = folder / FINGERPRINT
    if folder.exists() and not mark.is_file() and any(p.name[0] != "." for p in folder.iterdir()):
        raise UserError(f"{folder} exists and is no work directory of a run; move it away or give another --work-dir")
    with full_disk_is_an_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another process is working in {folder}; wait for it or give another --work-dir") from None
        try:
            _drop_temporaries(folder)
            if mark.is_file() and not _nothing_done(folder):
                check_fingerprint(folder, json.loads(mark.read_text()), fingerprint)
            else:
                write_json(mark, fingerprint)
            yield folder
        finally:
            if folder.exists():
                _drop_temporaries(folder)
                if _nothing_done(folder):
                    discard(folder)
            lock.release()


def read_mark(folder: Path) -> dict[str, Any] | None:
    """The fingerprint of the run that `folder` belongs to, or None if it is no work directory."""
    mark = folder / FINGERPRINT
    return dict(json.loads(mark.read_text())) if mark.is_file() else None


def discard(folder: Path) -> None:
    """Delete a work directory, its mark last: when the process is killed half-way, what is left is still known."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in (FINGERPRINT, ".lock"):
            path.unlink(missing_ok=True)
    (folder / FINGERPRINT).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def check_fingerprint(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise UserError naming the first setting in which two runs differ."""
    ours, theirs = dict(_flatten(here)), dict(_flatten(there))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{folder} belongs to another run: {key} was {_shown(theirs.get(key))}, now it is "
                f"{_shown(ours.get(key))}; give another output folder, or delete this one to start afresh"
            )


def write_json(path: Path, value: Any) -> None:
    """Write and rename into place."""
    _replace(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file and rename it into place."""
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    _replace(path, lambda temporary: save_file(contiguous, temporary, metadata={"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file this run wrote."""
    return load_file(path)


class Activations:
    """A fp32 matrix `[samples, tokens, width]` on disk. A batch is mapped while it is used, then let go, so that
    memory holds one batch whatever the size of the file. Space is reserved first: writing into a mapped hole of a
    full disk would kill the process instead of raising an error."""

    def __init__(self, path: Path, shape: tuple[int, int, int], kept: Tensor | None = None) -> None:
        """`kept`: the same matrix where it is computed with."""
        self.path, self.shape, self._kept = path, shape, kept

    @classmethod
    def create(cls, path: Path, shape: tuple[int, int, int]) -> "Activations":
        """Reserve the file. Raises OSError (no space) before anything is computed."""
        with path.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(1, 4 * int(np.prod(shape))))
        return cls(path, shape)

    def read(self, rows: slice) -> Tensor:
        """A batch, in memory, or on the device where it was kept."""
        if self._kept is not None:
            return self._kept[rows].clone()
        return torch.from_numpy(np.array(self._map("r", rows)))

    def write(self, rows: slice, values: Tensor) -> None:
        """Store a batch."""
        mapped = self._map("r+", rows)
        mapped[:] = values.detach().float().cpu().numpy()
        mapped.flush()

    def commit(self, path: Path) -> "Activations":
        """Make the bytes durable and rename the file."""
        with self.path.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(self.path, path)
        return Activations(path, self.shape)

    def _map(self, mode: Literal["r", "r+"], rows: slice) -> Any:
        count, tokens, width = self.shape
        start, stop, _ = rows.indices(count)
        offset = 4 * start * tokens * width
        return np.memmap(self.path, np.float32, mode, offset, (stop - start, tokens, width))


@contextmanager
def full_disk_is_an_error(folder: Path) -> Iterator[None]:
    """Turn "no space left" into a message that says where, how much is free and how to go on."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and "os error 28" not in str(error):
            raise
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        raise UserError(
            f"the disk of {folder} is full ({free / 1e6:.0f} MB free); finished blocks are kept: free some space, or "
            "give --work-dir on another disk, and run the same command again"
        ) from None


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _nothing_done(folder: Path) -> bool:
    return all(path.name == FINGERPRINT or path.name.startswith(".") for path in folder.iterdir())


def _drop_temporaries(folder: Path) -> None:
    """Half-written files, ours and those safetensors makes, may hold the space that a full disk lacks."""
    for path in folder.iterdir():
        if path.name.startswith(".") and path.name != ".lock" and path.is_file():
            path.unlink(missing_ok=True)


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _shown(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
