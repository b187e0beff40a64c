"""How much memory does a quantized model take while it runs? memory_bytes(skeleton, layouts, ctx) -> Memory.

One sequence, half-precision activations and cache. Weights are exact; the cache follows from the config; the workspace
is what the reference body needs at once: the largest layer unpacked, one block's activations and the logits of a
prompt's last token.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from bitquilt.core.packing import tensor_specs
from bitquilt.core.types import Layout
from bitquilt.model.structure import Skeleton

_HALF = 2
_PROMPT = 512  # tokens that go through a block at once while a prompt is read
_ALIVE = 4  # activations of a block's widest layer alive at once (gate, up, their product, the input)


@dataclass(frozen=True)
class Memory:
    """Bytes: weights as stored, key-value cache of one sequence, workspace."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.cache + self.workspace


def memory_bytes(skeleton: Skeleton, layouts: Mapping[str, Layout], ctx: int, looked_up: Container[str] = ()) -> Memory:
    """For a context of `ctx` tokens. `looked_up`: tables of which only rows are read, never the whole at once."""
    replaced = {f"{name}.weight" for name in layouts}
    kept = sum(
        info.nbytes
        for name, info in skeleton.checkpoint.tensors.items()
        if skeleton.parameters.get(name, name) not in replaced
    )
    packed = sum(spec.nbytes for layout in layouts.values() for spec in tensor_specs(layout).values())
    config = skeleton.checkpoint.config
    text: dict[str, Any] = config.get("text_config", config)
    multiplied = [layout for name, layout in layouts.items() if name not in looked_up]
    largest = max((layout.out_features * layout.in_features for layout in multiplied), default=0)
    widest = max((max(layout.out_features, layout.in_features) for layout in multiplied), default=0)
    vocabulary = int(text.get("vocab_size") or 0)
    workspace = _HALF * largest + _HALF * _ALIVE * widest * min(ctx, _PROMPT) + 4 * vocabulary
    return Memory(kept + packed, cache_bytes(text, len(skeleton.blocks), ctx), workspace)


def cache_bytes(config: Mapping[str, Any], blocks: int, ctx: int) -> int:
    """Keys and values of `ctx` tokens in 16 bits; blocks with a sliding window keep no more than the window."""
    heads = int(_first(config, "num_key_value_heads", "num_attention_heads", "n_head") or 0)
    attention = int(_first(config, "num_attention_heads", "n_head") or 1)
    width = int(_first(config, "hidden_size", "n_embd") or 0)
    size = int(config.get("head_dim") or width // max(1, attention))
    kinds = config.get("layer_types") or ()
    window = config.get("sliding_window") or ctx
    if not kinds and config.get("model_type") == "mistral":
        kinds = ["sliding_attention"] * blocks
    tokens = sum(min(ctx, window) if kind == "sliding_attention" else ctx for kind in kinds) or blocks * ctx
    return 2 * _HALF * heads * size * tokens


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name)), None)
