"""Memory of a quantized model while it runs: `memory_bytes` counts weights, cache and workspace.

The count is for one sequence with activations and cache in half precision. Weights are exact, and the cache follows
from the config. The workspace is the reference body's peak: the largest layer unpacked, one block's activations and the
logits of a prompt's last token.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass

from bitquilt.core.packing import tensor_specs
from bitquilt.core.types import Layout
from bitquilt.model.replace import replaced_weights
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
        """Sum of the three."""
        return self.weights + self.cache + self.workspace


def memory_bytes(skeleton: Skeleton, layouts: Mapping[str, Layout], ctx: int, looked_up: Container[str] = ()) -> Memory:
    """Count the memory for a context of `ctx` tokens. `looked_up`: tables that are never unpacked whole."""
    replaced = replaced_weights(layouts)
    kept = sum(
        info.nbytes
        for name, info in skeleton.checkpoint.tensors.items()
        if skeleton.parameters.get(name, name) not in replaced
    )
    packed = sum(spec.nbytes for layout in layouts.values() for spec in tensor_specs(layout).values())
    multiplied = [layout for name, layout in layouts.items() if name not in looked_up]
    largest = max((layout.out_features * layout.in_features for layout in multiplied), default=0)
    widest = max((max(layout.out_features, layout.in_features) for layout in multiplied), default=0)
    logits = 4 * (skeleton.config.vocabulary or 0)
    workspace = _HALF * largest + _HALF * _ALIVE * widest * min(ctx, _PROMPT) + logits
    return Memory(kept + packed, skeleton.config.cache_bytes(ctx), workspace)
