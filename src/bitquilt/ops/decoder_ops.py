"""What stands between a decoder's products while it writes one token: `Plain` is the definition, in torch; on a GPU
`ops.gpu.decode.Fused` does the same in one kernel each.

All state is in tensors that stay where they are, the position among them, so that a CUDA graph can hold every step.
Hidden states `[1, width]` in the model's dtype; keys and values of a layer `[kv heads, length, head width]`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu


@dataclass(frozen=True)
class Shape:
    """Of the attention, and the norms' epsilon; scores are multiplied by `scaling`."""

    heads: int
    kv_heads: int
    head_width: int
    scaling: float
    epsilon: float


@dataclass(frozen=True, eq=False)
class Angles:
    """Cosines and sines of the rotary positions `[length, head width]`, and which one it is: int64 `[1]`."""

    cosines: Tensor
    sines: Tensor
    position: Tensor


HeadNorms = tuple[Tensor, Tensor] | None
"""Weights of the norms of each query's and each key's head, where there are some."""


class Glue(Protocol):
    """The three steps."""

    def add_norm(self, x: Tensor, more: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(x + more, its RMS norm times `weight` `[width]`)."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms, angles: Angles, cache: Tensor) -> Tensor:
        """Turn q and k by their position, put k and v into `cache` `[2, kv heads, length, head width]`; returns what q
        sees up to its own place, `[1, heads x head width]`."""
        ...

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        ...


class Plain:
    """Torch's own operators."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def add_norm(self, x: Tensor, more: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Glue`."""
        x = x if more is None else x + more
        return x, rms_norm(x, weight.shape, weight, self.shape.epsilon)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms, angles: Angles, cache: Tensor) -> Tensor:
        """See `Glue`."""
        q, k, v = (t.view(-1, 1, self.shape.head_width) for t in (q, k, v))
        if norms is not None:
            q, k = (rms_norm(t, w.shape, w, self.shape.epsilon) for t, w in zip((q, k), norms, strict=True))
        cache[0].index_copy_(1, angles.position, _turned(k, angles).to(cache.dtype))
        cache[1].index_copy_(1, angles.position, v.to(cache.dtype))
        seen = (torch.arange(cache.shape[2], device=q.device) <= angles.position).view(1, 1, 1, -1)
        found = scaled_dot_product_attention(
            _turned(q, angles)[None], cache[0][None], cache[1][None], attn_mask=seen, scale=self.shape.scaling,
            enable_gqa=self.shape.heads != self.shape.kv_heads,
        )  # fmt: skip
        return found.reshape(1, -1)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `Glue`."""
        return silu(gate) * up


def _turned(x: Tensor, angles: Angles) -> Tensor:
    half = x.shape[-1] // 2
    across = torch.cat([-x[..., half:], x[..., :half]], -1)
    cosines, sines = (table.index_select(0, angles.position) for table in (angles.cosines, angles.sines))
    return (x * cosines + across * sines).to(x.dtype)
