"""Blocks that share weights, as in Zamba2: quantized where they are stored, computed with everywhere, stored once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import bitquilt
from bitquilt import Result, UserError
from bitquilt.core.budget import Budget
from bitquilt.model.linear import QuantizedLinear
from bitquilt.model.shared_layers import SharedLinear
from bitquilt.recipes.quilt import Quilt
from tests.model.survey_models import survey_model

_FIELDS = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "hybrid_layer_ids": [1, 3],
    "tie_word_embeddings": True,
}
FIRST, SECOND = "model.layers.1.shared_transformer.", "model.layers.3.shared_transformer."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / "zamba2"
    survey_model("zamba2", **_FIELDS).save_pretrained(folder)
    return folder


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(3, 27).view(2, 12)).logits
    return found


@pytest.mark.parametrize("recipe", ["rtn", "quilt"])
def test_a_shared_weight_is_solved_once_and_used_in_both_blocks(
    recipe: str, source: Path, quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    if recipe == "rtn":
        result = quantize_tiny(source, tmp_path / "out", "rtn")
    else:
        chosen = Quilt(bits=3, group_size=16, effort="normal", epochs=1, passes=0)
        result = quantize_tiny(source, tmp_path / "out", chosen, budget=Budget.of(bpw=5), samples=3, seq_len=8)
    layers = result.report["layers"].keys()
    assert any(name.startswith(FIRST) for name in layers)
    assert not any(name.startswith(SECOND) for name in layers)
    stored = json.loads((result.folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any(name.startswith(SECOND) for name in stored)

    quantized, full = bitquilt.load(result.folder), survey_model("zamba2", **_FIELDS)
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):  # the other block's weight is the same parameter
            full.get_submodule(name).weight.data = module.dequantize()
    shared = quantized.get_submodule(f"{SECOND}self_attn.q_proj")
    assert isinstance(shared, SharedLinear)
    assert shared.holder is quantized.get_submodule(f"{FIRST}self_attn.q_proj")
    torch.testing.assert_close(logits(quantized), logits(full), rtol=1e-4, atol=1e-4)
    quantized.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(bitquilt.load(tmp_path / "again")), logits(quantized))


def test_blocks_that_share_weights_are_not_trained_together(
    source: Path, quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"cannot be trained together where they share weights; effort=normal"):
        quantize_tiny(source, tmp_path / "out", Quilt(bits=3, group_size=16, effort="best"))
