"""The steps between a decoder's products while it writes one token: `TorchDecoderOps` is their definition, in torch.

On a GPU `ops.gpu.decoder_kernels.FusedDecoderOps` does each of them in one kernel. All state is in tensors that keep
their addresses, the position among them, so that a CUDA graph can hold every step. Hidden states are `[1, width]` in
the model's dtype, keys and values of a layer `[kv heads, length, head width]`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of the attention and epsilon of the norms; scores are multiplied by `scaling`."""

    heads: int
    kv_heads: int
    head_width: int
    scaling: float
    epsilon: float


@dataclass(frozen=True, eq=False)
class RotaryPosition:
    """Cosines and sines of the rotary positions `[length, head width]`, and the current position, int64 `[1]`."""

    cosines: Tensor
    sines: Tensor
    position: Tensor


HeadNorms = tuple[Tensor, Tensor] | None
"""Weights of the norms of each query's and each key's head, where there are some."""


class DecoderOps(Protocol):
    """The three steps."""

    def add_norm(self, x: Tensor, more: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x + more, its RMS norm times `weight` `[width]`)."""
        ...

    def attend(
        self, projected: tuple[Tensor, Tensor, Tensor], norms: HeadNorms, rotary: RotaryPosition, cache: Tensor
    ) -> Tensor:
        """Attend to all places up to the current one: `[1, heads x head width]`.

        `projected`: q, k and v. q and k are turned by their position; k and v go into `cache` `[2, kv heads, length,
        head width]`.
        """
        ...

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up."""
        ...


class TorchDecoderOps:
    """`DecoderOps` by torch's own operators."""

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape

    def add_norm(self, x: Tensor, more: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `DecoderOps`."""
        x = x if more is None else x + more
        return x, rms_norm(x, weight.shape, weight, self.shape.epsilon)

    def attend(
        self, projected: tuple[Tensor, Tensor, Tensor], norms: HeadNorms, rotary: RotaryPosition, cache: Tensor
    ) -> Tensor:
        """See `DecoderOps`."""
        shape = self.shape
        q, k, v = (t.view(-1, 1, shape.head_width) for t in projected)
        if norms is not None:
            q, k = (rms_norm(t, w.shape, w, shape.epsilon) for t, w in zip((q, k), norms, strict=True))
        cache[0].index_copy_(1, rotary.position, _turned(k, rotary).to(cache.dtype))
        cache[1].index_copy_(1, rotary.position, v.to(cache.dtype))
        mask = (torch.arange(cache.shape[2], device=q.device) <= rotary.position).view(1, 1, 1, -1)
        keys, values = cache[:, None]
        grouped = shape.heads != shape.kv_heads
        found = scaled_dot_product_attention(
            _turned(q, rotary)[None], keys, values, attn_mask=mask, scale=shape.scaling, enable_gqa=grouped
        )
        return found.reshape(1, -1)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `DecoderOps`."""
        return silu(gate) * up


def _turned(x: Tensor, rotary: RotaryPosition) -> Tensor:
    half = x.shape[-1] // 2
    across = torch.cat([-x[..., half:], x[..., :half]], -1)
    cosines, sines = (table.index_select(0, rotary.position) for table in (rotary.cosines, rotary.sines))
    return (x * cosines + across * sines).to(x.dtype)
