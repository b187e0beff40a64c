"""Experts taken apart: the same function in every form that transformers stores, names, and what is refused."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitquilt
from bitquilt import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.experts import SplitExperts, expert_paths, experts_of, refuse_parts, split_experts
from bitquilt.model.linear import QuantizedLinear
from bitquilt.model.structure import open_skeleton
from tests.model.survey_models import survey_model

FORMS = ["qwen3_moe", "gpt_oss", "nemotron_h", "llama4_text"]  # plain; in turns with biases; no gate; sorted inputs


def first_experts(model: nn.Module) -> tuple[str, nn.Module]:
    """The first module of experts that transformers made."""
    return next((path, m) for path, m in model.named_modules() if type(m).__name__.endswith("Experts"))


def inputs_for(model: nn.Module, path: str, seen: list[tuple[Tensor, ...]]) -> None:
    """Keep what the module at `path` is called with."""
    model.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args))


@pytest.mark.parametrize("family", FORMS)
def test_split_experts_compute_what_transformers_computes(family: str) -> None:
    model, seen = survey_model(family), list[tuple[Tensor, ...]]()
    path, experts = first_experts(model)
    inputs_for(model, path, seen)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(input_ids=ids)
        expected = experts(*seen[0])
        for kind in ("down_proj", "gate_proj", "up_proj"):  # the other projections stay 3-D parameters
            half = copy.deepcopy(model)
            split_experts(half, {f"{path}.0.{kind}"})
            torch.testing.assert_close(half.get_submodule(path)(*seen[0]), expected, rtol=1e-5, atol=1e-6)
        split_experts(model)
        split = model.get_submodule(path)
        assert isinstance(split, SplitExperts)
        torch.testing.assert_close(split(*seen[0]), expected, rtol=1e-5, atol=1e-6)
        kinds = {"gate_proj", "up_proj", "down_proj"} - ({"gate_proj"} if family == "nemotron_h" else set())
        assert set(split.expert_layers()) == {f"{i}.{kind}" for i in range(4) for kind in kinds}
        assert [name for name, p in split.named_parameters() if p.dim() == 3] == []


def test_an_expert_is_named_as_checkpoints_store_it_and_holds_that_weight(make_model: Callable[..., Path]) -> None:
    source = make_model("qwen3-moe")
    skeleton = open_skeleton(open_checkpoint(source))
    stored = skeleton.checkpoint.tensors
    block = skeleton.blocks[1]
    with skeleton.resident(block) as module:
        paths = expert_paths(module)
        assert paths == {
            name.removeprefix(f"{block}.").removesuffix(".weight")
            for name in stored
            if name.startswith(f"{block}.mlp.experts.")
        }
        for path in paths:
            own = skeleton.checkpoint.read([f"{block}.{path}.weight"])[f"{block}.{path}.weight"]
            assert torch.equal(module.get_submodule(path).weight, own.float())
    assert all(p.is_meta for p in skeleton.model.get_submodule(block).parameters())


def test_a_projection_can_stay_in_16_bits_for_all_experts_of_a_block(
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    read_tensors: Callable[[Path], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    source = make_model("qwen3-moe")
    result = quantize_tiny(source, tmp_path / "out", "gptq", skip=["*.experts.*.down_proj"])
    model = bitquilt.load(result.folder)
    quantized = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert any(name.endswith("experts.3.up_proj") for name in quantized)
    assert not any("experts" in name and "down" in name for name in quantized)
    before, after = read_tensors(source), read_tensors(result.folder)
    kept = [name for name in before if ".experts." in name and "down" in name]
    assert len(kept) == 4
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert result.report["logit_difference"] <= 1e-5
    skipped = next(item for item in result.report["untouched"] if item["reason"] == "skipped on request")
    assert skipped["tensors"] == len(kept)
    (experts,) = experts_of(model).values()
    assert experts.down_proj.shape == (4, 32, 24)


def test_a_part_of_the_experts_cannot_stay_in_16_bits(make_model: Callable[..., Path]) -> None:
    skeleton = open_skeleton(open_checkpoint(make_model("qwen3-moe")))
    path = skeleton.blocks[1]
    block = skeleton.model.get_submodule(path)
    layers = expert_paths(block)
    refuse_parts(block, path, layers)
    refuse_parts(block, path, set())
    wanted = r"leaves out .*experts\.2\.up_proj.*give --skip 'model.*\.experts\.\*\.gate_proj' and --skip '.*up_proj'"
    with pytest.raises(UserError, match=wanted):
        refuse_parts(block, path, layers - {"mlp.experts.2.up_proj"})


def test_copies_and_pickles_of_a_quantized_model_compute_the_same(
    make_quantized: Callable[..., bitquilt.Result],
) -> None:
    model = bitquilt.load(make_quantized("mixtral", "rtn").folder)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, model(input_ids=ids).logits)
