"""Checks that a model is built like Llama: `llama_base` and `layer_products` return its parts or raise ValueError.

The build is RMS norms before attention and MLP, rotary positions, grouped attention without a window, and a gated MLP
with SiLU. The modules decide, not a list of families. A model that looks the same may compute
something else, so `agrees` compares a decoder's first logits with those of `read_prompt`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from bitquilt.model.replace import lookup
from bitquilt.ops.decoder_ops import AttentionShape, HeadNorms

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
_BLOCK = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_MODEL = {"embed_tokens", "layers", "norm", "rotary_emb"}
_ROPES = {"default", "linear", "llama3", "yarn"}  # whose angles do not depend on the length of the text
# Relative distance of the logits that is still rounding: measured on a random 1.1B Llama 0.006 in bf16, 1e-6 in fp32.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class LayerProducts(NamedTuple):
    """The linear layers of one block."""

    q: Any
    k: Any
    v: Any
    o: Any
    gate: Any
    up: Any
    down: Any


def llama_base(model: Any) -> Any:
    """Return the model without its head. ValueError: it is built otherwise; the message says where."""
    config, base = model.config, getattr(model, "model", None)
    require(base is not None and _names(base) == _MODEL, "it is built otherwise")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    require(window is None, "its attention has a window")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    require(rope in _ROPES, f"its positions are of type {rope}")
    return base


def layer_products(layer: Any) -> LayerProducts:
    """Return the linear layers of one block. ValueError: the block has other modules."""
    attention, mlp = layer.self_attn, layer.mlp
    _require_children(layer, _BLOCK)
    _require_children(attention, _ATTENTION, _HEAD_NORMS)
    _require_children(mlp, _MLP, {"act_fn"})
    require(isinstance(mlp.act_fn, nn.SiLU) or type(mlp.act_fn).__name__ == "SiLUActivation", "its MLP has no SiLU")
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return LayerProducts(*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def attention_shape(base: Any) -> AttentionShape:
    """Return the sizes of the attention in all blocks."""
    first = base.layers[0].self_attn
    heads, kv_heads = (p.out_features // first.head_dim for p in (first.q_proj, first.k_proj))
    return AttentionShape(heads, kv_heads, first.head_dim, float(first.scaling), _epsilon(base.norm))


def head_norms(layer: Any) -> HeadNorms:
    """Return the weights of the norms of each query's and each key's head; None without."""
    attention = layer.self_attn
    return (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None


def read_prompt(model: Any, ids: Tensor, caches: Tensor) -> Tensor:
    """Let the model read `ids` int64 `[tokens]` and copy its keys and values into `caches`.

    `caches` is `[layers, 2, kv heads, length, head width]`. Returns the last token's logits fp32 `[vocabulary]`.
    """
    cache = DynamicCache(config=model.config)
    logits = prompt_logits(model, ids, cache)
    for own, layer in zip(caches, cache.layers, strict=True):
        own[0, :, : len(ids)], own[1, :, : len(ids)] = layer.keys[0], layer.values[0]
    return logits


def prompt_logits(model: Any, ids: Tensor, cache: DynamicCache) -> Tensor:
    """Return the last token's logits fp32 `[vocabulary]` and fill transformers' own cache."""
    embedded = lookup(model.get_input_embeddings(), ids)[None]
    out = model(inputs_embeds=embedded, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: Tensor = out.logits[0, -1].float()
    return logits


def agrees(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two computations in `dtype` differ by rounding alone."""
    distance = float((logits - expected).norm() / expected.norm().clamp(min=1e-20))
    return distance <= _ROUNDING[dtype]


def require(right: bool, reason: str) -> None:
    """Raise ValueError with the reason unless it is right."""
    if not right:
        raise ValueError(reason)


def _epsilon(norm: Any) -> float:
    found = getattr(norm, "variance_epsilon", None)
    return float(norm.eps if found is None else found)


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _require_children(module: nn.Module, wanted: set[str], optional: set[str] | None = None) -> None:
    names = _names(module)
    require(wanted <= names <= wanted | (optional or set()), f"a {type(module).__name__} has {sorted(names)}")
