"""One token of a decoder built like Llama, all of whose state stays where it is: `Step(...)()`, and `captured(step)`,
which replays it as one CUDA graph. Torch alone, so that it runs where transformers is not installed.

The token and its position are tensors; nothing is read back. q, k and v are products of one input, and so are gate and
up: on a GPU they run side by side, as branches of the graph. A layer of 4096 x 4096 at 2 bits is read in a microsecond,
less than a launch takes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitquilt.ops import gpu
from bitquilt.ops.decoder_ops import Angles, Glue, HeadNorms, Plain, Shape

Product = Callable[[Tensor], Tensor]
"""`[1, in]` -> `[1, out]`."""


@dataclass(frozen=True, eq=False)
class Block:
    """`attention`: q, k, v, o; `mlp`: gate, up, down; `norms`: the weights of those before each."""

    attention: Sequence[Product]
    mlp: Sequence[Product]
    norms: tuple[Tensor, Tensor]
    head_norms: HeadNorms = None


@dataclass(frozen=True, eq=False)
class Ends:
    """Before and after the blocks: ids `[1]` -> `[1, width]`, the last norm's weight, the head; rotary tables
    `[length, head width]`, where `length` is how long a text may be."""

    embed: Product
    norm: Tensor
    head: Product
    cosines: Tensor
    sines: Tensor


class Step:
    """`put(token, position)`, then call it: `logits` fp32 `[vocabulary]` of the next token, and position + 1.

    `cache` `[layers, 2, kv heads, length, head width]`. `greedy`: puts the likeliest token in place.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        ends: Ends,
        shape: Shape,
        vocabulary: int,
        dtype: torch.dtype,
        *,
        greedy: bool = False,
        glue: Glue | None = None,
    ) -> None:
        """`glue`: of the device's choice where None."""
        device, length = ends.cosines.device, len(ends.cosines)
        self.blocks, self.ends, self.greedy = blocks, ends, greedy
        self.cache = torch.zeros(len(blocks), 2, shape.kv_heads, length, shape.head_width, dtype=dtype, device=device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.angles = Angles(ends.cosines, ends.sines, torch.zeros_like(self.token))
        self.logits = torch.zeros(vocabulary, device=device)
        self.glue = glue or _glue(shape, length, device)
        self.together = Branches(device) if device.type == "cuda" else _in_turn

    def put(self, token: int, position: int) -> None:
        """What the next call computes."""
        self.token.fill_(token)
        self.angles.position.fill_(position)

    @torch.no_grad()
    def __call__(self) -> None:
        """In place."""
        glue, angles = self.glue, self.angles
        x, more = self.ends.embed(self.token), None
        for block, cache in zip(self.blocks, self.cache, strict=True):
            *inputs, o = block.attention
            gate_and_up, down = block.mlp[:-1], block.mlp[-1]
            x, y = glue.add_norm(x, more, block.norms[0])
            q, k, v = self.together(inputs, y)
            seen = glue.attend(q, k, v, block.head_norms, angles, cache)
            x, y = glue.add_norm(x, o(seen), block.norms[1])
            more = down(glue.gated(*self.together(gate_and_up, y)))
        _, y = glue.add_norm(x, more, self.ends.norm)
        self.logits.copy_(self.ends.head(y).view(-1))
        if self.greedy:
            self.token.copy_(self.logits.argmax(-1, keepdim=True))
        angles.position.add_(1)


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What replays `work`, which is called once before: a CUDA graph, on a CPU `work` itself."""
    work()  # weights are checked and kernels compiled when they are first used, which no graph may hold
    if device.type != "cuda":
        return work
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
    replay: Callable[[], None] = graph.replay
    return replay


class Branches:
    """Products of one input on streams of their own: the stream that calls waits for all of them."""

    def __init__(self, device: torch.device, most: int = 3) -> None:
        """`most`: products at once."""
        self.streams = [torch.cuda.Stream(device) for _ in range(most - 1)]

    def __call__(self, products: Sequence[Product], x: Tensor) -> list[Tensor]:
        """Each product of `x`."""
        here = torch.cuda.current_stream(x.device)
        beside = list(zip(self.streams, products[1:], strict=False))
        found = []
        for stream, product in beside:
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                found.append(product(x))
        first = products[0](x)
        for stream, _ in beside:
            here.wait_stream(stream)
        return [first, *found]


def _in_turn(products: Sequence[Product], x: Tensor) -> list[Tensor]:
    return [product(x) for product in products]


def _glue(shape: Shape, length: int, device: torch.device) -> Glue:
    if device.type != "cuda" or not gpu.in_use():
        return Plain(shape)
    from bitquilt.ops.gpu.decoder_kernels import Fused

    return Fused(shape, length, device)
