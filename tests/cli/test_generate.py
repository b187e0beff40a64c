"""`bitquilt generate`: seeded, streamed, and without touching the global random state."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitquilt.serve import generation
from bitquilt.serve.cuda_graph_decoder import GraphDecoder

from .conftest import Command

PROMPT = ("--prompt", "The old man", "-n", 12)


@pytest.mark.parametrize("which", ["tiny", "quantized"])
def test_the_seed_decides(command: Command, request: pytest.FixtureRequest, which: str) -> None:
    folder = request.getfixturevalue(which)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = command("generate", folder, *PROMPT)
    assert torch.equal(before, torch.get_rng_state())
    assert (first.code, first.err) == (0, "")
    assert first.out.startswith("The old man")
    assert len(first.out) > len("The old man\n")
    assert command("generate", folder, *PROMPT).out == first.out
    assert command("generate", folder, *PROMPT, "--seed", 1).out != first.out


def test_temperature_zero_needs_no_seed(command: Command, tiny: Path) -> None:
    line = ("generate", tiny, *PROMPT, "--temperature", 0, "--dtype", "bfloat16")
    assert command(*line, "--seed", 1).out == command(*line, "--seed", 2).out


def test_the_graphs_decoder_writes_the_same(command: Command, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph decoder of a GPU on a CPU, and an unknown GPU is refused."""
    line = ("generate", quantized, *PROMPT, "--temperature", 0, "--device", "cpu")
    native = command(*line).out
    monkeypatch.setattr(generation, "CpuDecoder", GraphDecoder)
    begun: list[str] = []
    whole = GraphDecoder.begin
    monkeypatch.setattr(GraphDecoder, "begin", lambda self, ids: begun.append(self.name) or whole(self, ids))
    assert command(*line).out == native
    assert begun == ["graph"]
    ran = command("generate", quantized, *PROMPT, "--device", "cuda:9")
    assert ran.code == 2
    assert "but this machine has" in ran.err


def test_the_context_is_a_limit(command: Command, tiny: Path) -> None:
    ran = command("generate", tiny, "--prompt", "a b c d e f g h", "-n", 500)
    assert ran.code == 0
    assert "leaves room for" in ran.err
    ran = command("generate", tiny, "--prompt", "a b c d " * 40)
    assert ran.code == 2
    assert "the model's context 64" in ran.err


def test_an_empty_prompt_begins_with_the_first_token(command: Command, tiny: Path) -> None:
    assert command("generate", tiny, "--prompt", "", "-n", 4).code == 0


def test_what_a_user_may_get_wrong(command: Command, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    ran = command("generate", folder, *PROMPT)
    assert (ran.code, ran.out) == (2, "")
    assert "has no tokenizer" in ran.err
    assert command("generate", "/nowhere", *PROMPT).code == 2
    assert command("generate", tiny).code == 2
    assert command("generate", tiny, *PROMPT, "--dtype", "int3").code == 2


def test_the_tokenizer_of_another_model_is_named(
    command: Command, make_model: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama", vocab_size=512, bos_token_id=0, eos_token_id=0), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, folder / name)
    ran = command("generate", folder, *PROMPT)
    assert ran.code == 2
    assert "the model knows 0 to 511; use the tokenizer that belongs to the model" in " ".join(ran.err.split())
