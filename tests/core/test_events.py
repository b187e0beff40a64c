"""The stage clock: every second is booked once, on the right stage."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import bitquilt
from bitquilt.core import events as progress
from bitquilt.core.events import BlockDone, Stage, StageClock, Started


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test moves."""
    held = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: held[0])
    return held


def test_seconds_are_booked_once(now: list[float]) -> None:
    seen: list[object] = []
    clock = StageClock(seen.append)
    events = [
        (1, Started("m", 2, 1, 14, 100, ())),
        (2, Stage("the model writes its text: 0 of 64 sequences")),
        (5, Stage("the model writes its text: 32 of 64 sequences")),
        (9, Stage("reading calibration text from /home/somebody/text")),
        (10, BlockDone(0, 2, None, 0.75)),
        (14, BlockDone(1, 2, None, 3.5)),
        (15, Stage("writing")),
    ]
    for at, event in events:
        now[0] = at
        clock.observe(event)
    now[0] = 17
    stages = {str(stage["name"]): stage["seconds"] for stage in clock.stages()}
    assert stages == {
        "preparing": 2,
        "the model writes its text": 7,
        "reading calibration text": 0.25,
        StageClock.BLOCKS: 5.75,
        "writing": 2,
    }
    assert sum(map(float, stages.values())) == 17
    assert [event for _, event in events] == seen
    assert clock.continued_after == 1


def test_a_run_s_report_holds_machine_stages_and_blocks(make_quantized: Callable[..., bitquilt.Result]) -> None:
    result = make_quantized("llama", "slim-llm")
    report = json.loads((result.folder / "report.json").read_text())
    assert report["model"]["class"] == "LlamaForCausalLM"
    assert report["model"]["name"] == "llama"
    assert [block["name"] for block in report["blocks"]] == ["model.layers.0", "model.layers.1"]
    names = [stage["name"] for stage in report["stages"]]
    assert StageClock.BLOCKS in names
    assert all(not Path(name).is_absolute() and "/" not in name for name in names)
    peaks = [stage["peak_memory_bytes"] for stage in report["stages"]]
    assert 0 < peaks[0] <= peaks[-1] <= report["peak_memory_bytes"]
    blocks = sum(block["seconds"] for block in report["blocks"])
    assert report["seconds"]["blocks"] == pytest.approx(blocks)
    assert report["seconds"]["this_process"] >= report["seconds"]["blocks"] - 0.01
    assert report["machine"].keys() >= {"cpu", "cores", "memory_bytes", "gpus", "platform", "bitquilt"}
    assert time.strptime(report["created"][:19], "%Y-%m-%dT%H:%M:%S")
