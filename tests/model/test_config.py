"""One reader of config.json: a file and a loaded model give the same answers, and the cache is transformers' own."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Mamba2Config, Mamba2ForCausalLM, PreTrainedModel

import bitquilt
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.config import config_of, read_config, read_layouts, with_quantization, without_quantization
from bitquilt.model.outline import open_outline

from ..conftest import FAMILIES

HEADS: dict[str, Any] = {"num_key_value_heads": 2, "num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2}
TOKEN = 2 * 2 * 2 * 8  # bytes of a layer's keys and values: two tensors in 16 bits, two heads of 8
CAUSAL = [family for family in FAMILIES if family != "bert"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_and_a_loaded_model_say_the_same(family: str, make_model: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(make_model(family))
    loaded = config_of(AutoModelForCausalLM.from_pretrained(checkpoint.folder) if family in CAUSAL else None)
    outlined = open_outline(checkpoint).config
    if family in CAUSAL:
        assert outlined == loaded
    assert outlined.hidden_size == 32
    assert outlined.vocabulary == 64
    assert outlined.context_length == 64
    assert len(outlined.windows) == 2


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_the_cache_is_as_large_as_the_one_transformers_fills(
    family: str, build_model: Callable[..., PreTrainedModel]
) -> None:
    """A windowed layer of transformers holds one token less: the next one is put there before it is read."""
    model = build_model(family)
    cache = DynamicCache(config=model.config)
    model(torch.arange(3, 23)[None], past_key_values=cache, use_cache=True)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))  # type: ignore[union-attr]
    config = config_of(model)
    missing = sum(window is not None for window in config.windows) * config.cache_bytes(1, 4) // len(config.windows)
    assert config.cache_bytes(20, 4) == held + missing


@pytest.mark.parametrize(
    ("own", "tokens"),
    [
        ({}, 200),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 10}, 110),
        ({"model_type": "mistral", "sliding_window": 10}, 20),
        ({"model_type": "mistral", "sliding_window": None}, 200),
        ({"model_type": "qwen2", "sliding_window": 10}, 200),
        ({"model_type": "qwen2", "sliding_window": 10, "use_sliding_window": True, "max_window_layers": 1}, 110),
    ],
)
def test_windows_bound_the_cache(own: dict[str, Any], tokens: int) -> None:
    assert read_config(HEADS | own).cache_bytes(100) == TOKEN * tokens
    assert read_config({"text_config": HEADS | own}).cache_bytes(100) == TOKEN * tokens


def test_older_names_of_the_sizes() -> None:
    config = read_config({"n_embd": 32, "n_head": 4, "n_layer": 3})
    assert (config.hidden_size, config.cache_bytes(7)) == (32, 2 * TOKEN * 3 * 7)


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 32}, 32),
        ({"max_seq_len": 16}, 16),
        ({"text_config": {"max_position_embeddings": 8}, "n_positions": 9}, 8),
        ({"max_position_embeddings": 0}, None),
        ({"max_position_embeddings": None, "n_positions": 5}, 5),
        ({"max_position_embeddings": "long"}, None),
        ({}, None),
    ],
)
def test_the_context_length(values: dict[str, Any], limit: int | None) -> None:
    assert read_config(values).context_length == limit


@pytest.mark.parametrize(
    ("entry", "tool"),
    [({"quant_method": "awq"}, "awq"), ({"bits": 4}, "unknown"), ("fp8", "fp8"), ({}, None), (None, None)],
)
def test_who_quantized_the_model(entry: object, tool: str | None) -> None:
    assert read_config({"quantization_config": entry}).quantized_by == tool
    with pytest.raises(UserError, match=f"names quantization method {tool!r}; wanted 'bitquilt'"):
        read_layouts({"quantization_config": entry})


def test_a_part_may_hold_the_entry() -> None:
    """Wrappers with a vision tower keep it in the config of their text part."""
    entry = {"quant_method": "awq", "bits": 4}
    values = {"model_type": "llava", "text_config": {"hidden_size": 8, "quantization_config": entry}}
    assert read_config(values).quantized_by == "awq"
    assert without_quantization(values) == {"model_type": "llava", "text_config": {"hidden_size": 8}}


def test_the_entry_is_written_and_read(make_quantized: Callable[..., Any]) -> None:
    config = open_checkpoint(make_quantized().folder).config
    plain = without_quantization(config)
    assert read_config(plain).quantized_by is None
    assert with_quantization(plain, read_layouts(config)) == config


@pytest.mark.parametrize("word", ['{"__float__": "Infinity"}', "Infinity"])  # transformers 5 and 4
def test_numbers_without_a_json_word_are_read_and_written_back_in_their_form(
    word: str, quantize_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    config = Mamba2Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=1,
        chunk_size=8,
        initializer_range=0.2,
    )
    source, out = tmp_path / "source", tmp_path / "out"
    Mamba2ForCausalLM(config).save_pretrained(source)
    values = json.loads((source / "config.json").read_text())
    values["time_step_limit"] = [0.0, json.loads(word)]
    (source / "config.json").write_text(json.dumps(values))
    result = quantize_tiny(source, out, "gptq")
    assert len(result.report["layers"]) == 4
    assert json.loads((out / "config.json").read_text())["time_step_limit"] == values["time_step_limit"]
    assert bitquilt.load(out).config.time_step_limit[1] == math.inf
