"""A work directory survives `kill -9`: every file appears under its name by one rename, once it is complete.

`open_workdir` locks one for a run with a given `Fingerprint`, `delete_workdir` removes it, `write_mark`, `write_state`,
`write_tensors`, `read_tensors` and `ActivationFile` handle its files, and `check_disk` asks for room in advance. Every
file has a sum of its content; `read_mark`, `check_state`, `check_activations` and `tensors_sum` compare it
(`stream/resume/damage.py`).

fingerprint.json           what the run was asked to do; another run is refused, with the difference named
calibration.safetensors    token ids
block-00003.safetensors    the tensors of block 3 as the checkpoint will hold them
activations-00004.f32      what block 4 will read, one memory-mapped matrix, and probe-00004.safetensors
block-00003.json           the commit mark of block 3: written last
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitquilt.core.json_files import read_json
from bitquilt.errors import UserError

_MARK = "fingerprint.json"
_SUM_BYTES = 8  # at the end of a file of activations
_SUM_OF_NOTHING = 2**63 + 1  # not 0: a file of zeros is what a crash of the machine leaves
_CHUNK = 2**24


@dataclass(frozen=True)
class Fingerprint:
    """Every setting that decides a run's result: two runs with equal fingerprints write the same bytes.

    `settings`: nested plain values, as fingerprint.json holds them.
    """

    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", json.loads(json.dumps(self.settings)))  # tuples become lists

    def check_same(self, folder: Path, found: "Fingerprint") -> None:
        """Raise UserError naming the first setting in which `found`, read in `folder`, differs."""
        ours, theirs = dict(_flatten(self.settings)), dict(_flatten(found.settings))
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise UserError(
                    f"{folder} belongs to another run: {key} was {_shown(theirs.get(key))}, now it is "
                    f"{_shown(ours.get(key))}; give another output folder, or delete this one to start afresh"
                )


@contextmanager
def open_workdir(folder: Path, fingerprint: Fingerprint) -> Iterator[Path]:
    """Create or re-enter `folder` for this run and hold its lock.

    Raises UserError if another process holds the lock, or if the folder belongs to another run or to no run at all.
    """
    mark = folder / _MARK
    if folder.exists() and not mark.is_file() and any(p.name[0] != "." for p in folder.iterdir()):
        raise UserError(f"{folder} exists and is not a work directory; move it away or give another --work-dir")
    with full_disk_is_an_error(folder):
        make_folder(folder)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another process is working in {folder}; wait for it or give another --work-dir") from None
        try:
            _delete_temporaries(folder)
            found = read_fingerprint(folder)
            if found is not None and not _nothing_done(folder):
                fingerprint.check_same(folder, found)
            else:
                write_json(mark, fingerprint.settings)
            yield folder
        finally:
            if folder.exists():
                _delete_temporaries(folder)
                if _nothing_done(folder):
                    delete_workdir(folder)
            lock.release()


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents. Raises UserError where none can be made; a full disk stays an OSError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{folder} cannot be created ({error.strerror}); give a folder in a place of yours") from None


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """Return the fingerprint of the run that `folder` belongs to, or None for any other folder."""
    mark = folder / _MARK
    if not mark.is_file():
        return None
    try:
        settings = read_json(mark)
    except (OSError, ValueError) as error:
        settings = error
    if not isinstance(settings, dict):
        raise UserError(f"{mark} is damaged, so its run cannot continue; delete {folder} to start afresh")
    return Fingerprint(settings)


def delete_workdir(folder: Path) -> None:
    """Delete a work directory, its mark last, so that what a killed process leaves behind is still recognized."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in (_MARK, ".lock"):
            path.unlink(missing_ok=True)
    (folder / _MARK).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def check_disk(folder: Path, wanted: int, what: str) -> None:
    """Raise UserError unless `folder` has room for `wanted` more bytes of `what`, a plural."""
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise UserError(
            f"{what} need {wanted / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free; "
            "give --work-dir on another disk, or fewer --samples"
        )


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file and rename it into place."""
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


class DamagedError(ValueError):
    """A file does not hold what was written; the text completes "FILE ..."."""


def write_mark(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with the sum of its content and rename it into place."""
    write_json(path, {**value, "sum": _json_sum(value)})


def read_mark(path: Path) -> dict[str, Any]:
    """Return what `write_mark` wrote. Raises DamagedError for anything else."""
    try:
        value = read_json(path)
    except ValueError:
        value = None
    if not isinstance(value, dict) or value.pop("sum", None) != _json_sum(value):
        raise DamagedError("is damaged")
    return value


def _json_sum(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file and rename it into place; `about`: its metadata."""
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", **(about or {})}
    replace_file(path, lambda temporary: save_file(contiguous, temporary, metadata=metadata))


def write_state(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors that no checkpoint will hold, with the sum of their content."""
    write_tensors(path, tensors, {"sum": tensors_sum(tensors)})


def check_state(path: Path) -> None:
    """Raise DamagedError unless the file holds what `write_state` wrote."""
    found = tensors_sum(path)  # first: it explains a file that is none
    with safe_open(path, framework="pt") as handle:
        if (handle.metadata() or {}).get("sum") != found:
            raise DamagedError("does not hold the tensors that were written")


def tensors_sum(source: Path | Mapping[str, Tensor]) -> str:
    """sha256 of names, types, shapes and bytes of tensors, or of a file's. Raises DamagedError for a damaged file."""
    try:
        tensors = load_file(source) if isinstance(source, Path) else source
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedError(f"is damaged ({error})") from None
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode(errors="surrogatepass"))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a file that this run wrote."""
    return load_file(path)


def tensors_of(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the module at `path`, by their names inside the module."""
    prefix = f"{path}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


class ActivationFile:
    """A fp32 matrix `[samples, tokens, width]` on disk.

    A batch is mapped only while it is used, so memory holds one batch whatever the size of the file. Space is reserved
    first: writing into a mapped hole of a full disk would kill the process instead of raising an error.

    The sum of all 32-bit words follows the matrix. It takes 0.15 s a gigabyte; writing takes 4 s.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], on_device: Tensor | None = None) -> None:
        """`on_device`: the same matrix on the device that computes, which is then read instead of the file."""
        self.path, self.shape, self._on_device = path, shape, on_device
        self._sum = _SUM_OF_NOTHING

    @classmethod
    def create(cls, path: Path, shape: tuple[int, int, int]) -> "ActivationFile":
        """Reserve the file. Raises OSError without space for it."""
        with path.open("wb") as stream:
            reserve(stream, 4 * int(np.prod(shape)) + _SUM_BYTES)
        return cls(path, shape)

    @classmethod
    def of(cls, path: Path, samples: int, tokens: int, on_device: Tensor | None = None) -> "ActivationFile":
        """Open a committed file, whose size says how wide the matrix is."""
        return cls(path, (samples, tokens, (path.stat().st_size - _SUM_BYTES) // (4 * samples * tokens)), on_device)

    def read(self, rows: slice) -> Tensor:
        """Return a copy of a batch, on the device if the matrix is there, else on the host."""
        if self._on_device is not None:
            return self._on_device[rows].clone()
        return torch.from_numpy(np.array(self._map("r", rows)))

    def samples(self, chosen: Sequence[int]) -> Tensor:
        """Return the samples `[chosen, tokens, width]`."""
        return torch.cat([self.read(slice(j, j + 1)) for j in chosen])

    def write(self, rows: slice, values: Tensor) -> None:
        """Store a batch; each once."""
        mapped, content = self._map("r+", rows), values.detach().float().cpu().contiguous().numpy()
        mapped[:] = content
        mapped.flush()
        self._sum += _words_sum(content)

    def commit(self, path: Path) -> "ActivationFile":
        """Make the bytes durable and rename the file."""
        with self.path.open("rb+") as stream:
            stream.seek(-_SUM_BYTES, os.SEEK_END)
            stream.write((self._sum % 2**64).to_bytes(_SUM_BYTES, "little"))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(self.path, path)
        return ActivationFile(path, self.shape)

    def _map(self, mode: Literal["r", "r+"], rows: slice) -> Any:
        count, tokens, width = self.shape
        start, stop, _ = rows.indices(count)
        offset = 4 * start * tokens * width
        return np.memmap(self.path, np.float32, mode, offset, (stop - start, tokens, width))


def check_activations(path: Path) -> None:
    """Raise DamagedError unless the file holds what was written and committed."""
    total, size = _SUM_OF_NOTHING, path.stat().st_size - _SUM_BYTES
    if size < 0 or size % 4:
        raise DamagedError("is truncated")
    with path.open("rb") as stream:
        for start in range(0, size, _CHUNK):
            total += _words_sum(np.frombuffer(stream.read(min(_CHUNK, size - start)), np.float32))
        if stream.read() != (total % 2**64).to_bytes(_SUM_BYTES, "little"):
            raise DamagedError("does not hold the numbers that were written")


def _words_sum(numbers: NDArray[np.float32]) -> int:
    return int(np.add.reduce(numbers.reshape(-1).view(np.uint32), dtype=np.uint64))


def reserve(stream: Any, size: int) -> None:
    """Give an empty file `size` bytes that are on the disk, not a hole. Raises OSError without space for them."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(stream.fileno(), 0, max(1, size))
        return
    zeros = bytes(min(size, _CHUNK))  # macOS has no such call: writing is slower, and reserves as surely
    for start in range(0, size, _CHUNK):
        stream.write(zeros[: size - start])
    stream.flush()


@contextmanager
def full_disk_is_an_error(folder: Path) -> Iterator[None]:
    """Raise a UserError in place of "no space left" that says where, how much is free and how to go on."""
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


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, make it durable and rename it to `path`; its mode follows the user's umask."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode  # as the user's umask has it; safetensors replaces the file by a private one
    write(temporary)
    temporary.chmod(mode)
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def delete(path: Path) -> None:
    """Delete a file, a link, or whatever has taken its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _nothing_done(folder: Path) -> bool:
    return all(path.name == _MARK or path.name.startswith(".") for path in folder.iterdir())


def _delete_temporaries(folder: Path) -> None:
    """Delete half-written files, ours and safetensors', which may take the space that a full disk lacks."""
    for path in folder.iterdir():
        if path.name.startswith(".") and path.name != ".lock" and path.is_file():
            path.unlink(missing_ok=True)


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _shown(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
