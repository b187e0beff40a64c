"""Files that appear whole or not at all, activations on disk, and statistics that add up."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from bitquilt import UserError
from bitquilt.stream.statistics import collect
from bitquilt.stream.workdir import (
    ActivationFile,
    DamagedError,
    Fingerprint,
    check_activations,
    check_disk,
    check_state,
    delete_workdir,
    full_disk_is_an_error,
    open_workdir,
    read_fingerprint,
    read_mark,
    read_tensors,
    write_json,
    write_mark,
    write_state,
    write_tensors,
)


def test_a_file_keeps_its_old_content_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="broken"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_tensors_come_back_as_they_went(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).t(), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.empty(0, 4)}
    write_tensors(tmp_path / "t.safetensors", tensors)
    found = read_tensors(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


def test_activations_are_read_as_they_were_written(tmp_path: Path) -> None:
    values = torch.randn(5, 3, 4)
    activations = ActivationFile.create(tmp_path / "tmp", (5, 3, 4))
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
        activations.write(rows, values[rows].to(torch.float64))
    activations = activations.commit(tmp_path / "done.f32")
    assert (tmp_path / "done.f32").stat().st_size == 4 * values.numel() + 8  # and the sum
    check_activations(tmp_path / "done.f32")
    assert not (tmp_path / "tmp").exists()
    assert torch.equal(activations.read(slice(0, 5)), values)
    batch = activations.read(slice(1, 3))
    batch.zero_()  # a batch is the caller's own
    assert torch.equal(activations.read(slice(1, 3)), values[1:3])


@pytest.mark.parametrize("shape", [(5, 3, 4), (1, 1, 1), (3, 1000, 2000)])
def test_space_is_reserved_without_posix_fallocate_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    """macOS has no such call."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    ActivationFile.create(tmp_path / "tmp", shape)
    stat = (tmp_path / "tmp").stat()
    assert stat.st_size == 4 * torch.Size(shape).numel() + 8
    assert stat.st_blocks * 512 >= stat.st_size  # no hole


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "longer"])
@pytest.mark.parametrize("kind", ["state", "mark", "activations"])
def test_damage_to_any_file_is_seen(tmp_path: Path, kind: str, damage: str) -> None:
    path = tmp_path / f"file.{kind}"
    check: Callable[[Path], object]
    if kind == "state":
        check = check_state
        write_state(path, {"a": torch.randn(3, 5), "b": torch.ones(2, dtype=torch.bfloat16)})
    elif kind == "mark":
        check = read_mark
        write_mark(path, {"a": [1, 2.5, None, "x"], "b": {}})
        assert read_mark(path) == {"a": [1, 2.5, None, "x"], "b": {}}
    else:
        check = check_activations
        activations = ActivationFile.create(tmp_path / "tmp", (2, 3, 3))
        activations.write(slice(0, 2), torch.randn(2, 3, 3))
        activations.commit(path)
    check(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little") if kind == "state" else 0
    places = range(header, len(whole), 7) if damage == "flipped" else [len(whole) // 2]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 4
        changed = {"flipped": content, "truncated": whole[:place], "emptied": b"", "longer": whole + b"xyz!"}[damage]
        path.write_bytes(changed)
        if kind == "mark" and changed.split() == whole.split():
            continue
        with pytest.raises(DamagedError):
            check(path)


def test_a_run_that_did_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), open_workdir(tmp_path / "work", Fingerprint({"seed": 0})):
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_no_folder_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "deep" / "work"
    with (
        pytest.raises(UserError, match=r"deep/work cannot be created \(Not a directory\)"),
        open_workdir(place, Fingerprint({"seed": 0})),
    ):
        pass


def test_half_written_files_are_dropped_and_finished_ones_kept(tmp_path: Path) -> None:
    def work_and_stop(work: Path) -> None:
        write_json(work / "block-00000.json", {})
        (work / ".block-00001.safetensors.tmp").write_bytes(b"half")
        (work / ".activations.tmp").write_bytes(b"half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), open_workdir(tmp_path / "work", Fingerprint({"seed": 0})) as work:
        work_and_stop(work)
    names = {path.name for path in (tmp_path / "work").iterdir()}
    assert names - {".lock"} == {"block-00000.json", "fingerprint.json"}
    assert read_fingerprint(tmp_path / "work") == Fingerprint({"seed": 0})


def test_a_killed_run_that_did_nothing_stands_in_no_ones_way(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    write_json(work / "fingerprint.json", {"seed": 0})
    (work / ".calibration.safetensors.tmp").write_bytes(b"half")
    with open_workdir(work, Fingerprint({"seed": 1})):
        assert read_fingerprint(work) == Fingerprint({"seed": 1})


def test_discarding_keeps_the_mark_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    (work / "checkpoint").mkdir(parents=True)
    for name in ("fingerprint.json", "block-00000.json", "checkpoint/config.json"):
        write_json(work / name, {})
    order: list[str] = []
    unlink = Path.unlink

    def recording(path: Path, missing_ok: bool = False) -> None:
        order.append(path.name)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", recording)
    delete_workdir(work)
    assert order == ["block-00000.json", "fingerprint.json"]
    assert not work.exists()
    assert read_fingerprint(work) is None


def test_the_first_difference_is_named_on_both_sides(tmp_path: Path) -> None:
    there, here = {"a": {"b": 1, "c": None}, "long": "x" * 200}, {"a": {"b": 1, "c": (2,)}, "long": "x" * 200}

    def check(one: dict[str, object]) -> None:
        Fingerprint(one).check_same(tmp_path, Fingerprint(there))

    check(there)
    with pytest.raises(UserError, match=r"a\.c was not set, now it is \[2\]"):
        check(here)
    with pytest.raises(UserError, match=r"a\.d was not set, now it is 3"):
        check({**there, "a": {"b": 1, "c": None, "d": 3}})
    with pytest.raises(UserError, match=r"long was 'x{76}\.\.\., now"):
        check({**there, "long": "y"})


def test_a_disk_without_room_is_named(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_disk(tmp_path, free // 2, "the inputs")
    with pytest.raises(UserError, match=rf"the inputs need [\d.]+ GB in {tmp_path}, .* give --work-dir on"):
        check_disk(tmp_path, 2 * free, "the inputs")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_only_a_full_disk_is_a_full_disk(code: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the disk of .* is full"), full_disk_is_an_error(tmp_path / "not" / "yet"):
        raise OSError(code, "no room")
    with pytest.raises(OSError, match="other"), full_disk_is_an_error(tmp_path):
        raise OSError(errno.EACCES, "other")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_recognised_in_every_error(tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"the disk of .* is full"), full_disk_is_an_error(tmp_path):
        (tmp_path / "full").write_text("x")
    with pytest.raises(UserError, match=r"the disk of .* is full"), full_disk_is_an_error(tmp_path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")


class Pair(nn.Module):
    """Two layers that read one tensor, one that reads another, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.last, self.unused = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.one(x) + self.other(x))
        return result


def _collect(model: Pair, x: torch.Tensor, size: int, sample: int = 5, hessian: bool = True) -> dict[str, object]:
    def batches() -> Iterator[None]:
        for start in range(0, len(x), size):
            model(x[start : start + size])
            yield

    linears = dict(model.named_children())
    return collect(linears, batches(), hessian=hessian, sample=sample, tokens=x.shape[0] * x.shape[1])  # type: ignore[return-value]


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 7])
def test_statistics_are_sums_over_all_tokens_whatever_the_batch(size: int) -> None:
    torch.manual_seed(0)
    model, x = Pair(), torch.randn(7, 3, 4)
    found = _collect(model, x, size)
    flat = x.reshape(-1, 4)
    assert found["one"] is found["other"]
    assert found["one"].tokens == 21  # type: ignore[attr-defined]
    torch.testing.assert_close(found["one"].hessian, flat.t() @ flat)  # type: ignore[attr-defined]
    assert torch.equal(found["one"].sample, flat[::5])  # type: ignore[attr-defined]
    inner = (model.one(x) + model.other(x)).reshape(-1, 4)
    torch.testing.assert_close(found["last"].hessian, inner.t() @ inner)  # type: ignore[attr-defined]
    assert found["unused"].tokens == 0  # type: ignore[attr-defined]


@torch.no_grad()
def test_statistics_that_are_not_asked_for_are_not_made() -> None:
    found = _collect(Pair(), torch.randn(2, 3, 4), 2, sample=0, hessian=False)
    assert found["one"].hessian.numel() == 0  # type: ignore[attr-defined]
    assert found["one"].sample is None  # type: ignore[attr-defined]
    assert not any(module._forward_pre_hooks for module in Pair().children())


@torch.no_grad()
def test_inputs_that_are_no_numbers_name_the_layer_and_leave_no_hooks() -> None:
    model, x = Pair(), torch.randn(2, 3, 4)
    x[1, 2, 3] = float("nan")
    with pytest.raises(UserError, match="the input of layer one holds NaN or Inf"):
        _collect(model, x, 1)
    assert not any(module._forward_pre_hooks for module in model.children())


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_every_file_of_an_output_has_the_mode_that_the_user_wants(
    make_model: Callable[..., Path], quantize_tiny: Callable[..., Any], tmp_path: Path, mask: int, mode: int
) -> None:
    before = os.umask(mask)
    try:
        quantize_tiny(make_model(), tmp_path / "out", "rtn")
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()} == {
        path.name: oct(mode) for path in (tmp_path / "out").iterdir()
    }
