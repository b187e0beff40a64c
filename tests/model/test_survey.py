"""A survey of families: quantize, reload, equal logits and text. `survey_models.chosen_third` says what runs today."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import bitquilt
from bitquilt.core.budget import Budget
from bitquilt.model.experts import split_experts
from bitquilt.model.linear import QuantizedLinear
from tests.model.survey_models import MIXTURES, chosen_third, survey_model


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(3, 58, (2, 12), generator=torch.Generator().manual_seed(3))
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **more).logits
    return found


def text(model: PreTrainedModel) -> Any:
    if not model.can_generate():
        return None
    with torch.no_grad():
        return model.generate(torch.tensor([[5, 9, 17, 33]]), max_new_tokens=4, do_sample=False).tolist()


@pytest.mark.parametrize(("family", "recipe"), chosen_third()[1])
def test_a_family_computes_with_its_quantized_weights(
    family: str, recipe: str, token_file: Path, tmp_path: Path
) -> None:
    model = survey_model(family)
    model.save_pretrained(tmp_path / "source")
    full = logits(model)
    wish: dict[str, Any] = {"bits": 3, "group_size": 16}
    if recipe == "cmpq+":  # one width per layer: 1.3 s of processor time instead of 1.9
        wish = {"budget": Budget.of(bpw=5), "scope": "layers"}
    result = bitquilt.quantize(
        tmp_path / "source", recipe, out=tmp_path / "out", calibration=token_file, samples=2, seq_len=8, **wish
    )
    assert result.report["logit_difference"] <= 1e-5
    quantized = bitquilt.load(result.folder)
    split_experts(model)
    layers = {name: module for name, module in quantized.named_modules() if isinstance(module, QuantizedLinear)}
    assert layers.keys() == result.report["layers"].keys()
    if family in MIXTURES:
        own = {id(p): p.numel() for p in model.parameters() if p.dim() > 1}
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        outside = sum(own.pop(id(table.weight), 0) for table in tables)
        assert outside
        assert sum(m.in_features * m.out_features for m in layers.values()) > 0.9 * sum(own.values())
    for name, module in layers.items():
        target, weight = model.get_submodule(name), module.dequantize()
        target.weight.data = weight.t() if isinstance(target, Conv1D) else weight
    expected = logits(model)
    torch.testing.assert_close(logits(quantized), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert float((expected - full).abs().max()) > 1e-3 * float(full.abs().max())
    assert text(quantized) == text(model)
