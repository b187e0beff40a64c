"""Where an output may go: refused before anything is computed, or written; and a finished run is never lost."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import bitquilt
from bitquilt import Result, UserError
from bitquilt.model.checkpoint import open_checkpoint

Quantize = Callable[..., Result]


@pytest.fixture
def computed(make_model: Callable[..., Path], quantize_tiny: Quantize) -> Callable[..., list[object]]:
    """Run into a folder that must be refused with this message; return the events before."""

    def run(out: Path, match: str, **options: Any) -> list[object]:
        events: list[object] = []
        with pytest.raises(UserError, match=match):
            quantize_tiny(make_model(), out, "rtn", observer=events.append, **options)
        return events

    return run


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_is_refused(tmp_path: Path, computed: Callable[..., list[object]], exists: bool) -> None:
    if exists:
        (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to("there")
    assert computed(tmp_path / "out", "out is a symbolic link to there") == []
    assert (tmp_path / "out").is_symlink()


@pytest.mark.parametrize(("out", "work"), [("a", "a"), ("a", "a/w"), ("a/o", "a"), ("a", "b/../a")])
def test_output_and_work_directory_are_apart(
    tmp_path: Path, computed: Callable[..., list[object]], out: str, work: str
) -> None:
    assert computed(tmp_path / out, "contain each other", work_dir=tmp_path / work) == []
    assert not list(tmp_path.iterdir())


def test_a_parent_that_is_a_file_or_read_only(
    tmp_path: Path, computed: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    work = tmp_path / "work"
    assert computed(tmp_path / "file" / "out", "file is not a folder", work_dir=work) == []
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert computed(tmp_path / "new" / "out", "is read-only for you", work_dir=work) == []
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_two_runs_to_one_output(tmp_path: Path, computed: Callable[..., list[object]]) -> None:
    with FileLock(tmp_path / ".out.lock"):
        assert computed(tmp_path / "out", "another run is writing .*out", work_dir=tmp_path / "work") == []
    assert not (tmp_path / "work").exists()


def test_another_disk_too_small_for_the_budget(
    tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    usage = shutil.disk_usage(tmp_path)._replace(free=9999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    options: dict[str, Any] = {"budget": bitquilt.Budget.of(size="60kB"), "group_size": 8}
    with pytest.raises(UserError, match=r"the budget is 0\.00 GB and in .* 0\.00 GB are free"):
        bitquilt.quantize(make_model(), "rtn", out=tmp_path / "out", work_dir=shared / "bitquilt-work", **options)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_never_lost(
    tmp_path: Path, make_model: Callable[..., Path], quantize_tiny: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk of the output is full at the end, or the output appears meanwhile: nothing is lost."""
    out = tmp_path / "out"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        patch.setattr(shutil, "copytree", full)
        with pytest.raises(UserError, match=r"is finished but could not be moved.*No space left.*out\.work/checkpoint"):
            quantize_tiny(make_model(), out, "rtn")
    finished = tmp_path / "out.work" / "checkpoint"
    assert open_checkpoint(finished).model_config.quantized_by == "bitquilt"
    assert (finished / "report.json").is_file()

    def appears(event: object) -> None:
        if "writing the checkpoint" in str(event):
            out.mkdir()
            (out / "mine.txt").touch()

    with pytest.raises(UserError, match="something else was put there"):
        quantize_tiny(make_model(), out, "rtn", observer=appears)
    assert (out / "mine.txt").is_file()
    shutil.rmtree(out)
    assert not quantize_tiny(make_model(), out, "rtn").already_done
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
