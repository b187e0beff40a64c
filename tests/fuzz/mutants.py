"""Damage for the fuzz test: `mutate(folder, rng)` changes one file of a folder and says what it did.

Everything is drawn from `rng`, a `random.Random`, so a seed gives the same mutant on every machine.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

_DEEP = 20_000  # deeper than Python's stack and than the parser of any JSON library
_ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    3,
    2**63,
    10**400,
    -1.5,
    float("nan"),
    float("inf"),
    "",
    "no such value",
    "../..",
    "\x1b[31m\x00\x07",
    "\ud800",
    "x" * 5000,
    [],
    [None],
    [1, "two", {}],
    {},
    {"a": {"b": []}},
    "[/nope]",
)


def mutate(folder: Path, rng: random.Random, names: Callable[[str], bool] = lambda _: True) -> str:
    """Damage one file of `folder` whose relative path `names` accepts, and return what was done to which."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    files = [path for path in files if path.name != ".lock" and names(str(path.relative_to(folder)))]
    path = rng.choice(files)
    kinds: list[Callable[[Path, random.Random], str]] = [_bytes, _file]
    if path.suffix == ".json":
        kinds += [_json] * 4
    if path.suffix == ".safetensors":
        kinds += [_header] * 2 + [_bytes]
    return f"{path.relative_to(folder)}: {rng.choice(kinds)(path, rng)}"


def _bytes(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    kind = rng.choice(("truncated", "emptied", "flipped", "extended", "noise", "controls"))
    if kind == "truncated":
        del content[rng.randrange(max(1, len(content))) :]
    elif kind == "emptied":
        content.clear()
    elif kind == "flipped":
        for _ in range(rng.choice((1, 3, 40))):
            if content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "extended":
        content += rng.randbytes(rng.choice((1, 100)))
    elif kind == "noise":
        content[:] = rng.randbytes(len(content))
    else:
        place = rng.randrange(max(1, len(content)))
        content[place:place] = b"\x1b[2J\x00\xff\xfe"
    path.write_bytes(content)
    return kind


def _file(path: Path, rng: random.Random) -> str:
    kind = rng.choice(("removed", "a folder", "a link to nothing", "a link to itself", "a link outside"))
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a link to nothing":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "a link to itself":  # as unreadable as a file without permissions, for root too
        path.symlink_to(path)
    elif kind == "a link outside":
        path.symlink_to("/proc/self/status")
    return kind


def _json(path: Path, rng: random.Random) -> str:
    text = path.read_bytes().decode()
    try:
        value = json.loads(text)
    except ValueError:
        return _bytes(path, rng)
    done, value = _changed(value, rng)
    path.write_text(_spelled(value, done), encoding="utf-8", errors="surrogatepass")
    return done


def _header(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if size > len(content):
        return _bytes(path, rng)
    done, value = _changed(json.loads(content[8 : 8 + size]), rng)
    header = _spelled(value, done).encode(errors="surrogatepass")
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 2**40, len(header) + 9))
    path.write_bytes(length.to_bytes(8, "little") + header + content[8 + size :])
    return f"header, {done}"


def _changed(value: Any, rng: random.Random) -> tuple[str, Any]:
    """Change one place of a JSON value: at every level down, one in four goes no deeper."""
    where: list[str] = []
    parent: Any = None
    key: Any = None
    inner = value
    while isinstance(inner, dict | list) and inner and (parent is None or rng.random() < 0.75):
        parent, key = inner, rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner = parent[key]
        where.append(str(key))
    at = ".".join(where)
    kind = rng.choice(("replaced", "replaced", "replaced", "dropped", "renamed", "twice", "nested", "other"))
    if parent is None or rng.random() < 0.02:
        odd = rng.choice(_ODD)
        return f"all replaced by {odd!r:.40}", odd
    if kind == "dropped":
        del parent[key]
    elif kind == "renamed" and isinstance(parent, dict):
        parent[rng.choice(("x", "\x1b[31m", "a.b.c", ""))] = parent.pop(key)
    elif kind == "nested":
        parent[key] = _Deep()
    elif kind == "twice" and isinstance(parent, dict):
        parent[_Twice(str(key))] = rng.choice(_ODD)
    elif kind == "other" and type(inner) is int:
        parent[key] = inner + rng.choice((-1, 1, 8, -inner, 1000))
    else:
        odd = rng.choice(_ODD)
        parent[key] = odd
        kind = f"replaced by {odd!r:.40}"
    return f"{at} {kind}", value


class _Deep(dict[str, Any]):
    """Spelled as lists in lists."""


class _Twice(str):
    """A key that equals no other, so that an object may hold the same name twice."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def _spelled(value: Any, _done: str) -> str:
    mark = "\ue000deep\ue000"

    def plain(inner: Any) -> Any:
        if isinstance(inner, _Deep):
            return mark
        if isinstance(inner, dict):
            return {key: plain(one) for key, one in inner.items()}
        return [plain(one) for one in inner] if isinstance(inner, list) else inner

    text = json.dumps(plain(value), ensure_ascii=False)
    return text.replace(f'"{mark}"', "[" * _DEEP + "]" * _DEEP)


def fresh(source: Path, target: Path) -> Path:
    """Return `target` as a copy of the folder `source`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target
