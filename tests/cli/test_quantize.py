"""`bitquilt quantize`: results on stdout, progress on stderr, exit codes, and the mistakes of a user."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import bitquilt
from bitquilt.cli.options import parse_setting
from bitquilt.cli.quantize import print_events
from bitquilt.core.events import BlockDone
from bitquilt.core.settings import Calibration, Selection
from bitquilt.core.types import Event
from bitquilt.errors import UserError
from bitquilt.report.page_values import allocator_totals
from bitquilt.report.run_facts import RunFacts, parse
from bitquilt.request import Request
from bitquilt.run import run

from .conftest import FLAGS, Command

RUN = "bitquilt.cli.quantize.run"


def test_json_is_one_object_and_progress_is_a_line_per_block(
    command: Command, tiny: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = command("quantize", tiny, out, *FLAGS, "--calibration", text, "--set", "damp=0.05", "--json")
    assert ran.code == 0
    value = json.loads(ran.out)
    report = json.loads((out / "report.json").read_text())
    assert value["out"] == str(out)
    assert value["bytes"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert (value["bpw"], value["nominal_bits"]) == (report["bpw"], report["nominal_bits"])
    assert value["nominal_bits"] == 3 < value["bpw"]
    assert 0.5 < value["ratio_to_fp16"] < 1.0  # the embedding and head are most of this model
    assert value["events"] == report["events"]
    assert value["recipe"]["damp"] == 0.05
    assert value["recipe"]["name"] == "slim-llm"
    assert value["already_done"] is False
    lines = ran.err.splitlines()
    assert [line[:12] for line in lines if line.startswith("block ")] == ["block 1 of 2", "block 2 of 2"]
    assert not any("up_proj:" in line for line in lines)
    untouched = [line for line in lines if line.startswith("  unchanged")]
    assert len(untouched) == len(value["untouched"]) == 2
    assert "% of the bytes, outside the blocks" in untouched[0]
    assert lines.index(untouched[0]) < lines.index(next(line for line in lines if line.startswith("block ")))


def test_a_finished_output_says_so(command: Command, tiny: Path, text: Path, tmp_path: Path) -> None:
    line = ("quantize", tiny, tmp_path / "out", *FLAGS, "--calibration", text, "--recipe", "rtn")
    first = command(*line)
    assert first.code == 0
    assert ": finished in " in first.out
    assert "3 nominal" in first.out
    assert "% of fp16" in first.out
    assert "none: no fallback" in first.out
    assert f"bitquilt inspect {tmp_path / 'out'}" in first.out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = command(*line)
    assert again.code == 0
    assert "finished already" in again.out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert json.loads(command(*line, "--json").out)["already_done"] is True


@pytest.mark.parametrize(("flag", "key"), [("--bits", "nominal_bits"), ("--bpw", "bpw")])
def test_fractional_budgets(command: Command, tiny: Path, text: Path, tmp_path: Path, flag: str, key: str) -> None:
    target = {"--bits": 2.2, "--bpw": 6.0}[flag]
    line = ("quantize", tiny, tmp_path / "out", "--recipe", "cmpq", flag, str(target), "--calibration", text)
    ran = command(*line, "--samples", "4", "--seq-len", "16", "--json")
    assert ran.code == 0
    # rows of 32 channels end on whole bytes: a quarter of a bit per step
    assert json.loads(ran.out)[key] == pytest.approx(target, abs={"--bits": 0.05, "--bpw": 0.125}[flag])
    shown = json.loads(command("inspect", tmp_path / "out", "--json").out)
    layer = shown["layers"]["model.layers.0.mlp.up_proj"]
    assert (layer["group_size"], len(layer["groups"])) == (1, 32)
    assert sum(layer["bits"].values()) == 32
    assert layer["outliers"] > 0
    assert "of the weights" in command("inspect", tmp_path / "out").out


def test_every_flag_reaches_the_run(
    command: Command, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"body": "text"}\n')
    asked: list[Request] = []

    def recorded(request: Request, observer: object) -> Any:
        asked.append(request)
        raise UserError("recorded")

    monkeypatch.setattr(RUN, recorded)
    calibration = ("--calibration", data, "--column", "body", "--no-bos", "--trust-remote-code", "--seed", "7")
    sizes = ("--samples", "3", "--seq-len", "5", "--self-samples", "2")
    layers = ("--skip", "*.down_proj", "--blocks", "model.layers", "--include-head")
    outer = ("--embedding-bits", "4", "--head-bits", "5")
    command("quantize", tiny, tmp_path / "out", *calibration, *sizes, *layers, *outer)
    command("quantize", tiny, tmp_path / "out", "--keep-embedding")
    assert asked[1].selection.keep_embedding
    for value, usual in ((asked[0].calibration, Calibration()), (asked[0].selection, Selection())):
        same = [f.name for f in fields(value) if getattr(value, f.name) == getattr(usual, f.name)]
        assert set(same) <= {"keep_embedding"}, "a field has no flag above, or its flag is not passed on"


def test_quiet_says_nothing(command: Command, tiny: Path, text: Path, tmp_path: Path) -> None:
    ran = command("quantize", tiny, tmp_path / "out", *FLAGS, "--calibration", text, "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert (tmp_path / "out" / "report.json").is_file()


def test_interrupted_it_continues(
    command: Command, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(request: Request, observer: Callable[[object], None]) -> Any:
        def observe(event: object) -> None:
            observer(event)
            if isinstance(event, BlockDone):
                raise KeyboardInterrupt

        return run(request, observe)

    line = ("quantize", tiny, tmp_path / "out", *FLAGS, "--calibration", text)
    with monkeypatch.context() as patch:
        patch.setattr(RUN, interrupted)
        stopped = command(*line)
    assert stopped.code == 130
    assert "run the same command to continue" in stopped.err
    assert not (tmp_path / "out").exists()
    resumed = command(*line)
    assert resumed.code == 0
    assert "continuing after block 1 of 2" in resumed.err
    assert "block 1 of 2:" not in resumed.err
    assert "block 2 of 2:" in resumed.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "slim-lm"], "unknown recipe 'slim-lm' (did you mean 'slim-llm'?)"),
        (
            ["--recipe", "slim-llm", "--bits", "9.5"],
            "the budget is 9.5 nominal bits per weight; this model reaches 1 to 8",
        ),
        (["--bpw", "1.5", "--recipe", "gptq"], "the budget is 1.5 true bits per weight; this model reaches 2"),
        (["--bpw", "2.5", "--bits", "2"], "give one: bits counts codes only, bpw all"),
        (["--bpw", "2.5", "--size", "1GB"], "bpw and size are budgets for the same run"),
        (["--recipe", "cmpq", "--bpw", "2.5", "--bits", "2"], "give one: bits counts codes only, bpw all"),
        (["--recipe", "cmpq", "--bpw", "1"], "with its tables and outliers; "),
        (["--recipe", "cmpq", "--bits", "9"], "bits is 9.0; the palette reaches means from 1 to 8"),
        (["--recipe", "cmpq", "--group-size", "8"], "recipe cmpq has no groups"),
        (["--recipe", "micromix", "--group-size", "32"], "recipe micromix has no groups"),
        (["--recipe", "mg-ptq", "--bpw", "1.2"], "the budget is 1.2 true bits per weight; this model reaches"),
        (["--recipe", "aptq", "--bits", "5.5"], "bits is 5.5; the palette (2, 4) reaches 2 to 4"),
        (["--recipe", "aptq", "--size", "20kB"], "the budget is 20000 bytes on disk; this model reaches"),
        (["--recipe", "micromix", "--allocation", "global"], "from calibration data, so it has no fixed budget"),
        (
            ["--recipe", "gptq", "--set", "hessian=attention", "--set", "alpha=0.5"],
            "repair errors measured at the layer",
        ),
        (["--recipe", "cmpq", "--set", "palette=[2, 4]"], "palette [2, 4] has a hole at 3"),
        (["--recipe", "cmpq", "--set", "error_outliers=0.6"], "error_outliers is 0.6; wanted a share"),
        (["--recipe", "gptq", "--bits", "9"], "bits is 9; wanted a whole number from 2 to 8"),
        (["--recipe", "gptq", "--bits", "1"], "bits is 1; wanted a whole number from 2 to 8"),
        (["--recipe", "gptq", "--group-size", "12"], "group size is 12; wanted a positive multiple of 8"),
        (["--set", "dampp=1"], "has no option 'dampp' (did you mean 'damp'?)"),
        (["--set", "damp"], "--set 'damp' is not NAME=VALUE"),
        (["--set", "bits=3", "--bits", "2"], "bits is given twice"),
        (["--set", "name=x"], "has no option 'name'"),
        (["--set", "damp=much"], "option 'damp': got 'much'"),
        (["--recipe", "rtn", "--published"], "rtn has no published variant"),
        (["--samples", "0"], "samples is 0; wanted at least 1"),
        (["--calibration", "/nowhere.txt"], "/nowhere.txt does not exist"),
        (["--samples", "4000", "--calibration", "TEXT"], "give more text, or at most"),
        (["--skip", "*"], "every linear layer is skipped"),
        (["--plan", "/nowhere.json"], "cannot read the plan /nowhere.json"),
    ],
)
def test_what_a_user_may_get_wrong(
    command: Command, tiny: Path, text: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    flags = [str(text) if flag == "TEXT" else flag for flag in flags]
    ran = command("quantize", tiny, tmp_path / "out", "--seq-len", "16", *flags)
    assert ran.code == 2
    assert ran.out == ""
    assert "error: " in ran.err
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()


def test_models_that_are_refused(command: Command, tiny: Path, quantized: Path, tmp_path: Path) -> None:
    assert "no folder at '/nowhere'" in command("quantize", "/nowhere", tmp_path / "out").err
    assert "already quantized" in command("quantize", quantized, tmp_path / "out").err
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copyfile(tiny / "config.json", pickled / "config.json")
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    ran = command("quantize", pickled, tmp_path / "out")
    assert ran.code == 2
    assert "pickled weights only" in ran.err


def test_a_folder_that_is_not_ours_is_left_alone(command: Command, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "[mine]"  # brackets are markup to rich: the message must still show the path
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    ran = command("quantize", tiny, out, "--recipe", "rtn")
    assert ran.code == 2
    assert f"{out} exists and was not made by bitquilt" in ran.err
    assert [path.name for path in out.iterdir()] == ["letter.txt"]


def test_exit_codes_of_other_errors(command: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("quantize", tiny).code == 2  # no OUT
    assert command("quantize", tiny, "out", "--no-such-flag").code == 2
    assert command("no-such-verb").code == 2

    def wrong(*args: Any, **options: Any) -> Any:
        raise bitquilt.VerificationError("logits differ")

    monkeypatch.setattr(RUN, wrong)
    ran = command("quantize", tiny, "out")
    assert (ran.code, ran.err) == (3, "error: logits differ\n")
    monkeypatch.setenv("BITQUILT_TRACEBACK", "1")
    with pytest.raises(bitquilt.VerificationError):
        command("quantize", tiny, "out")

    def broken(*args: Any, **options: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(RUN, broken)
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        command("quantize", tiny, "out")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("damp=0.05", ("damp", 0.05)),
        ("act_order=true", ("act_order", True)),
        ("act_order=True", ("act_order", True)),
        ("search=published", ("search", "published")),
        ("search='wide'", ("search", "wide")),
        ("a=b=c", ("a", "b=c")),
        ("a=", ("a", "")),
    ],
)
def test_settings_are_read(setting: str, expected: tuple[str, Any]) -> None:
    assert parse_setting(setting) == expected


def test_events_are_counted_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    dead = [Event(f"layer.{i}", "dead channels", "3 [of 8]") for i in range(2)]
    print_events([*dead, Event("layer.9", "damp raised", "0.1")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:4] for line in lines] == [["2", "x", "dead"], ["1", "x", "damp"]]
    assert "layer.0: 3 [of 8]" in lines[0]


def test_allocators_are_summed_over_the_layers_that_all_have_them() -> None:
    layers = {
        "a": {"table_error": {"exact": 1.0, "graph": 2.0}, "swept_loss": {"exact": 1.5, "graph": 1.0}},
        "b": {"table_error": {"exact": 1.0, "graph": 2.5}, "swept_loss": {"exact": 0.5, "graph": 1.0, "uniform": 9}},
    }
    totals = allocator_totals(parse(RunFacts, {"layers": layers}))
    assert totals == {"by table": {"exact": 2.0, "graph": 4.5}, "after sweep": {"exact": 2.0, "graph": 2.0}}
    assert allocator_totals(parse(RunFacts, {"layers": {"a": {"loss": 1.0}}})) == {}


def test_allocators_are_printed(command: Command, tiny: Path, text: Path, tmp_path: Path) -> None:
    flags = ("--recipe", "mg-ptq", "--bits", 2.5, "--group-size", 16)
    data = ("--calibration", text, "--samples", 2, "--seq-len", 16)
    ran = command("quantize", tiny, tmp_path / "out", *flags, *data)
    assert ran.code == 0
    assert "after sweep: exact" in ran.out
