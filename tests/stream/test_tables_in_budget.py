"""Embedding and head in the budget of the whole model: bytes to the last one, reload, replay, and what is left out."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import bitquilt
from bitquilt.core.budget import Budget
from bitquilt.errors import UserError
from bitquilt.model.replace import SharedHead
from bitquilt.model.tables.embedding import lookup_scale
from bitquilt.model.tables.mixed_rows import MixedEmbedding, MixedHead
from bitquilt.planning.plan_model import plan

SETTINGS = {"samples": 6, "seq_len": 16, "group_size": 8}
KINDS = {"llama": (MixedEmbedding, MixedHead), "llama-tied-bias": (MixedEmbedding, SharedHead)}
KINDS |= {"gpt2": (MixedEmbedding, SharedHead), "opt": (MixedEmbedding, SharedHead)}
KINDS |= {"gpt-neox": (MixedEmbedding, MixedHead), "gemma3": (MixedEmbedding, SharedHead)}


@pytest.fixture
def ids(tmp_path):
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.randint(0, 60, (6, 16), generator=torch.Generator().manual_seed(0))}, path)
    return path


def size_of(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("family", KINDS)
def test_the_folder_takes_the_budget_and_computes_with_the_parts(family, make_model, ids, tmp_path):
    source = make_model(family)
    least = plan(source, "gptq", budget=Budget.of(size=10**7), **SETTINGS).reachable_bytes[0]
    size = least + (1500 if family == "gemma3" else 6000)  # its lookups, times 5.7, take all the bits there are
    result = bitquilt.quantize(source, "gptq", ids, tmp_path / "out", budget=Budget.of(size=size), **SETTINGS)
    assert result.report["logit_difference"] < 1e-5
    assert size_of(tmp_path / "out") == result.report["folder_bytes"] <= size
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (type(table), type(head)) == KINDS[family]
    assert len(table.parts) > 1, "all rows have one width: the test shows nothing"
    tokens = torch.tensor([[3, 1, 40], [4, 1, 2]])
    scale = lookup_scale(AutoModelForCausalLM.from_pretrained(source).get_input_embeddings())
    assert (scale == pytest.approx(32**0.5)) == (family == "gemma3")
    assert torch.equal(table(tokens), table.dequantize()[tokens] * scale)
    before = model(tokens).logits
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(tokens).logits, before)
    stored = json.loads((tmp_path / "out" / "plan.json").read_text())
    names = {name for name in result.report["layers"] if ".rows_" in name}
    assert {name.rpartition(".")[0] for name in names} == set(stored["tables"])


def test_a_plan_given_back_makes_the_same_bytes(make_model, ids, tmp_path):
    source, settings = make_model("llama"), {**SETTINGS}
    least = plan(source, "gptq", budget=Budget.of(size=10**7), **SETTINGS).reachable_bytes[0]
    bitquilt.quantize(source, "gptq", ids, tmp_path / "one", budget=Budget.of(size=least + 6000), **settings)
    settings.pop("group_size")
    bitquilt.quantize(source, None, ids, tmp_path / "two", plan=tmp_path / "one" / "plan.json", **settings)
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_killed_after_the_tables_it_continues_with_them(make_model, ids, tmp_path, monkeypatch):
    source = make_model("llama-tied-bias")
    least = plan(source, "gptq", budget=Budget.of(size=10**7), **SETTINGS).reachable_bytes[0]
    budget = Budget.of(size=least + 5000)
    bitquilt.quantize(source, "gptq", ids, tmp_path / "whole", budget=budget, **SETTINGS)

    def killed(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bitquilt.stream.loop.quantize_block", killed)
        with pytest.raises(KeyboardInterrupt):
            bitquilt.quantize(source, "gptq", ids, tmp_path / "out", budget=budget, **SETTINGS)
    table = tmp_path / "out.work" / "embedding.safetensors"
    before = table.stat().st_mtime_ns
    shutil.copyfile(table, tmp_path / "kept")
    result = bitquilt.quantize(source, "gptq", ids, tmp_path / "out", budget=budget, **SETTINGS)
    assert before
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (result.folder / file.name).read_bytes()


def test_what_is_fixed_or_kept_takes_no_part(make_model, ids, tmp_path):
    source = make_model("llama")
    big = Budget.of(size=10**7)
    both = plan(source, "gptq", budget=big, **SETTINGS)
    assert {path.rpartition(".")[0] for path in both.planned.layouts if ".rows_" in path} == {
        "lm_head",
        "model.embed_tokens",
    }
    kept = plan(source, "gptq", budget=big, keep_embedding=True, **SETTINGS)
    assert not kept.planned.table_rows
    assert kept.reachable_bytes[0] > both.reachable_bytes[0]
    fixed = plan(source, "gptq", budget=big, embedding_bits=4, **SETTINGS)
    assert set(fixed.planned.table_rows) == {"lm_head"}
    with pytest.raises(UserError, match="keep_embedding leaves"):
        plan(source, "gptq", budget=big, keep_embedding=True, embedding_bits=4, **SETTINGS)
    assert not plan(source, "gptq", budget=Budget.of(bpw=5.0), **SETTINGS).planned.table_rows


def test_bits_per_parameter_of_the_whole_folder(make_model, ids, tmp_path):
    source = make_model("llama-tied-bias")
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).parameters())
    least = plan(source, "gptq", budget=Budget.of(size=10**7), **SETTINGS).reachable_bytes[0]
    wanted = 8 * (least + 5000) / parameters
    budget = Budget.of(total_bpw=wanted)
    result = bitquilt.quantize(source, "gptq", ids, tmp_path / "out", budget=budget, **SETTINGS)
    spent = 8 * size_of(result.folder) / parameters
    assert 0.98 * wanted < spent <= wanted
    assert result.report["budget"]["spent"] == pytest.approx(spent)


def test_a_plan_for_other_rows_is_refused(make_model, ids, tmp_path):
    source = make_model("llama")
    least = plan(source, "gptq", budget=Budget.of(size=10**7), **SETTINGS).reachable_bytes[0]
    found = plan(source, "gptq", budget=Budget.of(size=least + 6000), **SETTINGS).plan_json()
    settings = {key: value for key, value in SETTINGS.items() if key != "group_size"}
    for change, message in (
        ({"model.embed_tokens": "22"}, "gives bits to 2 rows"),
        ({"model.nothing": "22"}, "not a table of this model"),
        ({"lm_head": "1" * 64}, "gives 1 bit"),
    ):
        (tmp_path / "plan.json").write_text(json.dumps({**found, "tables": change}))
        with pytest.raises(UserError, match=message):
            bitquilt.quantize(source, None, ids, tmp_path / "out", plan=tmp_path / "plan.json", **settings)


def test_sensitivities_without_rows_are_refused(make_model, ids, tmp_path):
    source, path = make_model("llama"), tmp_path / "x.sensitivities"
    bitquilt.measure_model(source, path, "gptq", ids, keep_embedding=True, **SETTINGS)
    with pytest.raises(UserError, match="--keep-embedding"):
        plan(source, "gptq", budget=Budget.of(size=10**7), sensitivities=path, **SETTINGS)
    bitquilt.measure_model(source, path, "gptq", ids, **SETTINGS)
    assert plan(source, "gptq", budget=Budget.of(size=10**7), sensitivities=path, **SETTINGS).planned.table_rows
