"""`bitquilt eval`: figures with their protocol, sizes from the folder, tasks passed to lm-eval."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from .conftest import Command

WANTED = {"perplexity", "kl_mean", "kl_p99", "top1_agreement", "tokens", "seq_len", "bpw", "nominal_bits", "bytes"}


def test_json_has_every_figure(command: Command, tiny: Path, quantized: Path, text: Path) -> None:
    ran = command("eval", quantized, "--reference", tiny, "--text", text, "--seq-len", 32, "--json")
    assert ran.code == 0
    value = json.loads(ran.out)
    assert value.keys() >= WANTED
    report = json.loads((quantized / "report.json").read_text())
    assert {key: value[key] for key in ("bpw", "nominal_bits", "bytes")} == {
        key: report[key] for key in ("bpw", "nominal_bits", "bytes")
    }
    assert value["kl_mean"] > 0
    assert value["seq_len"] == 32
    assert value["tokens"] % 31 == 0


def test_a_model_does_not_differ_from_itself(command: Command, tiny: Path, text: Path) -> None:
    ran = command("eval", tiny, "--reference", tiny, "--text", text, "--max-tokens", 64, "--seq-len", 32, "--json")
    value = json.loads(ran.out)
    assert (value["kl_mean"], value["top1_agreement"]) == (0.0, 1.0)
    assert (value["bpw"], value["tokens"]) == (16.0, 62)


@pytest.fixture
def _bars() -> Iterator[None]:
    """Loading bars as a user's process has them: the tests switch them off."""
    enable_progress_bar()
    yield
    disable_progress_bar()


@pytest.mark.usefixtures("_bars")
def test_the_window_stands_beside_every_figure(command: Command, tiny: Path, quantized: Path, text: Path) -> None:
    ran = command("eval", quantized, "--reference", tiny, "--text", text, "--seq-len", 32, "--stride", 16)
    assert ran.code == 0
    figures = [line for line in ran.out.splitlines() if line.strip().startswith(("perplexity", "KL", "same"))]
    assert len(figures) == 6
    assert all("32-token windows, stride 16, " in line for line in figures)
    assert "bits per weight" in ran.out
    assert ran.err == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "there is nothing to measure"),
        (["--text", "/nowhere.txt"], "/nowhere.txt does not exist"),
        (["--text", "TEXT", "--limit", "3"], "--limit goes with --tasks"),
        (["--text", "TEXT", "--seq-len", "65"], "seq_len is 65, but the model's context is 64 tokens"),
        (["--text", "TEXT", "--reference", "/nowhere"], "no folder at '/nowhere'"),
    ],
)
def test_what_a_user_may_get_wrong(command: Command, tiny: Path, text: Path, flags: list[str], message: str) -> None:
    ran = command("eval", tiny, *[str(text) if flag == "TEXT" else flag for flag in flags])
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


def test_tasks_are_handed_on(command: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run_tasks(model: Any, tokenizer: Any, tasks: list[str], limit: int | None, batch_size: int) -> Any:
        asked.extend([type(model).__name__, tokenizer("a")["input_ids"] != [], tasks, limit, batch_size])
        return {"copa": {"acc,none": 0.5}}

    monkeypatch.setattr("bitquilt.cli.eval.run_tasks", run_tasks)
    ran = command("eval", tiny, "--tasks", "copa, piqa", "--limit", 5, "--batch-size", 2, "--json")
    assert asked == ["LlamaForCausalLM", True, ["copa", "piqa"], 5, 2]
    assert json.loads(ran.out)["tasks"] == {"copa": {"acc,none": 0.5}}
    table = command("eval", tiny, "--tasks", "copa", "--limit", 5).out
    assert "acc,none" in table
    assert "first 5 examples" in table
