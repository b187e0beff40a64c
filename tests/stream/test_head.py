"""The head on request: quantized like any layer, stored, loaded, resumed; refused where it is tied."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitquilt
from bitquilt.model.linear import QuantizedLinear
from bitquilt.stream import loop


@pytest.fixture
def untied(make_model):
    return make_model("llama", tie_word_embeddings=False)


@pytest.fixture
def ids(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.randint(0, 60, (6, 16), generator=torch.Generator().manual_seed(0))}, path)
    return path


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "slim-llm"])
def test_head_is_quantized_and_computes_with_its_codes(untied, ids, tmp_path, recipe):
    out = tmp_path / "out"
    result = bitquilt.quantize(untied, recipe, ids, out, samples=6, seq_len=16, bits=3, group_size=8, include_head=True)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert "lm_head" in result.report["layers"]
    assert result.report["logit_difference"] < 1e-5
    if recipe != "rtn":
        assert 0 < result.report["layers"]["lm_head"]["output_error"] < 0.5
    hidden = torch.randn(2, model.lm_head.in_features)
    torch.testing.assert_close(model.lm_head(hidden), hidden @ model.lm_head.dequantize().t())
    names = {name for name, _ in model.named_parameters()}
    assert "lm_head.weight" not in names


def test_without_asking_the_head_stays(untied, ids, tmp_path):
    bitquilt.quantize(untied, "gptq", ids, tmp_path / "out", samples=6, seq_len=16, bits=3, group_size=8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    source = AutoModelForCausalLM.from_pretrained(untied)
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)


def test_a_run_interrupted_before_the_head_gives_the_same_bytes(untied, ids, tmp_path, monkeypatch):
    settings = {"samples": 6, "seq_len": 16, "bits": 2, "group_size": 8, "include_head": True}
    bitquilt.quantize(untied, "slim-llm", ids, tmp_path / "whole", **settings)

    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    for name in ("_quantize_head", "put_head"):
        with monkeypatch.context() as patch:
            patch.setattr(loop, name, interrupt)
            with pytest.raises(Interrupted):
                bitquilt.quantize(untied, "slim-llm", ids, tmp_path / "resumed", **settings)
    bitquilt.quantize(untied, "slim-llm", ids, tmp_path / "resumed", **settings)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "resumed" / file.name).read_bytes()


def test_a_tied_head_is_refused_before_anything_happens(make_model, ids, tmp_path):
    tied = make_model("llama", tie_word_embeddings=True)
    with pytest.raises(bitquilt.UserError, match=r"lm_head shares its weight with the embedding.*--include-head"):
        bitquilt.quantize(tied, "gptq", ids, tmp_path / "out", samples=6, seq_len=16, include_head=True)
    assert not (tmp_path / "out.work").exists()
