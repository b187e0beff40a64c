"""`bitquilt.quantize` and everything it refuses, each with a message that names the thing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import bitquilt
from bitquilt import Calibration, Result, Selection, UserError
from bitquilt.core.events import LayerDone, Stage
from bitquilt.core.plan_file import read_plan
from bitquilt.planning.planner import Planner
from bitquilt.recipes.gptq import GPTQ

MakeModel = Callable[..., Path]
Quantize = Callable[..., Result]
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    """A tiny Llama, to be changed."""
    shutil.copytree(make_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def with_tokenizer(folder: Path) -> Path:
    words = {"[UNK]": 0, **{f"w{i}": i for i in range(1, 64)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def change(folder: Path, name: str, edit: Callable[[Tensor], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def put(value: float, *index: int) -> Callable[[Tensor], object]:
    return lambda tensor: tensor.__setitem__(index, value)


def refused(
    quantize_tiny: Quantize, model: Any, out: Path, match: str, recipe: Any = "slim-llm", **options: Any
) -> list[Any]:
    """The events before the refusal; nothing may be left under the output's name."""
    seen: list[Any] = []
    with pytest.raises(UserError, match=match):
        quantize_tiny(model, out, recipe, observer=seen.append, **options)
    assert not out.exists()
    return seen


# What comes out


def test_the_report_says_what_was_done(make_quantized: Quantize, make_model: MakeModel, token_file: Path) -> None:
    result = make_quantized("llama", "slim-llm")
    report = json.loads((result.folder / "report.json").read_text())
    assert report == result.report
    assert report["format_version"] == 1
    assert report["fingerprint"]["recipe"]["name"] == "slim-llm"
    assert report["fingerprint"]["calibration"]["source"] == str(token_file)
    assert report["nominal_bits"] <= 3.0
    assert 3.0 < report["bpw"] < 6.0
    assert report["bytes"] == sum(path.stat().st_size for path in result.folder.glob("*.safetensors"))
    assert report["events"] == []
    for layer in report["layers"].values():
        assert 0 < layer["output_error"] < 0.5
        assert 0 < layer["weight_error"] < 0.5
    stored = sum(
        tensor.nbytes
        for file in result.folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if name.rpartition(".")[0] in report["layers"]
    )
    weights = sum(load_file(make_model() / "model.safetensors")[f"{name}.weight"].numel() for name in report["layers"])
    assert 8 * stored / weights == pytest.approx(report["bpw"])


def test_the_tokenizer_and_the_small_files_come_along(
    with_tokenizer: Path, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    result = quantize_tiny(with_tokenizer, tmp_path / "out", "rtn")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (result.folder / name).read_bytes() == (with_tokenizer / name).read_bytes()
    names = {path.name for path in result.folder.iterdir()}
    assert {"config.json", "plan.json", "report.json", "model.safetensors.index.json"} < names


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "slim-llm"])
@pytest.mark.parametrize("bits", [2, 8])
def test_more_bits_are_closer_and_every_width_loads(
    recipe: str, bits: int, make_model: MakeModel, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    result = quantize_tiny(make_model("gpt-neox"), tmp_path / "out", recipe, bits=bits, group_size=24)
    errors = [layer["weight_error"] for layer in result.report["layers"].values()]
    assert max(errors) < (0.6 if bits == 2 else 1e-4)
    assert result.report["nominal_bits"] <= bits
    assert bitquilt.load(result.folder)(torch.arange(4)[None]).logits.isfinite().all()


def test_a_group_wider_than_the_layer(make_model: MakeModel, quantize_tiny: Quantize, tmp_path: Path) -> None:
    result = quantize_tiny(make_model(), tmp_path / "out", group_size=128)
    assert {layer["bits"] for layer in result.report["layers"].values()} == {"3"}


def test_a_plan_is_followed(
    make_model: MakeModel, make_quantized: Quantize, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    plan = json.loads((make_quantized("llama").folder / "plan.json").read_text())
    for layer in plan["layers"].values():
        layer["bits"] = "2" * len(layer["bits"])
    plan["layers"][LAYER]["bits"] = "1458"
    plan["recipe"] = {}  # a map for any recipe: gptq stores one-bit groups otherwise than slim-llm
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    result = quantize_tiny(make_model(), tmp_path / "out", "gptq", plan=tmp_path / "plan.json")
    bits = {name: layer["bits"] for name, layer in result.report["layers"].items()}
    assert bits.pop(LAYER) == "1458"
    assert set("".join(bits.values())) == {"2"}
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["layers"] == plan["layers"]


def test_text_is_read_with_the_models_tokenizer(with_tokenizer: Path, quantize_tiny: Quantize, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{1 + i % 60}" for i in range(200)))
    result = quantize_tiny(with_tokenizer, tmp_path / "out", "gptq", calibration=tmp_path / "text.txt")
    assert result.report["fingerprint"]["calibration"]["samples"] == 6


# Groups of settings


def test_groups_of_settings_mean_what_single_keywords_mean(
    make_model: MakeModel, quantize_tiny: Quantize, token_file: Path, tmp_path: Path
) -> None:
    keywords = quantize_tiny(make_model(), tmp_path / "one", "rtn", skip=["*.down_proj"], embedding_bits=4, seed=3)
    grouped = bitquilt.quantize(
        make_model(),
        "rtn",
        Calibration(token_file, samples=6, seq_len=16),
        tmp_path / "other",
        selection=Selection(skip="*.down_proj"),
        embedding_bits=4,  # a single keyword changes one field of the group
        seed=3,
        bits=3,
        group_size=8,
    )
    assert grouped.report["fingerprint"] == keywords.report["fingerprint"]
    assert grouped.report["fingerprint"]["skip"] == ["*.down_proj"]
    planned = bitquilt.plan(make_model(), "rtn", selection=Selection(skip="*.down_proj"), embedding_bits=4, bits=3)
    assert planned.outer.embedding == 4
    assert not any("down_proj" in name for name in planned.planned.plans)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "samples is 0; wanted at least 1"),
        ({"self_samples": -1}, "self_samples is -1; wanted 0 or more"),
        (
            {"source": "self", "self_samples": 4},
            "self_samples is 4, but the model writes all of its calibration text already",
        ),
    ],
)
def test_calibrations_check_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Calibration(**fields)


def test_a_run_opens_one_planner_and_reads_its_plan_once(
    make_model: MakeModel, quantize_tiny: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Planner] = []
    opened = Planner.__init__

    def counted(self: Planner, *args: Any, **options: Any) -> None:
        made.append(self)
        opened(self, *args, **options)

    monkeypatch.setattr(Planner, "__init__", counted)
    first = quantize_tiny(make_model(), tmp_path / "one", bits=3.5)
    assert len(made) == 1
    file = read_plan(first.folder / "plan.json")
    (first.folder / "plan.json").unlink()
    again = quantize_tiny(make_model(), tmp_path / "two", None, plan=file)
    assert len(made) == 1
    assert again.report["fingerprint"]["plan"] == file.sha256
    assert read_plan(again.folder / "plan.json").plans == file.plans


# Things that are reported, not refused


def test_a_dead_input_channel_is_in_the_report(folder: Path, quantize_tiny: Quantize, tmp_path: Path) -> None:
    change(folder, "model.layers.1.input_layernorm.weight", put(0.0, 5))
    result = quantize_tiny(folder, tmp_path / "out")
    events = [(e["layer"], e["kind"], e["detail"]) for e in result.report["events"]]
    detail = "1 of 32 input channels saw only zeros"
    expected = [(f"model.layers.1.self_attn.{name}_proj", "dead channels", detail) for name in "qkv"]
    assert events == expected


@pytest.mark.parametrize("recipe", ["gptq", "slim-llm"])
def test_a_hessian_of_few_tokens_is_damped_and_says_so(
    recipe: str, make_model: MakeModel, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    """Two tokens for 32 channels: float32 cannot factor that with so little damp."""
    result = quantize_tiny(make_model(), tmp_path / "out", recipe, samples=1, seq_len=2, damp=1e-9)
    found = [e for e in result.report["events"] if e["kind"] == "hessian not positive definite"]
    assert {e["layer"] for e in found} == set(result.report["layers"])
    assert all("float64" in e["detail"] and "asked: 1e-09" in e["detail"] for e in found)


def test_long_sequences_are_clipped_with_a_notice(
    make_model: MakeModel, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    seen: list[Any] = []
    result = quantize_tiny(
        make_model(max_position_embeddings=8), tmp_path / "out", "gptq", seq_len=2048, observer=seen.append
    )
    assert isinstance(seen[0], Stage)
    assert "clipped from 2048 to the model's context of 8 tokens" in seen[0].text
    assert result.report["fingerprint"]["calibration"]["seq_len"] == 8


def test_a_recipe_without_data_reads_none(make_model: MakeModel, quantize_tiny: Quantize, tmp_path: Path) -> None:
    result = quantize_tiny(make_model(), tmp_path / "out", "rtn", calibration="/nothing.txt", seq_len=10**6)
    assert result.report["fingerprint"]["calibration"] is None
    assert all(layer["output_error"] is None for layer in result.report["layers"].values())


# Weights and activations


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "slim-llm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_names_its_layer(
    recipe: str, value: float, folder: Path, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    change(folder, "model.layers.1.self_attn.v_proj.weight", put(value, 3, 4))
    refused(
        quantize_tiny,
        folder,
        tmp_path / "out",
        r"model\.layers\.1\.self_attn\.v_proj: weight holds 1 NaN or Inf",
        recipe,
    )


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_a_norm_that_is_no_number_names_what_it_feeds(
    recipe: str, folder: Path, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    change(folder, "model.layers.1.post_attention_layernorm.weight", put(float("nan"), 3))
    refused(quantize_tiny, folder, tmp_path / "out", r"model\.layers\.1.*NaN or Inf", recipe)


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_an_embedding_that_is_no_number(recipe: str, folder: Path, quantize_tiny: Quantize, tmp_path: Path) -> None:
    change(folder, "model.embed_tokens.weight", lambda tensor: tensor.fill_(float("nan")))
    refused(quantize_tiny, folder, tmp_path / "out", r"model\.layers\.0.*NaN or Inf", recipe)


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "slim-llm"])
def test_activations_that_overflow_name_the_layer(
    recipe: str, folder: Path, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        change(folder, f"model.layers.0.mlp.{name}.weight", lambda tensor: tensor.mul_(1e25))
    refused(quantize_tiny, folder, tmp_path / "out", r"model\.layers\.0.*NaN or Inf", recipe)


def test_the_models_own_text_needs_a_healthy_model(folder: Path, quantize_tiny: Quantize, tmp_path: Path) -> None:
    change(folder, "lm_head.weight", put(float("nan"), 3, 3))
    refused(quantize_tiny, folder, tmp_path / "out", r"logits hold NaN or Inf", calibration="self")


# Models


def test_a_model_path_that_does_not_exist(quantize_tiny: Quantize, tmp_path: Path) -> None:
    refused(quantize_tiny, tmp_path / "nothing", tmp_path / "out", r"no folder at .*nothing")


def test_a_quantized_model_is_not_quantized_again(
    make_quantized: Quantize, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    refused(quantize_tiny, make_quantized().folder, tmp_path / "out", r"already quantized \(bitquilt\)")


def test_a_model_others_quantized(folder: Path, quantize_tiny: Quantize, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    refused(quantize_tiny, folder, tmp_path / "out", r"already quantized \(awq\); give the full-precision model")


def test_a_model_without_blocks(make_model: MakeModel, quantize_tiny: Quantize, tmp_path: Path) -> None:
    source = make_model("llama", num_hidden_layers=0)
    refused(quantize_tiny, source, tmp_path / "out", r"LlamaForCausalLM has no blocks .* nothing to quantize")


def test_every_layer_skipped(make_model: MakeModel, quantize_tiny: Quantize, tmp_path: Path) -> None:
    refused(quantize_tiny, make_model(), tmp_path / "out", r"every linear layer is skipped", skip=["*"])


def test_a_missing_tensor_costs_no_work(folder: Path, quantize_tiny: Quantize, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{LAYER}.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    seen = refused(quantize_tiny, folder, tmp_path / "out", rf"tensor {LAYER}\.weight is missing")
    assert not any(isinstance(event, LayerDone) for event in seen)
    assert not (tmp_path / "out.work").exists()


# Calibration


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"text\.txt is empty"),
        (b"w1 w2 w3", r"the text has 3 tokens; 6 windows of 16 need 96"),
        (b"w1 \xff\xfe w2", r"text\.txt is not text: byte 0xff at offset 3"),
        (b"   \n", r"text\.txt"),
    ],
)
def test_calibration_text_that_is_none(
    content: bytes, match: str, with_tokenizer: Path, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    seen = refused(quantize_tiny, with_tokenizer, tmp_path / "out", match, calibration=tmp_path / "text.txt")
    assert not any(isinstance(event, LayerDone) for event in seen)


def test_a_calibration_file_that_does_not_exist(with_tokenizer: Path, quantize_tiny: Quantize, tmp_path: Path) -> None:
    refused(
        quantize_tiny, with_tokenizer, tmp_path / "out", r"gone\.txt does not exist", calibration=tmp_path / "gone.txt"
    )


def test_text_without_a_tokenizer(folder: Path, quantize_tiny: Quantize, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text " * 100)
    refused(quantize_tiny, folder, tmp_path / "out", r"no tokenizer", calibration=tmp_path / "text.txt")


@pytest.mark.parametrize("worst", [64, -1])
def test_token_ids_outside_the_vocabulary(worst: int, folder: Path, quantize_tiny: Quantize, tmp_path: Path) -> None:
    ids = torch.full((6, 16), 5)
    ids[3, 3] = worst
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    match = r"ids\.safetensors gives token ids from .* to .*; wanted 0 to 63"
    refused(quantize_tiny, folder, tmp_path / "out", match, calibration=tmp_path / "ids.safetensors")


def test_a_corrected_file_may_follow_a_refused_one(
    with_tokenizer: Path, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    """A refusal must not leave a work directory that refuses the mended command."""
    text = tmp_path / "text.txt"
    text.write_text("w1 w2")
    refused(quantize_tiny, with_tokenizer, tmp_path / "out", r"the text has 2 tokens", calibration=text)
    assert not (tmp_path / "out.work").exists()
    text.write_text("w1 w2 " * 100)
    assert quantize_tiny(with_tokenizer, tmp_path / "out", "rtn", calibration=text).folder == tmp_path / "out"


# Options


@pytest.mark.parametrize(
    ("recipe", "options", "match"),
    [
        ("slim", {}, r"unknown recipe 'slim' \(did you mean 'slim-llm'\?\); known are rtn, gptq, slim-llm"),
        ("rtn", {"group": 8}, r"recipe rtn has no option 'group'"),
        ("slim-llm", {"grupsize": 8}, r"no option 'grupsize' \(did you mean 'group_size'\?\)"),
        ("rtn", {"bits": 1}, r"bits is 1; wanted a whole number from 2 to 8"),
        ("rtn", {"bits": 9}, r"bits is 9; wanted"),
        ("rtn", {"bits": "two"}, r"option 'bits': got 'two'"),
        ("gptq", {"group_size": 0}, r"group size is 0; wanted a positive multiple of 8"),
        ("gptq", {"group_size": -8}, r"group size is -8; wanted"),
        ("gptq", {"group_size": 12}, r"group size is 12; wanted"),
        ("gptq", {"damp": 0.0}, r"damp is 0\.0; wanted"),
        ("slim-llm", {"allocation": "greedy"}, r"option 'allocation': got 'greedy'"),
        ("rtn", {"published": True}, r"recipe rtn has no published variant"),
        ("rtn", {"samples": 0}, r"samples is 0; wanted at least 1"),
        ("rtn", {"seq_len": 0}, r"seq_len is 0; wanted at least 1"),
        ("rtn", {"batch_size": 0}, r"batch_size is 0; wanted at least 1"),
        (GPTQ(bits=3, group_size=8), {"damp": 0.1}, r"options \['damp'\] go with a recipe's name"),
    ],
)
def test_options_that_are_wrong(
    recipe: Any, options: dict[str, Any], match: str, make_model: MakeModel, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    assert refused(quantize_tiny, make_model(), tmp_path / "out", match, recipe, **options) == []
    assert not (tmp_path / "out.work").exists()


# Plans


def _plan(make_quantized: Quantize, path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    plan = json.loads((make_quantized("llama").folder / "plan.json").read_text())
    edit(plan)
    path.write_text(json.dumps(plan))
    return path


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda plan: plan["layers"].pop(LAYER), rf"plan.*no entry for {LAYER}"),
        (lambda plan: plan["layers"].update({"model.layers.7.mlp.up_proj": plan["layers"][LAYER]}), r"layers\.7"),
        (
            lambda plan: plan["layers"][LAYER].update(bits="33"),
            rf"{LAYER}.*2 groups of 8 columns for 32 inputs; wanted 4",
        ),
        (lambda plan: plan["layers"][LAYER].update(bits="3390"), rf"entry layers > {LAYER} > bits"),
        (lambda plan: plan["layers"][LAYER].update(group_size=12), rf"entry layers > {LAYER} > group_size"),
        (lambda plan: plan.pop("layers"), r"entry layers: Field required"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_the_work(
    edit: Callable[[dict[str, Any]], object],
    match: str,
    make_model: MakeModel,
    make_quantized: Quantize,
    quantize_tiny: Quantize,
    tmp_path: Path,
) -> None:
    path = _plan(make_quantized, tmp_path / "plan.json", edit)
    seen = refused(quantize_tiny, make_model(), tmp_path / "out", match, "gptq", plan=path)
    assert not any(isinstance(event, LayerDone) for event in seen)


def test_a_plan_that_is_missing_or_no_json(
    make_model: MakeModel, make_quantized: Quantize, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    refused(
        quantize_tiny, make_model(), tmp_path / "out", r"cannot read the plan .*gone\.json", plan=tmp_path / "gone.json"
    )
    (tmp_path / "plan.json").write_text("3 3 3")
    refused(quantize_tiny, make_model(), tmp_path / "out", r"plan\.json is not JSON", plan=tmp_path / "plan.json")
    with pytest.raises(UserError, match="cannot read the plan"):  # even where there is nothing left to do
        quantize_tiny(make_model(), make_quantized("llama").folder, plan=tmp_path / "gone.json")
