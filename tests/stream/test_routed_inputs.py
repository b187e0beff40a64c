"""Statistics of experts against whole models in memory: routed tokens, thin experts, drift, one expert at a time."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import bitquilt
from bitquilt.core.types import LayerStats
from bitquilt.model.experts import SplitExperts, experts_of, split_experts
from bitquilt.recipes import make_recipe
from bitquilt.stream.calls.routed_inputs import PRIOR, ExpertStats, routed_inputs, shrunk
from bitquilt.stream.job import LoadedBlock
from tests.model.survey_models import survey_model
from tests.stream.watching import watching_recipe

Quantize = Callable[..., bitquilt.Result]
MakeModel = Callable[..., Path]
EXPERTS = "model.layers.1.mlp.experts"


def received(model: nn.Module, path: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the experts at `path` read, `[tokens, in]`, and which are chosen."""
    seen: list[tuple[Tensor, ...]] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0][0], seen[0][1]


def whole_models(source: Path, out: Path) -> tuple[nn.Module, nn.Module]:
    full = AutoModelForCausalLM.from_pretrained(source)
    split_experts(full)
    return full, AutoModelForCausalLM.from_pretrained(out)


def gram(x: Tensor) -> Tensor:
    return x.t() @ x


def test_an_expert_sees_its_tokens_and_a_share_of_all_others(
    make_model: MakeModel, quantize_tiny: Quantize, token_file: Path, tmp_path: Path
) -> None:
    source = make_model("qwen3-moe")
    recipe, measured = watching_recipe()
    quantize_tiny(source, tmp_path / "out", recipe)
    full, quantized = whole_models(source, tmp_path / "out")
    # the full-precision block reads what the quantized blocks before it return
    full.get_submodule("model.layers").__setitem__(0, quantized.get_submodule("model.layers.0"))
    x, chosen = received(full, EXPERTS, load_file(token_file)["input_ids"])
    experts = full.get_submodule(EXPERTS)
    assert isinstance(experts, SplitExperts)
    for i in range(4):
        own = x[(chosen == i).any(dim=1)]
        for kind, part, pool, extra in (
            ("gate_proj", own, x, PRIOR * 32),
            ("up_proj", own, x, PRIOR * 32),
            ("down_proj", experts.hidden(i, own), experts.hidden(i, x), PRIOR * 24),
        ):
            found = measured[f"{EXPERTS}.{i}.{kind}"]
            wanted = gram(part) + extra / len(pool) * gram(pool)  # all 96 tokens: fewer than are pooled at most
            torch.testing.assert_close(found.hessian, wanted, rtol=1e-3, atol=1e-4)
            assert found.tokens == len(own) + extra
            assert found.sample is not None
            torch.testing.assert_close(found.sample[: len(part)], part, rtol=1e-3, atol=1e-4)


def test_with_the_full_model_alongside_each_expert_sees_its_own_drift(
    make_model: MakeModel, quantize_tiny: Quantize, token_file: Path, tmp_path: Path
) -> None:
    source = make_model("qwen3-moe")
    recipe, measured = watching_recipe(alpha=0.5, stream_alpha=0.5)
    quantize_tiny(source, tmp_path / "out", recipe)
    full, quantized = whole_models(source, tmp_path / "out")
    ids = load_file(token_file)["input_ids"]
    (x, chosen), (y, _) = received(quantized, EXPERTS, ids), received(full, EXPERTS, ids)
    here, there = quantized.get_submodule(EXPERTS), full.get_submodule(EXPERTS)
    assert isinstance(here, SplitExperts)
    assert isinstance(there, SplitExperts)
    for i in range(4):
        mine = (chosen == i).any(dim=1)
        for kind, a, b, extra in (
            ("up_proj", x, y, PRIOR * 32),
            ("down_proj", here.hidden(i, x), there.hidden(i, y), PRIOR * 24),  # behind its quantized gate and up
        ):
            found, share = measured[f"{EXPERTS}.{i}.{kind}"], extra / len(x)
            torch.testing.assert_close(found.hessian, gram(a[mine]) + share * gram(a), rtol=1e-3, atol=1e-3)
            drift = (b - a)[mine].t() @ a[mine] + share * (b - a).t() @ a
            assert found.drift is not None
            torch.testing.assert_close(found.drift, drift, rtol=1e-2, atol=1e-2)
            assert float(drift.abs().max()) > 0.1


@pytest.mark.parametrize("recipe", ["gptq", "slim-llm", "quilt"])
def test_an_expert_without_tokens_is_solved_on_those_of_the_others_and_reported(
    recipe: str, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    model = survey_model("deepseek_v3")
    model.model.layers[1].mlp.gate.e_score_correction_bias[3] = -100.0  # never chosen
    model.save_pretrained(tmp_path / "source")
    result = quantize_tiny(tmp_path / "source", tmp_path / "out", recipe)
    events = [e for e in result.report["events"] if e["kind"] == "no calibration tokens"]
    unseen = [f"{EXPERTS}.3.{kind}" for kind in ("gate_proj", "up_proj", "down_proj")]
    assert [e["layer"] for e in events] == unseen
    assert all("other experts" in e["detail"] for e in events)
    others = [
        v["output_error"] for name, v in result.report["layers"].items() if ".experts." in name and name not in unseen
    ]
    assert len(others) == 9
    # on their pooled tokens they are about as well solved as the experts that those tokens belong to
    assert all(0 < result.report["layers"][name]["output_error"] < 2 * max(others) for name in unseen)


def test_shrinking_never_leaves_an_expert_to_its_few_tokens() -> None:
    one, many = torch.randn(1, 16), torch.randn(64, 16)
    own, pooled = LayerStats(gram(one), 1, one), LayerStats(gram(many), 64, many)
    found = shrunk(own, pooled)
    extra = round(PRIOR * 16)
    assert found.tokens == 1 + extra
    torch.testing.assert_close(found.hessian, gram(one) + extra / 64 * gram(many))
    assert int(torch.linalg.matrix_rank(found.hessian)) == 16
    assert found.sample is not None
    assert torch.equal(found.sample, torch.cat([one, many[: extra - 1]]))


def test_statistics_of_one_expert_are_in_memory_at_a_time(tmp_path: Path) -> None:
    model = survey_model("qwen3_moe")
    split_experts(model)
    path = "model.layers.0"
    block = model.get_submodule(path)
    layers = {f"{path}.mlp.experts.{name}" for name in experts_of(block)["mlp.experts"].expert_layers()}
    loaded = LoadedBlock(0, path, block, {name: model.get_submodule(name) for name in layers})
    ids = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), routed_inputs(tmp_path, block) as routed:
        for _ in routed.during([0]):
            model(input_ids=ids)
        stats = ExpertStats(loaded, routed, hessian=True, sample=8, device=torch.device("cpu"))
        assert set(stats) == layers
        first = stats[f"{path}.mlp.experts.0.up_proj"]
        assert stats[f"{path}.mlp.experts.0.gate_proj"] is first  # solved together: one factor
        gone = weakref.ref(first)
        del first
        assert gone() is not None
        assert stats[f"{path}.mlp.experts.1.down_proj"].hessian.shape == (24, 24)
        gc.collect()
        assert gone() is None
        assert list(tmp_path.glob(".experts-*"))
    assert not list(tmp_path.glob(".experts-*"))


@pytest.mark.parametrize("recipe", ["gptq", "quilt"])
def test_a_killed_run_over_experts_continues_to_the_same_bytes(
    recipe: str, make_model: MakeModel, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def kill(event: Any) -> None:
        if type(event).__name__ == "BlockDone":
            raise Killed

    source = make_model("mixtral")
    with pytest.raises(Killed):
        quantize_tiny(source, tmp_path / "out", recipe, work_dir=tmp_path / "work", observer=kill)
    quantize_tiny(source, tmp_path / "out", recipe, work_dir=tmp_path / "work")
    quantize_tiny(source, tmp_path / "once", recipe)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "once" / name).read_bytes() for name in files)


def test_every_expert_counts_as_if_one_average_token_more_had_come_to_it(tmp_path: Path) -> None:
    model = survey_model("qwen3_moe")
    split_experts(model)
    path = "model.layers.0"
    block = model.get_submodule(path)
    names = [f"{path}.mlp.experts.{name}" for name in experts_of(block)["mlp.experts"].expert_layers()]
    loaded = LoadedBlock(0, path, block, {name: model.get_submodule(name) for name in names})
    with torch.no_grad(), routed_inputs(tmp_path, block) as routed:
        for _ in routed.during([0]):
            # experts 0, 1 and 2 get four, one and one token, expert 3 none
            chosen = torch.tensor([[0, 1], [0, 2], [0, 4], [0, 4]])
            block.get_submodule("mlp.experts")(torch.randn(4, 32), chosen, torch.ones(4, 2))
        stats = ExpertStats(loaded, routed, hessian=True, sample=8, device=torch.device("cpu"))
        squares = {name: torch.tensor([6.0, 0.0]) for name in names if name.endswith(("0.up_proj", "1.up_proj"))}
        found = stats.smoothed(squares)
        assert found[f"{path}.mlp.experts.0.up_proj"].tolist() == [7.0, 1.0]  # a mean of 6 for 6 tokens
        assert found[f"{path}.mlp.experts.3.up_proj"].tolist() == [1.0, 1.0]
        assert f"{path}.mlp.experts.0.down_proj" not in found  # no gradient at all


def test_a_budget_gives_an_expert_bits_by_its_use(quantize_tiny: Quantize, tmp_path: Path) -> None:
    model = survey_model("deepseek_v3")
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    bias.copy_(torch.tensor([100.0, 0.0, 0.0, -100.0]))  # always, sometimes, sometimes, never
    model.save_pretrained(tmp_path / "source")
    budget = bitquilt.Budget.of(bpw=5.5)
    recipe = make_recipe("slim-llm", group_size=8)
    result = quantize_tiny(tmp_path / "source", tmp_path / "out", recipe, budget=budget)
    bits = [0.0] * 4
    for name, layer in result.report["layers"].items():
        if name.startswith(f"{EXPERTS}."):
            bits[int(name.split(".")[-2])] += sum(map(int, layer["bits"])) / len(layer["bits"]) / 3
    assert bits[0] >= max(bits[1:3]) > bits[3]
    assert bits[0] > min(bits[1:3])
    size = sum(path.stat().st_size for path in result.folder.iterdir())
    assert size == result.report["folder_bytes"]
