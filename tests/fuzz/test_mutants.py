"""300 damaged inputs: checkpoints, sources, plans and work directories. Nothing but a message may come of them.

`BITQUILT_FUZZ=KIND:FIRST:LAST pytest tests/fuzz` runs other seeds of a kind of `KINDS`, such as `checkpoint:0:5000`;
KIND may be `all`. A failure names its seed, which makes the same mutant again.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitquilt.cli.demo import DEMO_MODEL

from .cases import KINDS, RUNS, World, make_world, run_mutant

# Mutants per kind: 300 together, which take 20 s of processor time, and how many of them a test holds.
_COUNTS = {"checkpoint": 110, "weights": 50, "source": 75, "plan": 30, **{f"work {name}": 5 for name in RUNS}}
_AT_ONCE = 30


def _groups() -> list[tuple[str, int, int]]:
    if asked := os.environ.get("BITQUILT_FUZZ"):
        kind, first, last = asked.split(":")
        return [(name, int(first), int(last)) for name in (KINDS if kind == "all" else (kind,))]
    return [
        (kind, first, min(first + _AT_ONCE, count))
        for kind, count in _COUNTS.items()
        for first in range(0, count, _AT_ONCE)
    ]


@pytest.fixture(scope="session")
def world(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny Llama with a tokenizer, and what is made of it."""
    folder = tmp_path_factory.mktemp("world")
    model = folder / "model"
    shutil.copytree(make_model("llama", dtype=torch.bfloat16, vocab_size=4096, bos_token_id=0, eos_token_id=0), model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_MODEL / name, model / name)
    text, tokens = folder / "text.txt", folder / "ids.safetensors"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 16)
    save_file({"input_ids": torch.randint(3, 4096, (4, 16), generator=torch.Generator().manual_seed(7))}, tokens)
    return make_world(model, text, tokens, folder)


def run_all(world: World, kind: str, last: int, first: int = 0) -> None:
    for seed in range(first, last):
        run_mutant(world, kind, seed)


def test_there_are_three_hundred() -> None:
    assert sum(_COUNTS.values()) == 300


@pytest.mark.parametrize(("kind", "first", "last"), _groups())
def test_damage_ends_in_a_message(world: World, kind: str, first: int, last: int) -> None:
    run_all(world, kind, last, first)


def test_a_fault_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """This test could fail: an exception that nobody expects passes through, with its seed."""

    def broken(*_: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr("bitquilt.report.facts.read_run", broken)
    with pytest.raises(KeyError, match="planted") as caught:
        run_all(world, "checkpoint", 20)
    assert "BITQUILT_FUZZ='checkpoint:" in caught.value.__notes__[0]


def test_silent_damage_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitquilt.cli.inspect.check_hashes", lambda _: 1)
    with pytest.raises(AssertionError, match="calls damaged weights sound"):
        run_all(world, "weights", 50)
