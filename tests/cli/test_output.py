"""What is printed where: units, JSON, bars and lines, and a pipe that closes early."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bitquilt.cli import output, progress
from bitquilt.cli.app import VERBS, load_verb
from bitquilt.cli.output import print_json
from bitquilt.core.events import BlockDone, LayerDone, Stage, Started, Untouched
from bitquilt.core.units import percent_text, ratio_text, size_text, time_text

from .conftest import Command

STARTED = Started("a/model", 3, 1, 6, 1000, (Untouched("outside the blocks", 2, 250, "embed.weight"),))
EVENTS = [
    STARTED,
    Stage("reading a text whose name is far longer than any terminal is wide, " * 3),
    *(LayerDone(1, f"model.layers.1.layer{i}", 2.5, 0.01 * (i + 1), 0.1) for i in range(2)),
    BlockDone(1, 3, 0.015, 12.0),
    *(LayerDone(2, f"model.layers.2.layer{i}", 2.5, None, 0.1) for i in range(2)),
    BlockDone(2, 3, None, 75.0),
]


def test_units() -> None:
    sizes = [size_text(n) for n in (7, 999, 1000, 3_630_000, 14e9, 2.5e12)]
    assert sizes == ["7 B", "999 B", "1 kB", "3.63 MB", "14 GB", "2.5 TB"]
    times = [time_text(s) for s in (0.04, 9.94, 9.96, 75, 7260)]
    assert times == ["0.0 s", "9.9 s", "10 s", "1 min 15 s", "2 h 01 min"]
    assert [percent_text(share) for share in (0.5, 0.0025, 1, 25)] == ["50 %", "0.25 %", "100 %", "2500 %"]
    assert ratio_text(0.25) == "25 % of fp16, 4.0 times smaller"
    assert ratio_text(2.0) == "200 % of fp16"


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [math.nan, math.inf, 1.5], "b": {"c": (2, None)}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "b": {"c": [2, None]}}


def test_lines_for_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.watching(quiet=False) as observer:
        for event in EVENTS:
            observer(event)
    out, err = capsys.readouterr()
    assert out == ""
    assert "25 % of the bytes, outside the blocks: 2 tensors, such as embed.weight" in err
    assert "continuing after block 1 of 3" in err
    lines = [line for line in err.splitlines() if line.startswith("block ")]
    assert lines[0].startswith("block 2 of 3: output error 0.0150, 12 s, about ")
    assert lines[1] == "block 3 of 3: 1 min 15 s"


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_for_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False)
    monkeypatch.setattr(progress, "stderr", screen)
    with progress.watching(quiet=False) as observer:
        bar = observer.__self__  # type: ignore[attr-defined]
        shown = []
        for event in EVENTS:
            observer(event)
            with screen.capture() as capture:
                screen.print(bar.get_renderable())
            shown.append(capture.get())
    assert all(len(line) <= width for text in shown for line in plain(text).splitlines())
    assert "block 2/3" in shown[0]
    assert "33%" in shown[0]  # two of six layers are in blocks done before
    assert "reading a text" in shown[1]
    assert "model.layers.1.layer1: 2.50 bits per weight" in shown[3]
    assert "error 0.0150" in plain(shown[3])  # the mean of 0.01 and 0.02
    assert " left" in shown[3]
    assert "block 3/3" in shown[4]
    assert "100%" in shown[-1]


def plain(text: str) -> str:
    """Without the colours."""
    from rich.text import Text

    return Text.from_ansi(text).plain


def test_scoring_on_a_terminal_and_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LOG_EVERY", 0.0)
    with progress.scoring(quiet=False) as scored:
        assert scored is not None
        scored(3, 8, 12.5)
    assert capsys.readouterr().err == "window 3 of 8: perplexity 12.500 so far\n"
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(progress, "stderr", screen)
    with progress.scoring(quiet=False) as scored:
        assert scored is not None
        scored(3, 8, 12.5)
    assert "window 3/8" in plain(screen.file.getvalue())  # type: ignore[attr-defined]
    with progress.scoring(quiet=True) as scored:
        assert scored is None


def test_facts_wrap_below_themselves_on_a_terminal() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=40)
    output.print_fact(screen, "unchanged", "[not markup] " + "word " * 12)
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].startswith("  unchanged   [not markup]")
    assert len(lines) > 1
    assert all(line.startswith(" " * 14) for line in lines[1:])


def test_a_pipe_that_closes_early_is_no_error(quantized: Path) -> None:
    code = "import sys; from bitquilt.cli import main; sys.stdin.read(); main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "inspect", quantized, "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdin is not None
        process.stdout.close()  # before anything is written
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode in (0, 1)


def test_help_and_version(command: Command) -> None:
    ran = command("--help")
    assert ran.code == 0
    for name, verb in VERBS.items():
        assert f"{name} " in ran.out
        assert load_verb(name).help == verb.help
    assert "Bits and budget" in command("quantize", "--help").out
    assert command("--version").out.startswith("bitquilt 0.")
