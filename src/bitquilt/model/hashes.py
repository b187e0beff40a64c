"""Hashes of whole files: `file_sha256` computes each once and remembers it by path, size, time, inode and device.

`sha256_now` always reads.

A model of 140 GB takes minutes to hash, and a run asks for the hash whenever it starts or continues. The hashes are
kept in `bitquilt/hashes.json` of the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`), which may be deleted at
any time.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

# Smaller files are hashed every time: 16 MiB take 10 ms.
_SMALL = 2**24
# A file that changed a moment ago may change again within the resolution of its time stamp: its hash is not kept.
_SETTLED = 2.0
# Enough for the shards of a few dozen large models.
_KEPT = 4096


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes. Raises OSError if it cannot be read."""
    key, state = os.path.realpath(path), _state(path)
    if state[0] < _SMALL:
        return sha256_now(path)
    known = _read().get(key)
    if isinstance(known, list) and known[:-1] == state and isinstance(known[-1], str):
        return known[-1]
    found = sha256_now(path)
    if _state(path) == state and time.time() - max(state[1:3]) / 1e9 > _SETTLED:
        _keep(key, [*state, found])
    return found


def _state(path: Path) -> list[int]:
    """What changes with a file: size, times of its content and of its entry, inode and device."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def sha256_now(path: Path) -> str:
    """Return the sha256 of a file's bytes as the disk holds them, whatever is remembered."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitquilt" / "hashes.json"


def _read() -> dict[str, Any]:
    """Return what is remembered; nothing where the file is missing or damaged."""
    try:
        value = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, RuntimeError):  # RuntimeError: a user without a home
        return {}
    return value if isinstance(value, dict) else {}


def _keep(key: str, entry: list[Any]) -> None:
    """Remember one hash; ignore a cache that cannot be written."""
    with contextlib.suppress(OSError, RuntimeError):
        known = _read()
        known.pop(key, None)
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(dict([*known.items(), (key, entry)][-_KEPT:])))
        temporary.replace(path)
