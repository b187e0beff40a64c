"""`run_mutant(world, kind, seed)` damages a copy of a good input and uses it as a user would; see `KINDS`.

A use may succeed, exit with a message, or raise UserError or VerificationError. Anything else is a fault, which passes
through with the mutant as a note. So is a success that should not be one.
"""

import contextlib
import io
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import bitquilt
from bitquilt import UserError, cli
from bitquilt.core.events import BlockDone
from bitquilt.core.plan_file import read_plan
from bitquilt.errors import VerificationError

from .mutants import fresh, mutate


@dataclass(frozen=True)
class StoppedRun:
    """Options of a run, its work directory when it was stopped, and the files of the output that it should give."""

    options: dict[str, Any]
    work: Path
    expected: dict[str, bytes]


@dataclass(frozen=True)
class World:
    """Good inputs, made in `folder`: a model, its quantized checkpoint, a text, token ids, and stopped runs by name."""

    folder: Path
    model: Path
    checkpoint: Path
    text: Path
    tokens: Path
    runs: dict[str, StoppedRun] = field(default_factory=dict)

    def run(self, name: str) -> StoppedRun:
        """A stopped run of `RUNS`, made once."""
        if name not in self.runs:
            recipe, more, stop = RUNS[name]
            options = {"recipe": recipe, **_usual(self.tokens), **more}
            home = self.folder / name
            expected = _bytes_of(bitquilt.quantize(self.model, out=home / "whole", **options).folder)
            del expected["report.json"]  # it tells times
            with pytest.raises(_Stopped):
                bitquilt.quantize(self.model, out=home / "out", **options, observer=_stop(stop))
            self.runs[name] = StoppedRun(options, home / "out.work", expected)
        return self.runs[name]


def command(*args: object) -> int:
    """Run `bitquilt ARGS` in this process and return the exit code; exceptions that it does not handle pass through."""
    before, sys.argv = sys.argv, ["bitquilt", *map(str, args)]
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    code = ended.value.code
    assert code in (0, 1, 2, 3, 4), code
    return int(code)


def run_mutant(world: World, kind: str, seed: int) -> str:
    """Make the mutant `seed` of a kind, use it and return what happened. Raises what the library should not."""
    rng = random.Random(f"{kind} {seed}")
    what = "no damage"
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(action="ignore"):
        try:
            folder = Path(name)
            what, use = KINDS[kind](world, folder, rng)
            try:
                return f"{what}: {use()}"
            except (UserError, VerificationError) as error:
                return f"{what}: {type(error).__name__}: {error}"
        except BaseException as error:
            error.add_note(
                f"mutant: {what}. To make it again: BITQUILT_FUZZ='{kind}:{seed}:{seed + 1}' pytest tests/fuzz"
            )
            raise


Made = tuple[str, Callable[[], object]]


def _checkpoint(world: World, folder: Path, rng: random.Random) -> Made:
    out = fresh(world.checkpoint, folder / "checkpoint")
    what = mutate(out, rng)
    verb = rng.choice(("inspect", "inspect --json", "inspect --map", "report", "compare", "load", "verify", "generate"))

    def use() -> object:
        if verb == "load":
            return _load(out)
        if verb == "generate":
            return command("generate", out, "-p", "The", "-n", 1, "--device", "cpu")
        if verb == "report":
            return command("report", out, "--out", folder / "page.html")
        if verb == "compare":
            return command("compare", out, world.checkpoint, "--out", folder / "page.html")
        if verb == "verify":
            return command("inspect", out, "--verify")
        return command(*(verb.split()[:1]), out, *verb.split()[1:])

    return f"{verb}, {what}", use


def _weights(world: World, folder: Path, rng: random.Random) -> Made:
    """Every damage to weights is found by `inspect --verify`; loading must not crash."""
    out = fresh(world.checkpoint, folder / "checkpoint")
    what = mutate(out, rng, lambda name: name.endswith(".safetensors"))
    same = _bytes_of(out, "*.safetensors") == _bytes_of(world.checkpoint, "*.safetensors")

    def use() -> object:
        code = command("inspect", out, "--verify")
        assert same or code != 0, "inspect --verify calls damaged weights sound"
        return code, _load(out)

    return what, use


def _load(folder: Path) -> str:
    model = bitquilt.load(folder)
    ids = torch.arange(8)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        return str(model(ids).logits.shape)


def _source(world: World, folder: Path, rng: random.Random) -> Made:
    model = fresh(world.model, folder / "model")
    what = mutate(model, rng)
    verb = rng.choice(("inspect", "plan", "plan --json", "quantize", "quantize", "eval", "calibrate"))

    def use() -> object:
        if verb == "inspect":
            return command("inspect", model)
        if verb.startswith("plan"):
            return command("plan", model, "--recipe", "rtn", "--bpw", 3.5, *verb.split()[1:])
        if verb == "eval":
            return command("eval", model, "--text", world.text, "--seq-len", 16, "--max-tokens", 32)
        if verb == "calibrate":
            return command(*_QUANTIZE, model, "--recipe", "gptq", "--calibration", world.text, "--out", folder / "out")
        return command(*_QUANTIZE, model, "--recipe", "rtn", "--out", folder / "out")

    return f"{verb}, {what}", use


_QUANTIZE = ("quantize", "--bits", 3, "--group-size", 16, "--samples", 4, "--seq-len", 16, "--quiet")


def _plan(world: World, folder: Path, rng: random.Random) -> Made:
    (folder / "plan").mkdir()
    path = Path(shutil.copy(world.checkpoint / "plan.json", folder / "plan" / "plan.json"))
    what = mutate(path.parent, rng)

    def use() -> object:
        read_plan(path)
        return command("quantize", world.model, "--plan", path, "--out", folder / "out", "--quiet")

    return what, use


def _work(world: World, folder: Path, rng: random.Random, name: str) -> Made:
    """A stopped run continues with a damaged work directory and ends with the bytes of an undisturbed run."""
    stopped = world.run(name)
    fresh(stopped.work, folder / "out.work")
    what = mutate(folder / "out.work", rng)

    def use() -> object:
        result = bitquilt.quantize(world.model, out=folder / "out", **stopped.options)
        found = _bytes_of(folder / "out")
        different = [key for key in stopped.expected if found.get(key) != stopped.expected[key]]
        assert not different, f"other bytes than an undisturbed run: {different}"
        return result.folder.name

    return f"{name}, {what}", use


def make_world(model: Path, text: Path, tokens: Path, folder: Path) -> World:
    """Make the good inputs in `folder`."""
    checkpoint = folder / "checkpoint"
    bitquilt.quantize(model, "gptq", out=checkpoint, bits=3, embedding_bits=8, **_usual(tokens))
    command("eval", checkpoint, "--text", text, "--seq-len", 16, "--max-tokens", 32)
    return World(folder, model, checkpoint, text, tokens)


def _usual(tokens: Path) -> dict[str, Any]:
    return {"calibration": tokens, "samples": 4, "seq_len": 16, "group_size": 16}


class _Stopped(Exception):
    pass


def _stop(when: object) -> Callable[[object], None]:
    """An observer that stops a run after a block (a number), or at a stage whose text begins like this."""

    def observe(event: object) -> None:
        if isinstance(event, BlockDone) and event.block == when:
            raise _Stopped
        if isinstance(when, str) and getattr(event, "text", "").startswith(when):
            raise _Stopped

    return observe


_TUNED: dict[str, Any] = {"bits": 2, "effort": "best", "epochs": 1, "tune_epochs": 1}
# by name: recipe, options, and where the run stops
RUNS: dict[str, tuple[str, dict[str, Any], object]] = {
    "after a block": ("gptq", {"bits": 3, "embedding_bits": 6}, 0),
    "before the end": ("gptq", {"bits": 3, "include_head": True}, "writing the checkpoint"),
    "planned": ("rtn", {"budget": bitquilt.Budget.of(bpw=3.6)}, 0),
    "with drift": ("quilt", {"bits": 3}, 0),
    "sensed": ("aptq", {"bits": 4}, 0),
    "tuned": ("quilt", _TUNED, "computing the quantized model's logits"),
    "tuning": ("quilt", {**_TUNED, "include_head": True}, "training all blocks"),
}


KINDS: dict[str, Callable[[World, Path, random.Random], Made]] = {
    "checkpoint": _checkpoint,
    "weights": _weights,
    "source": _source,
    "plan": _plan,
    **{f"work {name}": partial(_work, name=name) for name in RUNS},
}


def _bytes_of(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern)) if path.is_file()}
