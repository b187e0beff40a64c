"""`kill -9` anywhere, the same command again: the same bytes. And every work directory that must be refused."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import bitquilt
from bitquilt import Result, UserError
from bitquilt.core.events import BlockDone, LayerDone, Started
from bitquilt.stream import workdir

Quantize = Callable[..., Result]

# Runs a quantization again and again, each time in a forked child that kills itself at one chosen place. The run before
# them imports what every child needs: 13 children that import it again took 45 s. The parent resumes what is left.
SCRIPT = """
import os, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import bitquilt

model, tokens, folder = map(Path, sys.argv[1:4])
places = sys.argv[4].split(",")  # "replace:3" dies before the third rename, "event:5" at the fifth observed event


def run(out, place=None):
    kind, _, number = (place or "none:0").partition(":")
    left = [int(number)]

    def tick(what):
        if what == kind:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def ticking(what, function):
        def called(*args, **kwargs):
            tick(what)
            return function(*args, **kwargs)
        return called

    os.replace = ticking("replace", os.replace)
    os.fsync = ticking("fsync", os.fsync)
    os.link = ticking("link", os.link)
    os.rename = ticking("rename", os.rename)
    os.unlink = ticking("unlink", os.unlink)
    bitquilt.quantize(
        model, "gptq", tokens, out, bits=2, group_size=16, samples=6, seq_len=16,
        observer=lambda _event: tick("event"),
    )


run(folder / "whole")
for place in places:
    out = folder / place.replace(":", "-")
    child = os.fork()
    if child == 0:
        run(out, place)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    print(place, "killed" if killed else "finished", flush=True)
"""
# 3 blocks of 7 layers: events are 1 start, stages, 21 layers and 3 blocks; renames are those of the work directory.
KILLED_AT = [
    "replace:1",
    "replace:2",
    "replace:6",
    "replace:9",
    "replace:15",
    "event:8",
    "event:13",
    "fsync:5",
    "fsync:11",
    "link:1",
    "unlink:1",
    "unlink:9",
    "rename:1",
]


@pytest.fixture(scope="module")
def source(make_model: Callable[..., Path]) -> Path:
    return make_model("llama", num_hidden_layers=3)


def output_bytes(folder: Path) -> dict[str, bytes]:
    """Every file but report.json, which tells times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}


def run(quantize_tiny: Quantize, source: Path, out: Path, **options: Any) -> Result:
    return quantize_tiny(source, out, **{"recipe": "gptq", "bits": 2, "group_size": 16, **options})


def test_killed_anywhere_and_run_again_gives_the_same_bytes(
    source: Path, token_file: Path, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(source), str(token_file), str(tmp_path), ",".join(KILLED_AT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)  # a guard against hanging
    told = dict(line.split() for line in done.stdout.splitlines())
    assert told == dict.fromkeys(KILLED_AT, "killed"), done.stderr
    expected = output_bytes(tmp_path / "whole")
    assert len([name for name in expected if name.endswith(".safetensors")]) == 4
    resumed_from = set()
    for place in KILLED_AT:
        out = tmp_path / place.replace(":", "-")
        seen: list[Any] = []
        result = run(quantize_tiny, source, out, observer=seen.append)
        assert output_bytes(out) == expected, place
        resumed_from |= {event.done for event in seen if isinstance(event, Started)}
        solved = [event for event in seen if isinstance(event, BlockDone)]
        assert result.already_done or len(solved) == 3 - next(e.done for e in seen if isinstance(e, Started))
        assert not out.with_name(f"{out.name}.work").exists(), place
    assert resumed_from == {0, 1, 2, 3}


def test_a_finished_output_is_not_computed_again(source: Path, quantize_tiny: Quantize, tmp_path: Path) -> None:
    first = run(quantize_tiny, source, tmp_path / "out")
    assert not first.already_done
    stamps = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    seen: list[Any] = []
    again = run(quantize_tiny, source, tmp_path / "out", observer=seen.append)
    assert again.already_done
    assert again.report == first.report
    assert seen == []
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == stamps


class _Interrupted(Exception):
    pass


def interrupt_after_one_block(event: object) -> None:
    if isinstance(event, BlockDone):
        raise _Interrupted


@pytest.fixture
def begun(source: Path, quantize_tiny: Quantize, tmp_path: Path) -> Path:
    """An output whose work directory holds one finished block."""
    out = tmp_path / "out"
    with pytest.raises(_Interrupted):
        run(quantize_tiny, source, out, observer=interrupt_after_one_block)
    assert (tmp_path / "out.work" / "block-00000.json").is_file()
    return out


def listing(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bits": 3}, r"recipe\.bits was 2, now it is 3"),
        ({"group_size": 8}, r"recipe\.group_size was 16, now it is 8"),
        ({"damp": 0.02}, r"recipe\.damp was 0\.01, now it is 0\.02"),
        ({"seed": 1}, r"seed was 0, now it is 1"),
        ({"samples": 5}, r"calibration\.samples was 6, now it is 5"),
        ({"seq_len": 8}, r"calibration\.seq_len was 16, now it is 8"),
        ({"calibration": "self"}, r"calibration\.(sha256|source) was"),
        ({"skip": ("*.q_proj",)}, r"skip was \[\], now it is \['\*\.q_proj'\]"),
        ({"recipe": "rtn"}, r"(calibration|recipe)[\w.]* was"),
    ],
)
def test_the_work_directory_of_another_run_is_refused(
    begun: Path, source: Path, quantize_tiny: Quantize, change: dict[str, Any], named: str
) -> None:
    work = begun.with_name("out.work")
    before = listing(work)
    with pytest.raises(UserError, match=rf"out\.work belongs to another run: {named}"):
        run(quantize_tiny, source, begun, **change)
    assert listing(work) == before
    assert not begun.exists()


def test_other_weights_of_the_same_shapes_are_another_run(
    begun: Path, make_model: Callable[..., Path], quantize_tiny: Quantize
) -> None:
    with pytest.raises(UserError, match=r"model\.sha256 was"):
        run(quantize_tiny, make_model("llama", num_hidden_layers=3, seed=1), begun)


def test_another_tokenizer_is_another_run(source: Path, quantize_tiny: Quantize, tmp_path: Path) -> None:
    """It made the ids, and it is part of the output."""
    model = tmp_path / "model"
    shutil.copytree(source, model)
    (model / "vocab.txt").write_text("one")
    with pytest.raises(_Interrupted):
        run(quantize_tiny, model, tmp_path / "out", observer=interrupt_after_one_block)
    (model / "vocab.txt").write_text("two")
    with pytest.raises(UserError, match=r"model\.files\.vocab\.txt was"):
        run(quantize_tiny, model, tmp_path / "out")


def test_another_text_in_the_same_file_is_another_run(
    source: Path, token_file: Path, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    tokens = tmp_path / "ids.safetensors"
    shutil.copyfile(token_file, tokens)
    with pytest.raises(_Interrupted):
        run(quantize_tiny, source, tmp_path / "out", calibration=tokens, observer=interrupt_after_one_block)
    content = bytearray(tokens.read_bytes())
    content[-8] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(UserError, match=r"calibration\.sha256 was"):
        run(quantize_tiny, source, tmp_path / "out", calibration=tokens)


def test_another_version_is_another_run(
    begun: Path, source: Path, quantize_tiny: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitquilt.preflight.__version__", "99.0")
    with pytest.raises(UserError, match=rf"version was '{bitquilt.__version__}', now it is '99.0'"):
        run(quantize_tiny, source, begun)


def test_the_output_of_another_run_is_refused(source: Path, quantize_tiny: Quantize, tmp_path: Path) -> None:
    run(quantize_tiny, source, tmp_path / "out")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"out belongs to another run: recipe\.bits was 2, now it is 4"):
        run(quantize_tiny, source, tmp_path / "out", bits=4)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", ["folder", "file", "model", "broken report"])
def test_an_output_that_is_not_ours_is_refused_and_left_alone(
    kind: str, source: Path, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "model":
        shutil.copytree(source, out)
    else:
        out.mkdir()
        (out / ("report.json" if kind == "broken report" else "notes.txt")).write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"out exists and was not made by bitquilt"):
        run(quantize_tiny, source, out)
    assert listing(tmp_path) == before


def test_an_empty_output_folder_is_taken(source: Path, quantize_tiny: Quantize, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (run(quantize_tiny, source, tmp_path / "out").folder / "config.json").is_file()


def test_a_work_directory_that_is_not_ours_is_refused_and_left_alone(
    source: Path, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"work exists and is not a work directory"):
        run(quantize_tiny, source, tmp_path / "out", work_dir=tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["thesis.txt"]


def test_a_work_directory_elsewhere_is_used_and_removed(source: Path, quantize_tiny: Quantize, tmp_path: Path) -> None:
    seen: list[bool] = []
    work = tmp_path / "far" / "away"
    run(quantize_tiny, source, tmp_path / "out", work_dir=work, observer=lambda _: seen.append(work.is_dir()))
    assert seen[-1]
    assert not work.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "out"]


def test_two_processes_in_one_work_directory(begun: Path, source: Path, quantize_tiny: Quantize) -> None:
    work = begun.with_name("out.work")
    code = f"""
import sys
from filelock import FileLock
with FileLock({str(work / ".lock")!r}):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"another process is working in .*out\.work"):
            run(quantize_tiny, source, begun)
    assert run(quantize_tiny, source, begun).folder == begun


def test_the_lock_is_let_go_after_a_failure(begun: Path) -> None:
    with FileLock(begun.with_name("out.work") / ".lock", timeout=0):
        pass


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of one megabyte, and a function that resizes it."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small tmpfs")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("this machine does not let root mount a tmpfs")

    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(mount)], check=True)

    yield mount, resize
    subprocess.run(["umount", str(mount)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Fill the disk but for about `leave` bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(disk).free - leave)
    return ballast


@pytest.mark.parametrize("leave", [4096, 16384, 40960])
def test_a_full_disk_keeps_the_finished_blocks(
    leave: int, source: Path, quantize_tiny: Quantize, small_disk: Any, tmp_path: Path
) -> None:
    disk, resize = small_disk
    expected = output_bytes(run(quantize_tiny, source, tmp_path / "whole").folder)

    def fill_after_one_block(event: object) -> None:
        if isinstance(event, BlockDone) and event.block == 0:
            fill(disk, leave)

    with pytest.raises(
        UserError, match=r"the disk of .*disk.* is full .* finished blocks are kept.*same command again"
    ):
        run(quantize_tiny, source, disk / "out", observer=fill_after_one_block)
    assert (disk / "out.work" / "block-00000.json").is_file()
    assert not (disk / "out").exists()
    resize("4m")
    seen: list[Any] = []
    run(quantize_tiny, source, disk / "out", observer=seen.append)
    assert next(event.done for event in seen if isinstance(event, Started)) >= 1
    assert output_bytes(disk / "out") == expected
    assert not (disk / "out.work").exists()


def test_a_disk_too_small_for_the_activations_is_refused_before_the_work(
    source: Path, quantize_tiny: Quantize, small_disk: Any
) -> None:
    disk, _ = small_disk
    fill(disk, 16384)
    seen: list[Any] = []
    with pytest.raises(UserError, match=r"activations need .* are free; give --work-dir on another disk"):
        run(quantize_tiny, source, disk / "out", observer=seen.append)
    assert not any(isinstance(event, LayerDone) for event in seen)


@pytest.mark.parametrize(("recipe", "copies"), [("gptq", 2), ("aptq", 3), ("quilt", 4)])
def test_every_copy_of_the_activations_counts(
    source: Path, quantize_tiny: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, copies: int
) -> None:
    """A pass before the first block, or a full-precision model, keeps more than a block's inputs and outputs."""
    usage = shutil.disk_usage(tmp_path)
    one_short = copies * 4 * 6 * 16 * 32 - 1
    monkeypatch.setattr("bitquilt.stream.workdir.shutil.disk_usage", lambda _: usage._replace(free=one_short))
    with pytest.raises(UserError, match=r"activations need .* are free"):
        run(quantize_tiny, source, tmp_path / "out", recipe=recipe)


def test_a_disk_that_is_full_from_the_start(source: Path, quantize_tiny: Quantize, small_disk: Any) -> None:
    disk, _ = small_disk
    fill(disk, 0)
    with pytest.raises(UserError, match=r"the disk of .*disk.* is full|activations need"):
        run(quantize_tiny, source, disk / "out", recipe="rtn")


def test_activations_of_an_interrupted_run_count_as_space(
    begun: Path, source: Path, quantize_tiny: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the run needs is partly on the disk already when it comes back."""
    need = 2 * 4 * 6 * 16 * 32
    usage = shutil.disk_usage(begun.parent)
    monkeypatch.setattr("bitquilt.stream.workdir.shutil.disk_usage", lambda _: usage._replace(free=need // 2))
    assert run(quantize_tiny, source, begun).folder == begun


def test_the_checkpoint_reaches_another_disk_whole(
    source: Path, quantize_tiny: Quantize, small_disk: Any, tmp_path: Path
) -> None:
    """The work directory on one file system, the output on another: no hard links, no rename."""
    disk, _ = small_disk
    expected = output_bytes(run(quantize_tiny, source, tmp_path / "whole").folder)
    run(quantize_tiny, source, disk / "out", work_dir=tmp_path / "work")
    assert output_bytes(disk / "out") == expected
    assert [path.name for path in disk.iterdir()] == ["out"]
    assert not (tmp_path / "work").exists()


def flipping(times: int) -> Callable[[Path, dict[str, torch.Tensor]], None]:
    """A writer of blocks that flips a bit on the way to the disk, so many times."""
    left = [times]

    def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("layers.1.mlp.up_proj.codes_0") and left[0]:
                left[0] -= 1
                tensors = {**tensors, name: tensor ^ 1}
        workdir.write_tensors(path, tensors)

    return write


def test_a_block_that_the_disk_did_not_keep_is_solved_again(
    source: Path, quantize_tiny: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = output_bytes(run(quantize_tiny, source, tmp_path / "whole").folder)
    monkeypatch.setattr("bitquilt.stream.layers.write_tensors", flipping(1))
    result = run(quantize_tiny, source, tmp_path / "out")
    assert output_bytes(result.folder) == expected
    (event,) = result.report["events"]
    assert event["kind"] == "damaged work directory"
    assert "block-00001.safetensors does not hold the tensors that were written" in event["detail"]


def test_a_disk_that_keeps_nothing_is_named(
    source: Path, quantize_tiny: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitquilt.stream.layers.write_tensors", flipping(9))
    with pytest.raises(bitquilt.VerificationError, match=r"out\.work did not keep .* twice: block-00001\.safetensors"):
        run(quantize_tiny, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_computes_something_else_is_not_published(
    source: Path, quantize_tiny: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all files as they were written: the logits of the reloaded checkpoint give it away."""
    monkeypatch.setattr("bitquilt.stream.layers.write_tensors", flipping(9))
    monkeypatch.setattr("bitquilt.run.drop_damaged", lambda _: [])
    with pytest.raises(bitquilt.VerificationError, match=r"logits differ by .* work directory .* is kept") as caught:
        run(quantize_tiny, source, tmp_path / "out")
    assert "disk" not in str(caught.value)  # nothing speaks for it
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "out.work" / "fingerprint.json").read_text())["seed"] == 0


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"3", b"[" * 99_999])
def test_a_damaged_fingerprint_is_named(begun: Path, source: Path, quantize_tiny: Quantize, content: bytes) -> None:
    (begun.with_name("out.work") / "fingerprint.json").write_bytes(content)
    with pytest.raises(UserError, match=r"fingerprint.json is damaged, so its run cannot continue; delete"):
        run(quantize_tiny, source, begun)


DAMAGED = {
    "block-00000.json": b"[" * 99_999,
    "block-00000.safetensors": b"short",
    "calibration.safetensors": None,
    "activations-00001.f32": bytes(6 * 16 * 32 * 4 + 8),
    "probe-00001.safetensors": b"",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_of_a_stopped_run_are_made_again(
    begun: Path, source: Path, quantize_tiny: Quantize, tmp_path: Path, name: str
) -> None:
    work, content = begun.with_name("out.work"), DAMAGED[name]
    (work / name).unlink()
    if content is not None:
        (work / name).write_bytes(content)
    seen: list[Any] = []
    result = run(quantize_tiny, source, begun, observer=seen.append)
    assert output_bytes(result.folder) == output_bytes(run(quantize_tiny, source, tmp_path / "whole").folder)
    told = [event["detail"] for event in result.report["events"]]
    # calibration ids are read from a file again; only what is there and wrong is damage
    assert [detail.split()[0] for detail in told] == ([name] if content is not None else [])
    done = next(event.done for event in seen if isinstance(event, Started))
    assert done == (1 if name.startswith("calibration") else 0)  # the first block's inputs are gone
