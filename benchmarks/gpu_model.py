"""A decoder of LLaMA's shape around given linear layers, for `benchmarks.gpu`: greedy, static cache, one graph.

Both models of a comparison run the package's own step (`bitquilt.serve.decoder_step`), so that what differs is the
layers. From a token to the next it is one CUDA graph that feeds itself: nothing passes the host until the text is done.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from benchmarks.gpu_setup import Setting, Sizes
from bitquilt.ops.decoder_ops import AttentionShape
from bitquilt.serve.decoder_step import DecoderBlock, DecoderEnds, DecoderStep, captured

Layer = Callable[[Tensor], Tensor]
_DTYPE = torch.bfloat16
_CHECKED = 16  # tokens that are written twice: by the steps themselves, and by the graph


class LlamaShape:
    """Embedding and head in bf16; `make(rows, columns, seed)` -> (a linear layer, its bytes)."""

    def __init__(self, sizes: Sizes, device: torch.device, make: Callable[[int, int, int], tuple[Layer, int]]) -> None:
        self.context, self._device = sizes.context, device
        self._before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        width, head_width = sizes.width, sizes.width // sizes.heads
        shapes = [(width, width)] * 4 + [(sizes.inner, width)] * 2 + [(width, sizes.inner)]
        norm = torch.ones(width, device=device, dtype=_DTYPE)  # shared: its bytes are nothing
        tables = [torch.randn(sizes.vocabulary, width, device=device, dtype=_DTYPE) for _ in range(2)]
        tables[1] *= width**-0.5
        self.nbytes = 2 * sum(table.numel() for table in tables)
        blocks = []
        for i in range(sizes.layers):
            made = [make(*shape, 100 * i + k) for k, shape in enumerate(shapes)]
            layers = [layer for layer, _ in made]
            blocks.append(DecoderBlock(layers[:4], layers[4:], (norm, norm)))
            self.nbytes += sum(nbytes for _, nbytes in made)
        angles = torch.arange(sizes.context, device=device).unsqueeze(1) * 10000.0 ** (
            -torch.arange(0, head_width, 2, device=device) / head_width
        )
        cosines, sines = (torch.cat([t, t], 1).to(_DTYPE) for t in (angles.cos(), angles.sin()))
        ends = DecoderEnds(partial(_look_up, tables[0]), norm, partial(_times, tables[1]), cosines, sines)
        shape = AttentionShape(sizes.heads, sizes.heads, head_width, head_width**-0.5, 1e-5)
        self.step = DecoderStep(blocks, ends, shape, sizes.vocabulary, _DTYPE, greedy=True)

    def in_memory(self) -> int:
        """Bytes of the weights; on a GPU, before the first step, what was allocated for all but the cache."""
        if self._device.type == "cpu":
            return self.nbytes
        return torch.cuda.memory_allocated(self._device) - self._before - self.step.cache.nbytes

    def write(self, replay: Callable[[], None], count: int) -> list[int]:
        """`count` tokens after token 1."""
        self.step.put(1, 0)
        found = []
        for _ in range(count):
            replay()
            found.append(int(self.step.token))
        return found


@torch.no_grad()
def decode_rate(model: LlamaShape, setting: Setting) -> float:
    """Tokens per second. SystemExit: the graph writes other tokens than the steps it was recorded from."""
    cuda = setting.device.type == "cuda"
    count, steps = (_CHECKED, model.context // 2) if cuda else (0, 1)
    replay = captured(model.step, setting.device)
    one, other = model.write(model.step, count), model.write(replay, count)
    if one != other:
        raise SystemExit(f"the steps write {one}, the graph {other}: its figures would mean nothing")
    model.step.put(1, 0)
    started = time.perf_counter()
    for _ in range(steps):
        replay()
    if cuda:
        torch.cuda.synchronize()
    return steps / (time.perf_counter() - started)


def _look_up(table: Tensor, ids: Tensor) -> Tensor:
    return embedding(ids, table)


def _times(weight: Tensor, x: Tensor) -> Tensor:
    return linear(x, weight)
