"""A tiny model with the packaged tokenizer, and the `bitquilt` command as a function."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import bitquilt
from bitquilt import cli
from bitquilt.cli.demo import DEMO_MODEL

FLAGS = ("--recipe", "slim-llm", "--bits", "3", "--group-size", "16", "--samples", "4", "--seq-len", "16")


@dataclass(frozen=True)
class Ran:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Command = Callable[..., Ran]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`bitquilt ARGS` in this process, through its entry point; exceptions that it does not handle pass through."""

    def call(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["bitquilt", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ran(ended.value.code, out, err)

    return call


@pytest.fixture(scope="session")
def tiny(make_model: Callable[..., Path]) -> Path:
    """A random Llama in bfloat16, of two blocks of seven layers, with the packaged tokenizer."""
    folder = make_model("llama", dtype=torch.bfloat16, vocab_size=4096, bos_token_id=0, eos_token_id=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_MODEL / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About three hundred tokens of English."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and nobody asks the dog why. " * 16)
    return path


@pytest.fixture(scope="session")
def quantized(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, quantized to 3 bits by slim-llm."""
    out = tmp_path_factory.mktemp("quantized") / "tiny-3bit"
    bitquilt.quantize(tiny, "slim-llm", text, out, bits=3, group_size=16, samples=4, seq_len=16)
    return out
