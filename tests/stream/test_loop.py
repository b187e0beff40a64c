"""The loop against the whole model in memory: same activations, same statistics, whatever the batch size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

import bitquilt
from bitquilt import UserError
from bitquilt.core.events import BlockDone, LayerDone, Stage, Started
from bitquilt.core.recipe import Needs
from bitquilt.core.types import Layer, LayerPlan, LayerStats, Solution
from bitquilt.data.calibration import load_tokenizer
from bitquilt.data.tokens import token_stream
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.experts import split_experts
from bitquilt.model.linear import QuantizedLinear
from bitquilt.model.structure import open_skeleton
from bitquilt.recipes.gptq import GPTQ
from bitquilt.stream.writer import streamed_logits

FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi3",
    "opt",
    "opt-projected",
    "gpt2",
    "gpt-neox",
    "olmo2",
    "mixtral",
    "qwen3-moe",
    "bert",
]


def watching_recipe() -> tuple[GPTQ, dict[str, LayerStats]]:
    """GPTQ, and the statistics it is handed, by layer."""
    seen: dict[str, LayerStats] = {}

    class Watching(GPTQ):
        needs: ClassVar[Needs] = Needs(hessian=True, sample=True)

        def quantize(self, layer: Layer, plan: LayerPlan, prepared: Any) -> Solution:
            assert layer.stats is not None
            seen[layer.name] = layer.stats
            return super().quantize(layer, plan, prepared)

    return Watching(bits=3, group_size=8), seen


def _inputs_of(model: nn.Module, names: set[str], ids: Tensor) -> dict[str, Tensor]:
    """What each layer reads in one ordinary forward pass, `[tokens, in]`."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, args: seen.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]).clone())

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_block_by_block_is_the_models_forward_pass(family: str, make_model: Callable[..., Path]) -> None:
    folder = make_model(family)
    kind = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = kind.from_pretrained(folder)(input_ids=ids).logits
    torch.testing.assert_close(streamed_logits(open_skeleton(open_checkpoint(folder)), ids), expected)


@pytest.mark.parametrize("family", ["mistral", "gpt2", "mixtral"])
def test_a_block_is_measured_in_full_precision_on_the_quantized_blocks_outputs(
    family: str,
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    token_file: Path,
    tmp_path: Path,
) -> None:
    recipe, measured = watching_recipe()
    quantize_tiny(make_model(family), tmp_path / "out", recipe, batch_size=4)
    ids = _calibration_ids(token_file)
    full = AutoModelForCausalLM.from_pretrained(make_model(family))
    split_experts(full)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    by_block: dict[str, set[str]] = {}
    for name in measured:
        by_block.setdefault(".".join(name.split(".")[:3]), set()).add(name)
    assert len(by_block) == 2
    for names in by_block.values():
        # experts: tests/stream/test_routed_inputs.py
        for name, x in _inputs_of(full, {name for name in names if ".experts." not in name}, ids).items():
            stats = measured[name]
            assert stats.tokens == len(x)
            torch.testing.assert_close(stats.hessian, x.t() @ x, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(stats.sample, x, rtol=1e-4, atol=1e-4)
        for name in names:  # from here on the model computes with this block quantized
            module, target = quantized.get_submodule(name), full.get_submodule(name)
            assert isinstance(module, QuantizedLinear)
            target.weight.data = module.dequantize().t() if isinstance(target, Conv1D) else module.dequantize()


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_the_batch_size_does_not_change_the_result(
    family: str,
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    read_tensors: Callable[[Path], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    runs: dict[int, dict[str, LayerStats]] = {}
    for size in (1, 4, 8):  # six samples: 4 leaves a smaller last batch, 8 is more than there are
        recipe, runs[size] = watching_recipe()
        quantize_tiny(make_model(family), tmp_path / f"{size}", recipe, batch_size=size)
    first = runs[1]
    for size in (4, 8):
        for name, stats in runs[size].items():
            scale = float(first[name].hessian.abs().max())
            assert float((stats.hessian - first[name].hessian).abs().max()) < 1e-5 * scale
            assert stats.sample is not None
            loudest = float(first[name].sample.abs().max())  # rounding errors are as large as the sums they come from
            torch.testing.assert_close(stats.sample, first[name].sample, rtol=1e-4, atol=1e-5 * loudest)
        one, other = read_tensors(tmp_path / "1"), read_tensors(tmp_path / f"{size}")
        assert one.keys() == other.keys()
        codes = [name for name in one if ".codes_" in name]
        assert all(torch.equal(one[name], other[name]) for name in codes)


def test_the_same_run_twice_gives_the_same_bytes_and_leaves_the_global_generator_alone(
    make_model: Callable[..., Path], quantize_tiny: Callable[..., bitquilt.Result], tmp_path: Path
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name in ("one", "other"):
        quantize_tiny(make_model(), tmp_path / name, calibration="self", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    files = sorted(p.name for p in (tmp_path / "one").iterdir() if p.name != "report.json")
    assert {"config.json", "plan.json", "model.safetensors.index.json"} < set(files)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


def test_the_observer_hears_every_stage_layer_and_block_in_order(
    make_model: Callable[..., Path], quantize_tiny: Callable[..., bitquilt.Result], tmp_path: Path
) -> None:
    seen: list[Any] = []
    result = quantize_tiny(make_model(), tmp_path / "out", observer=seen.append)
    assert [e.layer for e in seen if isinstance(e, LayerDone)] == list(result.report["layers"])
    assert [(e.block, e.blocks) for e in seen if isinstance(e, BlockDone)] == [(0, 2), (1, 2)]
    started = [e for e in seen if isinstance(e, Started)]
    assert [(e.blocks, e.done, e.layers) for e in started] == [(2, 0, 14)]
    assert all(isinstance(e, Stage) for e in seen[: seen.index(started[0])])


def test_a_model_whose_context_is_shorter_than_the_probe(
    make_model: Callable[..., Path], quantize_tiny: Callable[..., bitquilt.Result], tmp_path: Path
) -> None:
    """Learned positions end at the context: GPT-2 would read past its table."""
    seen: list[Any] = []
    result = quantize_tiny(
        make_model("gpt2", n_positions=12), tmp_path / "out", "gptq", samples=4, observer=seen.append
    )
    assert result.report["fingerprint"]["calibration"]["seq_len"] == 12
    assert any("clipped from 16 to the model's context of 12" in e.text for e in seen if isinstance(e, Stage))


def test_a_block_that_reads_a_sum_over_tokens_is_refused(
    make_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    quantize_tiny: Callable[..., bitquilt.Result],
) -> None:
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaModel.forward

    def with_tokens(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        return forward(self, input_ids, per_layer=input_ids.float().sum(), **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", with_tokens)
    with pytest.raises(UserError, match=r"model\.layers\.0.*'per_layer'.*cannot be streamed"):
        quantize_tiny(make_model(), tmp_path / "out")


def test_a_model_that_calls_its_blocks_more_than_once_is_refused(
    quantize_tiny: Callable[..., bitquilt.Result], tmp_path: Path
) -> None:
    """ALBERT has one block and runs it three times: statistics of its first call would be those of one in three."""
    config = AlbertConfig(
        vocab_size=64,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    AlbertForMaskedLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"AlbertForMaskedLM does not go once .* it calls \[0, 0, 0\]"):
        quantize_tiny(tmp_path / "model", tmp_path / "out")


def test_layers_that_no_token_reaches_are_quantized_and_reported(
    make_model: Callable[..., Path], quantize_tiny: Callable[..., bitquilt.Result], tmp_path: Path
) -> None:
    """A decoder built for cross-attention never calls it without an encoder."""
    source = make_model("gpt2", add_cross_attention=True)
    result = quantize_tiny(source, tmp_path / "out", "gptq")
    unseen = {event["layer"] for event in result.report["events"] if event["kind"] == "no calibration tokens"}
    assert unseen == {name for name in result.report["layers"] if ".crossattention." in name}
    assert len(unseen) == 6
    assert all(result.report["layers"][name]["output_error"] is None for name in unseen)


@pytest.mark.parametrize("kind", ["encoder-decoder", "pixels"])
def test_models_that_do_not_run_on_token_ids_are_refused(
    kind: str, quantize_tiny: Callable[..., bitquilt.Result], tmp_path: Path
) -> None:
    if kind == "pixels":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))
        match = r"ViTForImageClassification has no table of token embeddings"
    else:
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        )
        match = r"T5ForConditionalGeneration does not run on token ids alone"
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=match):
        quantize_tiny(tmp_path / "model", tmp_path / "out")


def _calibration_ids(token_file: Path) -> Tensor:
    tokens = token_stream(token_file, load_tokenizer(token_file.parent))
    return tokens.view(6, 16)  # as many tokens as the samples need: every window is used, in order
