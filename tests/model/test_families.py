"""Every family of models, from its config class to logits of the reloaded quantized checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from bitquilt import Result
from bitquilt.core.events import Started
from bitquilt.model.experts import split_experts
from bitquilt.model.linear import QuantizedLinear
from bitquilt.model.structure import gates
from tests.conftest import FAMILIES
from tests.model.survey_models import survey_model

CASES = [(family, "rtn") for family in FAMILIES]  # all recipes on all of them: tests/recipes/test_everywhere.py
BLOCKS = (".layers.", ".layer.", ".h.")
SHORTEST = ["llama", "phi3", "gpt2", "bert"]

Quantize = Callable[..., Result]


def load(folder: Path, **options: Any) -> PreTrainedModel:
    encoder = json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    model: PreTrainedModel = (AutoModelForMaskedLM if encoder else AutoModelForCausalLM).from_pretrained(
        folder, **options
    )
    split_experts(model)  # experts are quantized as layers of their own
    return model


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def linear_names(model: nn.Module) -> set[str]:
    """What must be quantized, found without the library: plain linear layers of the repeated blocks."""
    return {
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and any(part in f".{name}" for part in BLOCKS)
    }


def with_quantized_weights(source: Path, quantized: PreTrainedModel) -> PreTrainedModel:
    """The full-precision model computing with the weights the quantized one says it has."""
    model = load(source, dtype=quantized.dtype)
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            target = model.get_submodule(name)
            weight = module.dequantize()
            target.weight.data = (weight.t() if isinstance(target, Conv1D) else weight).to(quantized.dtype)
    return model


def same_bytes(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(("family", "recipe"), CASES)
def test_the_reloaded_model_computes_with_the_quantized_weights(
    family: str,
    recipe: str,
    make_model: Callable[..., Path],
    make_quantized: Quantize,
    read_tensors: Callable[[Path], dict[str, Tensor]],
) -> None:
    source, result = make_model(family), make_quantized(family, recipe)
    quantized, full = load(result.folder), load(source)
    wanted = linear_names(full)
    assert len(wanted) >= 8
    assert {n for n, m in quantized.named_modules() if isinstance(m, QuantizedLinear)} == wanted
    assert set(result.report["layers"]) == wanted
    assert not linear_names(quantized)

    expected = logits(with_quantized_weights(source, quantized))
    torch.testing.assert_close(logits(quantized), expected, rtol=1e-5, atol=1e-5)
    assert float((expected - logits(full)).abs().max()) > 1e-3  # three bits do change the model
    assert result.report["logit_difference"] <= 1e-5

    before = {own_name(name): tensor for name, tensor in read_tensors(source).items()}
    after = {own_name(name): tensor for name, tensor in read_tensors(result.folder).items()}
    prefix = full.base_model_prefix
    replaced = {f"{name}.weight" for name in wanted}
    replaced |= {name.removeprefix(f"{prefix}.") for name in replaced}
    kept = before.keys() - replaced
    assert len(kept) == len(before) - len(wanted)
    assert all(same_bytes(before[name], after[name]) for name in kept)
    assert not replaced & after.keys()
    index = json.loads((result.folder / "model.safetensors.index.json").read_text())
    assert {own_name(name) for name in index["weight_map"]} == set(after)


def own_name(name: str) -> str:
    """The model's own name for Mixtral's, in which experts have w1, w3 and w2."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    for old, new in {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.items():
        name = name.replace(f".{old}.weight", f".{new}.weight")
    return name


def test_experts_that_are_not_taken_apart_stay_in_16_bits_and_the_run_says_so_before_it_starts(
    quantize_tiny: Quantize, read_tensors: Callable[[Path], dict[str, Tensor]], tmp_path: Path
) -> None:
    source, seen = tmp_path / "source", []
    survey_model("dbrx").to(torch.bfloat16).save_pretrained(source)
    result = quantize_tiny(source, tmp_path / "out", "rtn", observer=seen.append)
    started = next(event for event in seen if isinstance(event, Started))
    assert not any("block" in type(event).__name__.lower() for event in seen[: seen.index(started)])
    experts = {name: t for name, t in read_tensors(source).items() if ".experts." in name}
    named = next(item for item in started.untouched if "expert" in item.reason)
    assert "DbrxExpertGLU" in named.reason
    assert "% of the model" in named.reason
    assert named.tensors == len(experts)
    assert named.nbytes == sum(t.nbytes for t in experts.values())
    assert named.example in experts
    assert any("expert" in item["reason"] for item in result.report["untouched"])
    after = read_tensors(result.folder)
    assert all(after[name].dtype == torch.bfloat16 for name in experts)
    total = sum(t.nbytes for t in read_tensors(source).values())
    assert started.total_bytes == total
    quantized = sum(
        t.nbytes for n, t in read_tensors(source).items() if n.removesuffix(".weight") in result.report["layers"]
    )
    assert sum(item.nbytes for item in started.untouched) == total - quantized


def test_gates_and_tiny_layers_stay_in_16_bits_and_are_listed(
    quantize_tiny: Quantize, read_tensors: Callable[[Path], dict[str, Tensor]], tmp_path: Path
) -> None:
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=48,
        decoder_sparse_step=1,
        initializer_range=0.2,
    )
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "source")
    result = quantize_tiny(tmp_path / "source", tmp_path / "out", "gptq")
    gates = [f"model.layers.{i}.mlp.shared_expert_gate.weight" for i in range(2)]
    before, after = read_tensors(tmp_path / "source"), read_tensors(result.folder)
    assert all(same_bytes(before[name], after[name]) for name in gates)
    # attention, the shared expert and 4 experts; keys of 512 weights are no gates
    assert len(result.report["layers"]) == 2 * (7 + 4 * 3)
    listed = next(item for item in result.report["untouched"] if "gates" in item["reason"])
    assert (listed["tensors"], listed["example"]) == (2, gates[0])


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ({"up": (512, 512), "gate": (8, 512), "gate_proj": (8, 512)}, {"gate"}),
        ({"up": (512, 512), "router.layer": (8, 512), "gate": (512, 512)}, {"router.layer"}),
        ({"up": (512, 512), "dt": (31, 32), "dt_proj": (32, 32)}, {"dt"}),
        ({"up": (48, 32), "k_proj": (16, 32)}, set()),  # a small model, not a small layer
        ({"up": (8, 4), "one": (1, 4)}, {"one"}),
    ],
)
def test_which_layers_are_gates(layers: dict[str, tuple[int, int]], kept: set[str]) -> None:
    made = {name: nn.Linear(width, rows, device="meta") for name, (rows, width) in layers.items()}
    assert gates(made) == kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-tied-bias", "gpt2"])
def test_half_precision_sources(
    family: str, dtype: torch.dtype, make_model: Callable[..., Path], quantize_tiny: Quantize, tmp_path: Path
) -> None:
    source = make_model(family, dtype=dtype)
    quantize_tiny(source, tmp_path / "out")
    quantized = load(tmp_path / "out")
    assert quantized.dtype == dtype
    assert torch.equal(logits(quantized), logits(with_quantized_weights(source, quantized)))


@pytest.mark.parametrize("family", ["llama-tied-bias", "phi3", "mixtral"])
def test_a_sharded_source_gives_the_same_checkpoint(
    family: str,
    build_model: Callable[..., PreTrainedModel],
    make_quantized: Quantize,
    quantize_tiny: Quantize,
    read_tensors: Callable[[Path], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    build_model(family).save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    quantize_tiny(tmp_path / "sharded", tmp_path / "out")
    one, other = read_tensors(tmp_path / "out"), read_tensors(make_quantized(family).folder)
    assert one.keys() == other.keys()
    assert all(same_bytes(one[name], other[name]) for name in one)


@pytest.mark.parametrize("recipe", ["rtn", "slim-llm"])
def test_gpt2_checkpoints_without_the_models_prefix(
    recipe: str,
    make_model: Callable[..., Path],
    quantize_tiny: Quantize,
    make_quantized: Quantize,
    tmp_path: Path,
) -> None:
    """The oldest GPT-2 files name their tensors `h.0.attn...`, not `transformer.h.0.attn...`."""
    source = tmp_path / "source"
    shutil.copytree(make_model("gpt2"), source)
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    result = quantize_tiny(source, tmp_path / "out", recipe)
    assert result.report["layers"].keys() == make_quantized("gpt2", recipe).report["layers"].keys()
    expected = logits(load(make_quantized("gpt2", recipe).folder))
    assert torch.equal(logits(load(result.folder)), expected)


def test_tensors_the_model_does_not_know_survive(
    make_model: Callable[..., Path],
    quantize_tiny: Quantize,
    make_quantized: Quantize,
    read_tensors: Callable[[Path], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(make_model("llama"), source)
    extra = {
        "value_head.weight": torch.randn(3, 5).to(torch.bfloat16),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.randn(4, dtype=torch.float64),
        "model.layers.0.adapter.weight": torch.randint(-9, 9, (7,), dtype=torch.int8),
        "model.layers.9.mlp.up_proj.weight": torch.randn(4, 4),
        "steps": torch.tensor(12),
    }
    save_file({**load_file(source / "model.safetensors"), **extra}, source / "model.safetensors", {"format": "pt"})
    result = quantize_tiny(source, tmp_path / "out")
    after = read_tensors(result.folder)
    assert all(same_bytes(after[name], tensor) for name, tensor in extra.items())
    assert {f"{name}" for name in result.report["layers"]} == set(make_quantized("llama").report["layers"])
    unknown = next(item for item in result.report["untouched"] if "not part" in item["reason"])
    assert unknown["tensors"] == len(extra)
    assert torch.equal(logits(load(result.folder)), logits(load(make_quantized("llama").folder)))


@pytest.mark.parametrize("family", SHORTEST)
def test_skipped_layers_stay_as_they_are(
    family: str,
    make_model: Callable[..., Path],
    quantize_tiny: Quantize,
    read_tensors: Callable[[Path], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    source = make_model(family)
    names = linear_names(load(source))
    first = min(names)
    result = quantize_tiny(source, tmp_path / "out", "rtn", skip=[first])
    assert set(result.report["layers"]) == names - {first}
    skipped = next(item for item in result.report["untouched"] if "skipped" in item["reason"])
    assert skipped["tensors"] == 1
    before, after = read_tensors(source), read_tensors(result.folder)
    assert same_bytes(before[skipped["example"]], after[skipped["example"]])
    quantized = load(result.folder)
    torch.testing.assert_close(logits(quantized), logits(with_quantized_weights(source, quantized)))
