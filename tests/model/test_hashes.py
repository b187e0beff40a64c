"""Hashes of whole files: one byte anywhere counts, and what has not changed is read once."""

import json
import os
from pathlib import Path

import pytest

from bitquilt.model import hashes
from bitquilt.model.hashes import file_sha256


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The files that were read to be hashed, with a cache of their own; no file is too small for it."""
    names: list[str] = []
    compute = hashes.sha256_now

    def counted(path: Path) -> str:
        names.append(path.name)
        return compute(path)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "_SMALL", 0)
    monkeypatch.setattr(hashes, "sha256_now", counted)
    return names


def old(path: Path, content: bytes, age: float = 10.0) -> Path:
    """A file whose content last changed `age` seconds ago."""
    path.write_bytes(content)
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    return path


def test_a_settled_file_is_read_once(read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = old(tmp_path / "a", b"x" * 999)
    monkeypatch.setattr(hashes, "_SETTLED", 0.0)  # the entry's own time cannot be set back
    assert [file_sha256(file) for _ in range(3)] == [hashes.hashlib.sha256(b"x" * 999).hexdigest()] * 3
    (tmp_path / "link").symlink_to(file)
    file_sha256(tmp_path / "link")
    assert read == ["a"]


def test_a_change_of_one_byte_under_the_same_size_and_time_is_seen(
    read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "_SETTLED", 0.0)
    file = old(tmp_path / "a", bytes(9999))
    first, times = file_sha256(file), file.stat()
    with file.open("r+b") as stream:
        stream.seek(5000)
        stream.write(b"\x01")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_sha256(file) != first
    other = old(tmp_path / "b", bytes(9999))
    other.replace(file)
    assert file_sha256(file) == first
    assert read == ["a"] * 3


def test_a_file_that_may_still_change_is_not_remembered(read: list[str], tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"new")
    file_sha256(tmp_path / "a")
    file_sha256(tmp_path / "a")
    assert read == ["a", "a"]


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"PATH": 3}', '{"PATH": [1]}', "[" * 99999])
def test_a_damaged_cache_is_no_error(
    read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(hashes, "_SETTLED", 0.0)
    file = old(tmp_path / "a", b"x")
    (tmp_path / "cache" / "bitquilt").mkdir(parents=True)
    cache = tmp_path / "cache" / "bitquilt" / "hashes.json"
    cache.write_text(content.replace("PATH", str(file)))
    assert file_sha256(file) == hashes.hashlib.sha256(b"x").hexdigest()
    assert str(file) in json.loads(cache.read_text())


def test_a_cache_that_cannot_be_written_is_no_error(
    read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").touch()
    monkeypatch.setattr(hashes, "_SETTLED", 0.0)
    assert file_sha256(old(tmp_path / "a", b"x")) == file_sha256(tmp_path / "a")
