"""Is a model built like Llama? Found by looking at its modules, not from a list of families: `body(model)`,
`products(layer)`; ValueError says what is different.

RMS norms before attention and MLP, rotary positions, grouped attention without a window, a gated MLP with SiLU. What
looks the same and computes something else is found by trying: a decoder's first logits must be the model's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from bitquilt.model.embedding import lookup

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
_BLOCK = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_MODEL = {"embed_tokens", "layers", "norm", "rotary_emb"}
_ROPES = {"default", "linear", "llama3", "yarn"}  # whose angles do not depend on the length of the text
# Relative distance of the logits that still is rounding: measured on a random 1.1B Llama 0.006 in bf16, 1e-6 in fp32.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def body(model: Any) -> Any:
    """What is around the layers."""
    config, base = model.config, getattr(model, "model", None)
    want(base is not None and _names(base) == _MODEL, "it is built otherwise")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    want(window is None, "its attention has a window")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    want(rope in _ROPES, f"its positions are of type {rope}")
    return base


def products(layer: Any) -> list[Any]:
    """q, k, v, o, gate, up and down of a layer."""
    attention, mlp = layer.self_attn, layer.mlp
    _children(layer, _BLOCK)
    _children(attention, _ATTENTION, _HEAD_NORMS)
    _children(mlp, _MLP, {"act_fn"})
    want(isinstance(mlp.act_fn, nn.SiLU) or type(mlp.act_fn).__name__ == "SiLUActivation", "its MLP has no SiLU")
    return [
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    ]  # fmt: skip


def epsilon(norm: Any) -> float:
    """Of an RMS norm."""
    found = getattr(norm, "variance_epsilon", None)
    return float(norm.eps if found is None else found)


def read_prompt(model: Any, ids: Tensor, caches: Tensor) -> Tensor:
    """The model reads `ids` int64 `[tokens]`; keys and values go into `caches` `[layers, 2, kv heads, length, head
    width]`. Returns the last token's logits fp32 `[vocabulary]`."""
    cache = DynamicCache(config=model.config)
    logits = prompt_logits(model, ids, cache)
    for own, layer in zip(caches, cache.layers, strict=True):
        own[0, :, : len(ids)], own[1, :, : len(ids)] = layer.keys[0], layer.values[0]
    return logits


def prompt_logits(model: Any, ids: Tensor, cache: DynamicCache) -> Tensor:
    """What `read_prompt` returns; fills a cache of transformers'."""
    embedded = lookup(model.get_input_embeddings(), ids)[None]
    out = model(inputs_embeds=embedded, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: Tensor = out.logits[0, -1].float()
    return logits


def agrees(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two computations in `dtype` differ by rounding alone."""
    distance = float((logits - expected).norm() / expected.norm().clamp(min=1e-20))
    return distance <= _ROUNDING[dtype]


def want(right: bool, reason: str) -> None:
    """ValueError with the reason, unless it is right."""
    if not right:
        raise ValueError(reason)


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _children(module: nn.Module, wanted: set[str], optional: set[str] | None = None) -> None:
    names = _names(module)
    want(wanted <= names <= wanted | (optional or set()), f"a {type(module).__name__} has {sorted(names)}")
