"""One token of a decoder built like Llama: `DecoderStep` computes it, `captured` replays the step as one CUDA graph.

All state keeps its address: the token and its position are tensors, and nothing is read back. q, k and v are products
of one input, and so are gate and up: on a GPU they run side by side, as branches of the graph. A layer of 4096 x 4096
at 2 bits is read in a microsecond, less than a launch takes. The file needs torch alone, so it runs without
transformers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitquilt.ops import gpu
from bitquilt.ops.decoder_ops import AttentionShape, DecoderOps, HeadNorms, RotaryPosition, TorchDecoderOps

Product = Callable[[Tensor], Tensor]
"""`[1, in]` -> `[1, out]`."""


@dataclass(frozen=True, eq=False)
class DecoderBlock:
    """Products of the attention (q, k, v, o) and the MLP (gate, up, down), and the weights of the norm before each."""

    attention: Sequence[Product]
    mlp: Sequence[Product]
    norms: tuple[Tensor, Tensor]
    head_norms: HeadNorms = None


@dataclass(frozen=True, eq=False)
class DecoderEnds:
    """The ends of the model: the embedding (ids `[1]` -> `[1, width]`), the last norm's weight and the head.

    The rotary tables are `[length, head width]` for texts of up to `length` tokens.
    """

    embed: Product
    norm: Tensor
    head: Product
    cosines: Tensor
    sines: Tensor


class DecoderStep:
    """The step as a function without arguments: `put(token, position)`, call it, read `logits` fp32 `[vocabulary]`.

    A call also moves to the next position; with `greedy` it puts the likeliest token in place as well. `cache` is
    `[layers, 2, kv heads, length, head width]`.
    """

    def __init__(
        self,
        blocks: Sequence[DecoderBlock],
        ends: DecoderEnds,
        shape: AttentionShape,
        vocabulary: int,
        dtype: torch.dtype,
        *,
        greedy: bool = False,
        ops: DecoderOps | None = None,
    ) -> None:
        """`ops`: None takes the fastest for the device."""
        device, length = ends.cosines.device, len(ends.cosines)
        self.blocks, self.ends, self.greedy = blocks, ends, greedy
        self.cache = torch.zeros(len(blocks), 2, shape.kv_heads, length, shape.head_width, dtype=dtype, device=device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.rotary = RotaryPosition(ends.cosines, ends.sines, torch.zeros_like(self.token))
        self.logits = torch.zeros(vocabulary, device=device)
        self.ops = ops or _decoder_ops(shape, length, device)
        self.multiply = Branches(device) if device.type == "cuda" else _in_turn

    def put(self, token: int, position: int) -> None:
        """Set what the next call computes."""
        self.token.fill_(token)
        self.rotary.position.fill_(position)

    @torch.no_grad()
    def __call__(self) -> None:
        """Compute the step in place."""
        ops, rotary = self.ops, self.rotary
        x, more = self.ends.embed(self.token), None
        for block, cache in zip(self.blocks, self.cache, strict=True):
            *inputs, o = block.attention
            gate_and_up, down = block.mlp[:-1], block.mlp[-1]
            x, y = ops.add_norm(x, more, block.norms[0])
            q, k, v = self.multiply(inputs, y)
            seen = ops.attend((q, k, v), block.head_norms, rotary, cache)
            x, y = ops.add_norm(x, o(seen), block.norms[1])
            more = down(ops.gated(*self.multiply(gate_and_up, y)))
        _, y = ops.add_norm(x, more, self.ends.norm)
        self.logits.copy_(self.ends.head(y).view(-1))
        if self.greedy:
            self.token.copy_(self.logits.argmax(-1, keepdim=True))
        rotary.position.add_(1)


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Call `work` once and return what repeats it: a CUDA graph's replay, or `work` itself on a CPU."""
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
    """Run products of one input on separate CUDA streams; the calling stream waits for all of them."""

    def __init__(self, device: torch.device, most: int = 3) -> None:
        """`most`: the largest number of products at once."""
        self.streams = [torch.cuda.Stream(device) for _ in range(most - 1)]

    def __call__(self, products: Sequence[Product], x: Tensor) -> list[Tensor]:
        """Return each product of `x`."""
        here = torch.cuda.current_stream(x.device)
        others = list(zip(self.streams, products[1:], strict=False))
        found = []
        for stream, product in others:
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                found.append(product(x))
        first = products[0](x)
        for stream, _ in others:
            here.wait_stream(stream)
        return [first, *found]


def _in_turn(products: Sequence[Product], x: Tensor) -> list[Tensor]:
    return [product(x) for product in products]


def _decoder_ops(shape: AttentionShape, length: int, device: torch.device) -> DecoderOps:
    if device.type != "cuda" or not gpu.in_use():
        return TorchDecoderOps(shape)
    from bitquilt.ops.gpu.decoder_kernels import FusedDecoderOps

    return FusedDecoderOps(shape, length, device)
