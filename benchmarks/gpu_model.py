"""A decoder of LLaMA's shape around given linear layers, for `benchmarks.gpu`: greedy, static cache, one graph.

Both models of a comparison run the same code, so that what differs is the layers. The whole step, from the token to the
next, is one CUDA graph that feeds itself: nothing passes the host until the text is done.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from benchmarks.gpu_setup import Setting, Sizes

Layer = Callable[[Tensor], Tensor]
_DTYPE = torch.bfloat16


class LlamaShape:
    """Embedding and head in bf16; `make(rows, columns, seed)` -> (a linear layer, its bytes)."""

    def __init__(self, sizes: Sizes, device: torch.device, make: Callable[[int, int, int], tuple[Layer, int]]) -> None:
        self.sizes = sizes
        self.head_width = sizes.width // sizes.heads
        self.blocks: list[dict[str, Layer]] = []
        self.nbytes = 0
        shapes = dict.fromkeys("qkvo", (sizes.width, sizes.width))
        shapes |= {"gate": (sizes.inner, sizes.width), "up": (sizes.inner, sizes.width)}
        shapes |= {"down": (sizes.width, sizes.inner)}
        for i in range(sizes.layers):
            made = {name: make(*shape, 100 * i + k) for k, (name, shape) in enumerate(shapes.items())}
            self.blocks.append({name: layer for name, (layer, _) in made.items()})
            self.nbytes += sum(nbytes for _, nbytes in made.values())
        self.embedding = torch.randn(sizes.vocabulary, sizes.width, device=device, dtype=_DTYPE)
        self.head = torch.randn(sizes.vocabulary, sizes.width, device=device, dtype=_DTYPE) * sizes.width**-0.5
        self.norm = torch.ones(sizes.width, device=device, dtype=_DTYPE)  # shared: its bytes are nothing
        self.nbytes += 4 * self.embedding.numel()
        shape = (sizes.layers, 2, 1, sizes.heads, sizes.context, self.head_width)
        self.cache = torch.zeros(shape, device=device, dtype=_DTYPE)
        angles = torch.arange(sizes.context, device=device).unsqueeze(1) * 10000.0 ** (
            -torch.arange(0, self.head_width, 2, device=device) / self.head_width
        )
        self.cosines, self.sines = (torch.cat([t, t], 1).to(_DTYPE) for t in (angles.cos(), angles.sin()))
        self.places = torch.arange(sizes.context, device=device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    def step(self) -> None:
        """`token` at `position` -> the next token and position, in place."""
        hidden = self.embedding[self.token]
        seen = (self.places <= self.position).view(1, 1, 1, -1)
        for block, cache in zip(self.blocks, self.cache, strict=True):
            hidden = hidden + self._attention(block, cache, rms_norm(hidden, self.norm.shape, self.norm), seen)
            x = rms_norm(hidden, self.norm.shape, self.norm)
            hidden = hidden + block["down"](silu(block["gate"](x)) * block["up"](x))
        logits = rms_norm(hidden, self.norm.shape, self.norm) @ self.head.t()
        self.token.copy_(logits.argmax(-1))
        self.position.add_(1).remainder_(self.sizes.context)

    def _attention(self, block: dict[str, Layer], cache: Tensor, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (block[name](x).view(1, self.sizes.heads, 1, self.head_width) for name in "qkv")
        cache[0].index_copy_(2, self.position, self._turn(k))
        cache[1].index_copy_(2, self.position, v)
        found = scaled_dot_product_attention(self._turn(q), cache[0], cache[1], attn_mask=seen)
        return block["o"](found.reshape(1, self.sizes.width))

    def _turn(self, x: Tensor) -> Tensor:
        half = self.head_width // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * self.cosines[self.position] + turned * self.sines[self.position]


@torch.no_grad()
def decode_rate(model: LlamaShape, setting: Setting) -> float:
    """Tokens per second."""
    steps = setting.sizes.context // 2
    replay: Any = model.step
    model.step()
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model.step()
        replay = graph.replay
        for _ in range(10):
            replay()
        torch.cuda.synchronize()
    else:
        steps = 1
    started = time.perf_counter()
    for _ in range(steps):
        replay()
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
    return steps / (time.perf_counter() - started)
