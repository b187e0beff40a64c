"""Tables of loss from a model's own tensors, against the same sums written out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import bitquilt
from bitquilt.core.types import Layer, uniform_plan
from bitquilt.model.linear import QuantizedLinear
from bitquilt.planning.measure_sensitivities import _draw, _subset
from bitquilt.recipes import make_recipe
from bitquilt.stream.block_calls import BlockCalls
from bitquilt.stream.statistics import collect


def test_one_bit_is_what_solving_the_layer_at_one_bit_costs(
    make_model: Callable[..., Path], token_file: Path, tmp_path: Path
) -> None:
    """0.5 E[(g^T E x)^2], with E of the quantized layer and g drawn as the measurement draws it."""
    model = make_model()
    found = bitquilt.measure_model(model, tmp_path / "s", "slim-llm", token_file, samples=6, seq_len=16, group_size=8)
    full = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
    name = "model.layers.1.mlp.down_proj"
    layer, ids = full.get_submodule(name), load_file(token_file)["input_ids"]
    made = 0.0
    with torch.no_grad():
        stats = collect({name: layer}, (full(i) for i in [ids]), hessian=True, sample=0, tokens=ids.numel())[name]
    recipe: Any = make_recipe("slim-llm", group_size=8)
    plan = uniform_plan(48, 1, 8)
    solved = recipe.quantize(Layer(name, layer.weight, None, stats), plan, recipe.prepare(stats)).weight
    error = QuantizedLinear.from_weight(solved).dequantize() - layer.weight

    def keep(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.detach().requires_grad_()

        def add(gradient: torch.Tensor) -> None:
            nonlocal made
            made += float((gradient * (inputs[0] @ error.T)).sum(-1).square().sum())

        output.register_hook(add)
        return output

    layer.register_forward_hook(keep)
    logits = full(ids).logits.flatten(0, 1)
    places = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = _draw(logits.detach().softmax(-1), places)
    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    wanted = max(0.5 * made / ids.numel(), float(found.losses[name][:, 1].sum()))
    assert float(found.losses[name][:, 0].sum()) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("samples", "length", "widest", "shape"),
    [
        (128, 2048, 4096, (32, 512)),  # at most 16 k tokens
        (64, 256, 64, (16, 256)),  # a quarter
        (64, 256, 11008, (43, 256)),  # as many as the widest layer has inputs
        (8, 256, 64, (8, 256)),  # few: all
        (1, 4096, 64, (1, 512)),
    ],
)
def test_how_many_tokens_are_measured(samples: int, length: int, widest: int, shape: tuple[int, int]) -> None:
    """Sequences from first to last: the model's own text stands at the end."""
    ids = torch.arange(samples)[:, None].expand(samples, length)
    found = _subset(ids, widest)
    assert found.shape == shape
    assert found[:, 0].tolist() == sorted(set(found[:, 0].tolist()))
    assert (int(found[0, 0]), int(found[-1, 0])) == (0, samples - 1)


def test_labels_are_drawn_by_probability_and_alike_in_batches_of_any_size() -> None:
    g = torch.Generator().manual_seed(0)
    likely = torch.randn(1, 7, generator=g).softmax(-1).expand(4000, 7)
    places = torch.rand(40, 100, generator=g)
    drawn = _draw(likely, places)
    assert torch.equal(drawn, torch.cat([_draw(likely[:1200], places[:12]), _draw(likely[1200:], places[12:])]))
    frequency = drawn.bincount(minlength=7) / 4000
    assert float((frequency - likely[0]).abs().max()) < 0.02
    certain = torch.eye(7)[[2, 5]] * 100
    assert _draw(certain.softmax(-1), torch.tensor([[0.1, 0.9], [0.2, 1.0]])).tolist() == [2, 5]


def test_logits_are_in_memory_for_few_sequences_at_once(
    make_model: Callable[..., Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence at a time gives the tables of all at once."""
    found, rows = [], []
    finish = BlockCalls.finish

    def finishing(self: BlockCalls, ids: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        rows.append(len(ids))
        return finish(self, ids, *others, **named)

    monkeypatch.setattr(BlockCalls, "finish", finishing)
    for most in (2**24, 1):
        monkeypatch.setattr("bitquilt.planning.measure_sensitivities._MOST_LOGITS", most)
        folder = tmp_path / str(most)
        found.append(bitquilt.measure_model(make_model("llama"), folder, "gptq", token_file, samples=6, seq_len=16))
    assert rows == [6, *[1] * 6]
    for name, losses in found[0].losses.items():
        np.testing.assert_allclose(losses, found[1].losses[name], rtol=1e-3)
