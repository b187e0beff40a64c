"""A model as llama.cpp knows it: `GgufModel` has the names, the order of rows and the settings of a GGUF file.

After llama.cpp's `convert_hf_to_gguf.py`. Names come from `gguf`'s own tensor map. Settings that llama.cpp does not
read from a file, and would compute with others instead, are refused by name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitquilt.core.json_files import read_json
from bitquilt.engines.engine import ModelSettings
from bitquilt.errors import UserError

_WINDOWED = "sliding_attention"
# model_type -> llama.cpp's architecture
ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "llama",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
# How text is cut before merging: the start of the tokenizer's pattern -> llama.cpp's name.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_CUTS = {_WORDS + "{1,3}|": "llama-bpe", _WORDS + "|": "qwen2"}
_NORMAL, _CONTROL, _USER, _UNUSED, _BYTE = 1, 3, 4, 5, 6  # llama.cpp's kinds of tokens


def library() -> Any:
    """Return the package `gguf`. Raises UserError where it is not installed."""
    try:
        return import_module("gguf")
    except ImportError:
        raise UserError("GGUF files need the package gguf; pip install 'bitquilt[gguf]'") from None


@dataclass(frozen=True)
class GgufModel:
    """`settings`: the model's own; `folder`: where its tokenizer is, if it has one."""

    settings: ModelSettings
    folder: Path

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """All entries of the config."""
        return {**self.settings.known, **self.settings.stated}

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the family."""
        return ARCHITECTURES[self.values["model_type"]]

    @property
    def _head_dim(self) -> int:
        values = self.values
        return int(values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"])

    @cached_property
    def _names(self) -> Any:
        gguf = library()
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        return gguf.get_tensor_name_map(arch, self.values["num_hidden_layers"])

    def name(self, tensor: str) -> str:
        """Return a tensor's name in the file. Raises UserError for one that llama.cpp does not have."""
        found = self._names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"llama.cpp has no tensor like {tensor} in {self.architecture} models")
        return str(found)

    def ordered(self, name: str, tensor: Tensor) -> Tensor:
        """Return `tensor` `[out, ...]`, named as in the source, with its rows in llama.cpp's order.

        Llama's rotary pairs are neighbours there, half a head apart in transformers.
        """
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if self.architecture != "llama" or heads is None:
            return tensor
        pairs = tensor.view(self.values[heads], 2, -1, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)

    def plain(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor that is not quantized as llama.cpp keeps it: vectors in fp32, Gemma's norms with their 1."""
        if tensor.dim() > 1:
            return self.ordered(name, tensor)
        shift = self.architecture.startswith("gemma") and name.endswith("norm.weight")
        return self.ordered(name, tensor.float() + 1 if shift else tensor.float())

    def write_settings(self, writer: Any) -> None:
        """Write everything but tensors. Raises UserError for settings that llama.cpp cannot be told about."""
        values = self.values
        writer.add_context_length(values["max_position_embeddings"])
        writer.add_embedding_length(values["hidden_size"])
        writer.add_block_count(values["num_hidden_layers"])
        writer.add_feed_forward_length(values["intermediate_size"])
        writer.add_head_count(values["num_attention_heads"])
        writer.add_head_count_kv(values.get("num_key_value_heads") or values["num_attention_heads"])
        writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
        writer.add_key_length(self._head_dim)
        writer.add_value_length(self._head_dim)
        writer.add_rope_dimension_count(self._head_dim)
        writer.add_vocab_size(values["vocab_size"])
        self._write_rotary(writer)
        self._write_attention(writer)
        self._write_tokenizer(writer)

    @property
    def _rotary(self) -> Mapping[str, Any]:
        nested: Mapping[str, Any] = self.values["rope_parameters"]
        return nested.get("full_attention", nested)  # Gemma 3 has a second one for windowed layers

    @cached_property
    def rotary_divisors(self) -> Tensor | None:
        """Divisors of the rotary frequencies, fp32 `[head_dim / 2]`, by the scaling of Llama 3.1; else None.

        Frequencies of fewer turns in the original context than `low_freq_factor` are divided by `factor`, those of more
        than `high_freq_factor` stay. llama.cpp reads the divisors as a tensor.
        """
        rope, size = self._rotary, self._head_dim
        if rope.get("rope_type") != "llama3":
            return None
        frequencies = float(rope["rope_theta"]) ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return (1 / ((1 - kept) / rope["factor"] + kept)).float()

    def _write_rotary(self, writer: Any) -> None:
        if _WINDOWED in self.values["rope_parameters"]:
            _require("rope_theta of windowed layers", self.values["rope_parameters"][_WINDOWED]["rope_theta"], 10000.0)
        nested = self._rotary
        kind = nested.get("rope_type", "default")
        if kind not in ("default", "linear", *(("llama3",) if self.architecture == "llama" else ())):
            raise UserError(f"its rope_type is {kind}; GGUF exports know default, linear and, for Llama, llama3")
        _require("partial_rotary_factor", nested.get("partial_rotary_factor") or 1.0, 1.0)
        writer.add_rope_freq_base(nested["rope_theta"])
        if kind == "linear":
            writer.add_rope_scaling_type(library().RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(nested["factor"])
        if self.architecture == "phi3":
            writer.add_rope_scaling_orig_ctx_len(self.values["original_max_position_embeddings"])

    def _write_attention(self, writer: Any) -> None:
        values, arch = self.values, self.architecture
        activation = values.get("hidden_activation") or values.get("hidden_act")
        _require("the activation", activation, "gelu_pytorch_tanh" if arch.startswith("gemma") else "silu")
        if arch == "phi3":
            writer.add_sliding_window(values.get("sliding_window") or 0)
        if not arch.startswith("gemma"):
            return
        _require("query_pre_attn_scalar", values["query_pre_attn_scalar"], self._head_dim)
        every = 2 if arch == "gemma2" else 6
        count = values["num_hidden_layers"]
        wanted = [_WINDOWED if (i + 1) % every else "full_attention" for i in range(count)]
        _require("layer_types", list(values.get("layer_types") or wanted), wanted)
        writer.add_sliding_window(values["sliding_window"])
        if arch == "gemma2":
            writer.add_attn_logit_softcapping(values["attn_logit_softcapping"])
            writer.add_final_logit_softcapping(values["final_logit_softcapping"])
        else:
            _require("final_logit_softcapping", values.get("final_logit_softcapping"), None)

    def _write_tokenizer(self, writer: Any) -> None:
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            writer.add_tokenizer_model("none")
            return
        stated = read_json(file)
        model = stated["model"]
        if model.get("type", "BPE") != "BPE":
            raise UserError(f"its tokenizer is of type {model['type']}; GGUF exports know BPE")
        if model.get("byte_fallback"):
            writer.add_tokenizer_model("llama")
            writer.add_tokenizer_pre("default")
        else:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(_cut(stated.get("pre_tokenizer") or {}))
        tokens, kinds = _tokens(stated, self.values["vocab_size"])
        writer.add_token_list(tokens)
        if model.get("byte_fallback"):
            writer.add_token_scores(_scores(model["merges"], tokens))
        writer.add_token_types(kinds)
        merged = not model.get("byte_fallback")
        special = library().SpecialVocab(self.folder, load_merges=merged, n_vocab=len(tokens))
        special.add_to_gguf(writer, quiet=True)


def _require(what: str, got: object, wanted: object) -> None:
    """Raise UserError where llama.cpp would compute with another value."""
    if got != wanted:
        raise UserError(f"{what} is {got}; llama.cpp knows {wanted} only")


def _cut(stated: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way a byte-level tokenizer cuts text. Raises UserError where it has none here."""
    parts = stated.get("pretokenizers") or [stated]
    patterns = [part["pattern"].get("Regex", "") for part in parts if part["type"] == "Split"]
    kinds = {part["type"] for part in parts}
    digits = any(part["type"] == "Digits" and part.get("individual_digits") for part in parts)
    if kinds <= {"Digits", "ByteLevel"} and "ByteLevel" in kinds:
        return "smollm" if digits else "gpt-2"
    for start, name in _CUTS.items():
        if len(patterns) == 1 and not digits and patterns[0].startswith(start):
            return name
    raise UserError(f"its tokenizer cuts text in a way that GGUF exports do not know: {patterns or sorted(kinds)}")


def _tokens(stated: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and kind of every token id."""
    found: dict[int, tuple[str, int]] = {}
    for text, token in stated["model"]["vocab"].items():
        byte = stated["model"].get("byte_fallback") and len(text) == 6 and text.startswith("<0x")
        found[token] = (text, _BYTE if byte else _NORMAL)
    for entry in stated.get("added_tokens", ()):
        found[entry["id"]] = (entry["content"], _CONTROL if entry["special"] else _USER)
    every = [found.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(max(size, max(found) + 1))]
    return [text for text, _ in every], [kind for _, kind in every]


def _scores(merges: list[Any], tokens: list[str]) -> list[float]:
    """Scores by which sentencepiece's algorithm makes these merges: the earlier, the higher."""
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ")), i)
    return [-float(rank.get(text, len(merges))) for text in tokens]


def array(tensor: Tensor) -> Any:
    """A tensor as `gguf` takes it: bfloat16 and blocks as bytes."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint8).numpy()
    return tensor.contiguous().numpy()
