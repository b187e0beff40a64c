"""Wrappers of a language model and a vision tower: the language model's blocks are quantized, as they run on text."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import bitquilt
from bitquilt import Result, UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.structure import open_skeleton
from bitquilt.stream.block_calls import learn_calls
from tests.model.survey_models import MROPE, QWEN_TOKENS, QWEN_TOWER, TOWER

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
# name -> model type, fields of text config, vision config and the wrapper itself
WRAPPERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llava": ("llava", {"model_type": "llama"}, {**TOWER, "model_type": "clip_vision_model"}, {}),
    "gemma3": (
        "gemma3",
        {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
        {**TOWER, "model_type": "siglip_vision_model"},
        {"mm_tokens_per_image": 4, "boi_token_index": 62, "eoi_token_index": 61},
    ),
    "qwen2_5_vl": ("qwen2_5_vl", MROPE, {**QWEN_TOWER, "fullatt_block_indexes": [1]}, QWEN_TOKENS),
    "qwen3_vl": ("qwen3_vl", MROPE, {**QWEN_TOWER, "deepstack_visual_indexes": [0]}, QWEN_TOKENS),
    "mistral3": ("mistral3", {"model_type": "mistral"}, {**TOWER, "model_type": "pixtral", "head_dim": 8}, {}),
    "smolvlm": ("smolvlm", {"model_type": "llama"}, TOWER, {"image_token_id": 60, "scale_factor": 2}),
}
Folder = Callable[..., Path]


def wrapper(name: str, **vision: Any) -> transformers.PreTrainedModel:
    """A random wrapper in memory."""
    kind, text, own_vision, fields = WRAPPERS[name]
    fields = fields if "image_token_id" in fields else {**fields, "image_token_index": 60}
    config = transformers.AutoConfig.for_model(
        kind, text_config={**_TEXT, **text}, vision_config={**own_vision, **vision}, tie_word_embeddings=False, **fields
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=0.0 if key.endswith("bias") else 1.0, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """`(name, **vision fields)` -> a folder with such a wrapper, made once: read only."""
    made: dict[str, Path] = {}

    def make(name: str, **vision: Any) -> Path:
        key = repr((name, sorted(vision.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name) / name
            wrapper(name, **vision).save_pretrained(made[key])
        return made[key]

    return make


def text_logits(model: transformers.PreTrainedModel) -> Tensor:
    ids = torch.randint(3, 58, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def batches() -> Iterator[Tensor]:
    """Two batches of other tokens: what one leaves behind would reach the next."""
    for seed in (1, 2):
        yield torch.randint(3, 58, (2, 16), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_second_batch_is_computed_like_the_first(name: str, folder: Folder) -> None:
    """Its cache would double the keys of every layer: 139 % off on a LLaVA."""
    skeleton, full = open_skeleton(open_checkpoint(folder(name))), wrapper(name)
    with skeleton.resident(""):
        calls = learn_calls(skeleton, batches(), torch.device("cpu"))
        for ids in batches():
            hidden = calls.start(ids)
            for i, path in enumerate(skeleton.blocks):
                with skeleton.resident(path) as block:
                    hidden = calls.run(i, block, hidden)
            with torch.no_grad():
                torch.testing.assert_close(calls.finish(ids, hidden), full(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "recipe"), [*((name, "gptq") for name in WRAPPERS), ("gemma3", "quilt")])
def test_the_batch_size_changes_nothing(
    name: str, recipe: str, folder: Folder, quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    errors = {}
    for size in (1, 3, 8):
        result = quantize_tiny(folder(name), tmp_path / f"{size}", recipe, batch_size=size)
        assert result.report["logit_difference"] <= 1e-5
        layers = result.report["layers"].values()
        errors[size] = sum(layer["output_error"] for layer in layers) / len(layers)
    # sums in another order may flip a code, of a few hundred per layer
    assert errors[3] == pytest.approx(errors[1], rel=0.02)
    assert errors[8] == pytest.approx(errors[1], rel=0.02)


def test_an_argument_that_a_block_fills_is_refused_by_name(
    make_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    quantize_tiny: Callable[..., Result],
    tmp_path: Path,
) -> None:
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaModel.forward
    for number, (state, kind) in enumerate(
        ((transformers.DynamicCache(), "a DynamicCache"), ({}, "an empty dict"), ([[]], "an empty list"))
    ):

        def with_state(self: Any, input_ids: Tensor, *, given: Any = state, **kwargs: Any) -> Any:
            return forward(self, input_ids, memory=given, **kwargs)

        monkeypatch.setattr(modeling_llama.LlamaModel, "forward", with_state)
        with pytest.raises(UserError, match=rf"model\.layers\.0 receives 'memory', which holds {kind}"):
            quantize_tiny(make_model(), tmp_path / f"{number}")


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_quantized_wrapper_is_evaluated_and_saved_again(
    name: str, folder: Folder, quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    out = quantize_tiny(folder(name), tmp_path / "out", "rtn").folder
    model = bitquilt.load(out)
    assert type(model) is type(wrapper(name))
    text = torch.randint(5, 58, (200,), generator=torch.Generator().manual_seed(5))
    found = bitquilt.evaluate(str(out), text, seq_len=16, reference=str(folder(name)))
    assert found.perplexity == bitquilt.evaluate(model, text, seq_len=16).perplexity
    assert found.kl_mean is not None
    model.save_pretrained(tmp_path / "again")
    again = bitquilt.load(tmp_path / "again")
    assert torch.equal(text_logits(again), text_logits(model))
    assert bitquilt.evaluate(str(tmp_path / "again"), text, seq_len=16).perplexity == found.perplexity


@pytest.mark.parametrize("name", ["llava", "gemma3", "smolvlm"])
def test_a_tower_larger_than_the_language_model_is_listed_with_its_share(
    name: str, folder: Folder, quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    source = folder(name, hidden_size=128, intermediate_size=256)
    result = quantize_tiny(source, tmp_path / "out", "gptq")
    assert len(result.report["layers"]) == 14
    assert all("vision" not in layer for layer in result.report["layers"])
    tower = result.report["untouched"][0]
    share = tower["nbytes"] / open_checkpoint(source).nbytes
    assert "vision" in tower["reason"]
    assert tower["reason"].endswith(f", a tower with blocks of its own ({share:.0%} of the model)")
    assert share > 0.7


def test_the_blocks_are_those_that_are_asked_for(
    folder: Folder, make_model: Callable[..., Path], quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    source, asked = folder("llava"), "model.language_model.layers"
    result = quantize_tiny(source, tmp_path / "out", "gptq", blocks=asked)
    plain = quantize_tiny(source, tmp_path / "plain", "gptq")
    assert result.report["layers"].keys() == plain.report["layers"].keys()
    assert result.report["fingerprint"]["blocks"] == asked
    with pytest.raises(UserError, match=rf"blocks is 'layers'; the lists of blocks .*vision_tower.*{asked}"):
        quantize_tiny(source, tmp_path / "none", "gptq", blocks="layers")
    tower = next(n for n, m in wrapper("llava").named_modules() if isinstance(m, nn.ModuleList) and "vision" in n)
    with pytest.raises(UserError, match=r"does not call model\.vision_tower.* leave out --blocks"):
        quantize_tiny(source, tmp_path / "tower", "gptq", blocks=tower)
    found = bitquilt.plan(make_model(), "rtn", bits=3, blocks="model.layers")
    assert found.planned.layouts == bitquilt.plan(make_model(), "rtn", bits=3).planned.layouts
