"""Embedding and head on request: few bits on disk and in memory; a table read by row, and shared with a tied head."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import bitquilt
from bitquilt.model.linear import QuantizedLinear
from bitquilt.model.replace import SharedHead
from bitquilt.model.tables.embedding import QuantizedEmbedding
from bitquilt.stream import hidden_states, loop

SETTINGS = {"samples": 6, "seq_len": 16, "bits": 3, "group_size": 8}


@pytest.fixture
def ids(tmp_path):
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.randint(0, 60, (6, 16), generator=torch.Generator().manual_seed(0))}, path)
    return path


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "opt", "gpt2", "gpt-neox", "bert"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_table_takes_few_bits_and_the_model_computes_with_it(family, bits, make_model, ids, tmp_path):
    source = make_model(family)
    result = bitquilt.quantize(source, "rtn", ids, tmp_path / "out", embedding_bits=bits, **SETTINGS)
    assert result.report["logit_difference"] < 1e-5
    kind = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    model, plain = kind.from_pretrained(tmp_path / "out"), kind.from_pretrained(source)
    table, original = model.get_input_embeddings(), plain.get_input_embeddings()
    assert isinstance(table, QuantizedEmbedding)
    tokens = torch.tensor([[3, 1], [4, 1]])
    rows = table(tokens)
    torch.testing.assert_close(rows, table.dequantize()[tokens], rtol=0, atol=0)
    error = (rows - original(tokens)).square().mean() / original(tokens).square().mean()
    assert error < {4: 0.02, 8: 1e-4}[bits]
    stored = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    path = next(name for name, module in model.named_modules() if module is table)
    assert stored[f"{path}.codes_0"].dtype == torch.uint8
    assert f"{path}.weight" not in stored


def test_a_tied_head_computes_with_the_same_codes(make_model, ids, tmp_path):
    bitquilt.quantize(make_model("llama-tied-bias"), "rtn", ids, tmp_path / "out", embedding_bits=4, **SETTINGS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, SharedHead)
    hidden = torch.randn(2, 3, table.embedding_dim)
    torch.testing.assert_close(head(hidden), hidden @ table.dequantize().t())
    assert head.weight.shape == (table.num_embeddings, table.embedding_dim)
    # saved again and loaded again, it is the same model; asking for ties changes nothing
    model.tie_weights()
    before = model(torch.tensor([[1, 2, 3]])).logits
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(torch.tensor([[1, 2, 3]])).logits, before)
    half = model.to(torch.bfloat16)
    assert half(torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16


def test_a_head_stored_apart_stays_apart(make_model, ids, tmp_path):
    """A config that says `tied` over two tables: only the embedding gets few bits."""
    source = tmp_path / "model"
    shutil.copytree(make_model("llama-tied-bias"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    bitquilt.quantize(source, "rtn", ids, tmp_path / "out", embedding_bits=4, **SETTINGS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
@pytest.mark.parametrize("options", [{"head_bits": 6}, {"embedding_bits": 8, "head_bits": 3}])
def test_a_head_of_its_own_takes_few_bits_and_the_model_computes_with_it(family, options, make_model, ids, tmp_path):
    source = make_model(family)
    result = bitquilt.quantize(source, "rtn", ids, tmp_path / "out", **options, **SETTINGS)
    assert result.report["logit_difference"] < 1e-5
    model, plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(source)
    head, original = model.get_output_embeddings(), plain.get_output_embeddings().weight.detach()
    assert isinstance(head, QuantizedLinear)
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding) == ("embedding_bits" in options)
    path = next(name for name, module in model.named_modules() if module is head)
    entry = result.report["layers"][path]
    assert (entry["bits"], entry["group_size"]) == (str(options["head_bits"]), 32)
    error = float((head.dequantize() - original).square().sum() / original.square().sum())
    assert error == pytest.approx(entry["weight_error"])
    assert error < {3: 0.1, 6: 2e-3}[options["head_bits"]]
    hidden = torch.randn(2, head.in_features)
    torch.testing.assert_close(head(hidden), hidden @ head.dequantize().t())
    assert f"{path}.weight" not in {k for file in (tmp_path / "out").glob("*.safetensors") for k in load_file(file)}


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama-tied-bias", {"embedding_bits": 4}), ("llama", {"embedding_bits": 4, "head_bits": 5})],
)
def test_interrupted_runs_give_the_same_bytes_and_the_plan_replays(
    family, options, make_model, ids, tmp_path, monkeypatch
):
    source = make_model(family)
    bitquilt.quantize(source, "gptq", ids, tmp_path / "whole", **options, **SETTINGS)

    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    for module, name in ((hidden_states, "learn_calls"), (loop, "quantize_block"), (loop, "_write_logits")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupt)
            with pytest.raises(Interrupted):
                bitquilt.quantize(source, "gptq", ids, tmp_path / "resumed", **options, **SETTINGS)
    bitquilt.quantize(source, "gptq", ids, tmp_path / "resumed", **options, **SETTINGS)
    plan = tmp_path / "whole" / "plan.json"
    value = json.loads(plan.read_text())
    assert not {"model.embed_tokens", "lm_head"} & value["layers"].keys()
    assert {key: bits for key, bits in value.items() if key.endswith("_bits")} == options
    bitquilt.quantize(source, None, ids, tmp_path / "replayed", plan=plan, samples=6, seq_len=16)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "resumed" / file.name).read_bytes()
        assert file.read_bytes() == (tmp_path / "replayed" / file.name).read_bytes()


def test_what_cannot_be_done_is_refused_before_anything_happens(make_model, ids, tmp_path, monkeypatch):
    with pytest.raises(bitquilt.UserError, match="embedding bits is 9; wanted 2 to 8"):
        bitquilt.quantize(make_model("llama"), "rtn", ids, tmp_path / "out", embedding_bits=9, **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr("bitquilt.model.replace.lookup_scale", lambda _table: None)
        with pytest.raises(bitquilt.UserError, match="does more than look up and scale rows"):
            bitquilt.quantize(make_model("llama"), "rtn", ids, tmp_path / "out", embedding_bits=8, **SETTINGS)
    with pytest.raises(bitquilt.UserError, match="head bits is 1; wanted 2 to 8"):
        bitquilt.quantize(make_model("llama"), "rtn", ids, tmp_path / "out", head_bits=1, **SETTINGS)
    with pytest.raises(bitquilt.UserError, match="leave out --head-bits, or give --embedding-bits, which rounds both"):
        bitquilt.quantize(make_model("llama-tied-bias"), "rtn", ids, tmp_path / "out", head_bits=6, **SETTINGS)
    with pytest.raises(bitquilt.UserError, match=r"--include-head leaves the head lm_head .* give one of them"):
        bitquilt.quantize(make_model("llama"), "rtn", ids, tmp_path / "out", head_bits=6, include_head=True, **SETTINGS)
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_a_damaged_table_is_named(name, make_model, ids, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(make_model("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[f"{name}.weight"][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(bitquilt.UserError, match=f"{name}: weight holds 1 NaN.*the checkpoint is damaged"):
        bitquilt.quantize(source, "rtn", ids, tmp_path / "out", embedding_bits=4, head_bits=6, **SETTINGS)
