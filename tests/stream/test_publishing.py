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
from bitquilt.core.events import LayerDone
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.stream import writer

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


@pytest.fixture
def other_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Make a folder that counts as another disk with so many free bytes."""
    home = tmp_path / "disk"
    home.mkdir()
    usage, device = shutil.disk_usage(tmp_path), writer._disk

    def make(free: int) -> Path:
        monkeypatch.setattr(shutil, "disk_usage", lambda p: usage._replace(free=free) if home == Path(p) else usage)
        monkeypatch.setattr(writer, "_disk", lambda p: -1 if home == Path(p) else device(p))
        return home

    return make


def test_another_disk_too_small_for_the_budget(
    tmp_path: Path, make_model: Callable[..., Path], other_disk: Callable[[int], Path]
) -> None:
    options: dict[str, Any] = {"budget": bitquilt.Budget.of(size="60kB"), "group_size": 8}
    home = other_disk(9999)
    with pytest.raises(UserError, match=r"the checkpoint takes 60 kB and in .*disk 10 kB are free"):
        bitquilt.quantize(make_model(), "rtn", out=home / "out", work_dir=tmp_path / "work", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


@pytest.mark.parametrize("kind", ["plan", "bpw"])
def test_another_disk_too_small_for_the_plan(
    tmp_path: Path, make_quantized: Callable[..., Result], make_model: Callable[..., Path], other_disk: Any, kind: str
) -> None:
    """A plan fixes every byte, also without a budget of bytes; refused before a layer is solved."""
    first = make_quantized("llama", "rtn", embedding_bits=8)
    total = sum(path.stat().st_size for path in first.folder.iterdir())
    options: dict[str, Any] = {"plan": first.folder / "plan.json"}
    if kind == "bpw":
        options = {"recipe": "rtn", "group_size": 8, "budget": bitquilt.Budget.of(bpw=4.7), "calibration": "self"}
    events: list[object] = []
    home = other_disk(total - 1 if kind == "plan" else 9999)
    with pytest.raises(UserError, match=r"the checkpoint takes .* are free; give another output folder"):
        bitquilt.quantize(make_model(), out=home / "out", work_dir=tmp_path / "work", observer=events.append, **options)
    assert not any(isinstance(event, LayerDone) for event in events)
    if kind == "plan":
        assert events == []
        home = other_disk(total)
        assert bitquilt.quantize(make_model(), out=home / "out", work_dir=tmp_path / "work", **options).folder.is_dir()


def test_a_disk_that_fills_up_at_the_end(
    tmp_path: Path, make_model: Callable[..., Path], quantize_tiny: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program took the space: the copy fails file by file, and the run is finished by moving it later."""
    out, work, copy = tmp_path / "out", tmp_path / "work", shutil.copy2
    solved: list[object] = []

    def full(source: str, target: str, **_: Any) -> str:
        if str(source).endswith(".safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device", target)
        return str(copy(source, target))

    def other_disk(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    tree = shutil.copytree
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", other_disk)
        patch.setattr(shutil, "copytree", lambda one, other: tree(one, other, copy_function=full))
        with pytest.raises(
            UserError, match=r"moved to .*out \(\[Errno 28\] No space.*work/checkpoint\. Move it"
        ) as caught:
            quantize_tiny(make_model(), out, "rtn", work_dir=work)
    assert len(str(caught.value)) < 600  # not the list of all files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work"]
    quantize_tiny(make_model(), out, "rtn", work_dir=work, observer=solved.append)
    assert not any(isinstance(event, LayerDone) for event in solved)
    assert (out / "report.json").is_file()


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
