"""Skeletons without transformers' model code: `open_outline` knows Llama-like models from names and shapes.

Importing that code takes three of the five seconds that a plan may take. Most models that are planned are built like
Llama and can be recognized from config.json and the names and shapes of their tensors: if exactly the tensors that the
config implies are there, the outline is the skeleton. Any other model is built and inspected.

An outline's modules are empty: they have names and sizes, and cannot be loaded or called.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from bitquilt.model.checkpoint import Checkpoint
from bitquilt.model.structure import Skeleton, open_skeleton


@dataclass(frozen=True)
class _Family:
    """Differences from Llama: biases of q, k and v; norms of q and k, with a `head_dim` of their own."""

    model_type: str
    qkv_bias: bool = False
    norms: bool = False


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama"),
    "MistralForCausalLM": _Family("mistral"),
    "Qwen2ForCausalLM": _Family("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": _Family("qwen3", norms=True),
}
# Numbers without which the shapes would rest on a default of transformers' own.
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_MOST = 2**31  # of any size; torch takes no matrix of more than 2^63 elements
# Settings that change what a layer is; if one is on, the model is built and inspected.
_STRANGE = ("attention_bias", "mlp_bias")


def open_outline(checkpoint: Checkpoint, blocks: str | None = None) -> Skeleton:
    """Return the skeleton of `checkpoint` for planning, which needs names and sizes only. Raises as `open_skeleton`."""
    checkpoint.refuse_undecodable()
    model = None if blocks is not None else _outline(checkpoint)
    if model is None:
        return open_skeleton(checkpoint, blocks=blocks)
    found = tuple(f"model.layers.{i}" for i in range(len(model.model.layers)))  # type: ignore[arg-type, union-attr]
    sources: dict[str, list[str]] = {path: [] for path in (*found, "")}
    for name in checkpoint.tensors:
        sources[".".join(name.split(".")[:3]) if name.startswith("model.layers.") else ""].append(name)
    names = {name: name for name in checkpoint.tensors}
    return Skeleton(cast(Any, model), checkpoint, checkpoint.model_config, found, sources, names)


class _Outline(nn.Module):
    """The part of a transformers model that planning needs: its modules, embedding and head, and ties."""

    config: Any
    all_tied_weights_keys: dict[str, str]

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule("model.embed_tokens")

    def get_output_embeddings(self) -> nn.Module:
        return self.get_submodule("lm_head")


def _outline(checkpoint: Checkpoint) -> _Outline | None:
    config = checkpoint.config
    name = next(iter(checkpoint.model_config.architectures), "")
    family = _FAMILIES.get(name)
    if family is None or config.get("model_type") != family.model_type or any(config.get(key) for key in _STRANGE):
        return None
    numbers = [config.get(key) for key in _NEEDED]
    size = config.get("head_dim")
    if not all(type(number) is int and 0 < number < _MOST for number in (*numbers, 1 if size is None else size)):
        return None
    vocabulary, width, inner, count, heads, shared = cast(list[int], numbers)
    if size is None and not family.norms and width % heads == 0:
        size = width // heads
    tied = config.get("tie_word_embeddings", False)
    if type(size) is not int or size <= 0 or heads % shared or type(tied) is not bool:
        return None
    block = _block(family, width, inner, heads * size, shared * size, size)
    model = cast(_Outline, type(name, (_Outline,), {})())
    members = {
        "embed_tokens": nn.Embedding.from_pretrained(_empty(vocabulary, width)),
        "layers": nn.ModuleList([block, *(copy.deepcopy(block) for _ in range(count - 1))]),
        "norm": _vector(width),
    }
    model.add_module("model", _module(members))
    model.add_module("lm_head", _linear(vocabulary, width))
    model.all_tied_weights_keys = {}
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr]
        model.all_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    model.config = SimpleNamespace(tie_word_embeddings=tied)
    wanted = {name: tuple(value.shape) for name, value in model.named_parameters()}
    found = {name: info.shape for name, info in checkpoint.tensors.items()}
    return model if found == wanted else None


def _block(family: _Family, width: int, inner: int, queries: int, keys: int, head: int) -> nn.Module:
    bias = family.qkv_bias
    attention: dict[str, nn.Module] = {
        "q_proj": _linear(queries, width, bias),
        "k_proj": _linear(keys, width, bias),
        "v_proj": _linear(keys, width, bias),
        "o_proj": _linear(width, queries),
    }
    if family.norms:
        attention |= {"q_norm": _vector(head), "k_norm": _vector(head)}
    mlp: dict[str, nn.Module] = {
        "gate_proj": _linear(inner, width),
        "up_proj": _linear(inner, width),
        "down_proj": _linear(width, inner),
    }
    members = {
        "self_attn": _module(attention),
        "mlp": _module(mlp),
        "input_layernorm": _vector(width),
        "post_attention_layernorm": _vector(width),
    }
    return _module(members)


def _module(members: Mapping[str, nn.Module]) -> nn.Module:
    found = nn.Module()
    for name, member in members.items():
        found.add_module(name, member)
    return found


def _linear(rows: int, width: int, bias: bool = False) -> nn.Linear:
    """An empty linear layer. nn.Linear would fill it with random numbers, on the meta device through Python code that
    takes a second to import."""
    found = nn.Linear(1, 1, bias)
    found.in_features, found.out_features = width, rows
    found.weight = _empty(rows, width)
    if bias:
        found.bias = _empty(rows)
    return found


def _vector(width: int) -> nn.Module:
    found = nn.Module()
    found.register_parameter("weight", _empty(width))
    return found


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
