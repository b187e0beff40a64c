"""`ops.decode`'s four steps in one Triton kernel each: torch's operators would be twenty launches a layer, and a launch
costs as much as reading 4 MB. Sums in fp32; what torch rounds in between is not rounded here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitquilt.ops.decode import Angles, HeadNorms, Shape
from bitquilt.ops.gpu.body import on, processors

_PLACES = 64  # of the cache that a program reads at once: 16 KB of keys in half precision
_GATED = 1024


class Fused:
    """`ops.decode.Glue`; for one stream at a time."""

    def __init__(self, shape: Shape, length: int, device: torch.device) -> None:
        """`length`: of the cache."""
        self.shape, self.device = shape, device
        # programs enough for every multiprocessor twice, each with something to read once the cache is full
        self.parts = max(1, min(2 * processors(device) // shape.heads, -(-length // _PLACES)))
        self.counters = torch.zeros(shape.heads, dtype=torch.int32, device=device)  # left at zero by every launch

    def add_norm(self, x: Tensor, more: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Glue`."""
        normed, total = torch.empty_like(x), x if more is None else torch.empty_like(x)
        block = triton.next_power_of_2(weight.numel())
        with on(self.device):
            add_norm_kernel[(1,)](
                x, x if more is None else more, weight, total, normed, weight.numel(), self.shape.epsilon,
                ADDS=more is not None, BLOCK=block, num_warps=max(1, min(16, block // 256)),
            )  # fmt: skip
        return total, normed

    def place(self, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms, angles: Angles, cache: Tensor) -> Tensor:
        """See `Glue`."""
        shape, turned = self.shape, torch.empty_like(q)
        queries, keys = norms or (q, q)
        with on(self.device):
            place_kernel[(shape.heads + 2 * shape.kv_heads,)](
                q, k, v, queries, keys, angles.cosines, angles.sines, angles.position, turned, cache[0], cache[1],
                cache.shape[2], shape.epsilon, HEADS=shape.heads, KV=shape.kv_heads, WIDTH=shape.head_width,
                HALF=triton.next_power_of_2(shape.head_width // 2), NORMS=norms is not None, num_warps=1,
            )  # fmt: skip
        return turned

    def attend(self, q: Tensor, cache: Tensor, position: Tensor) -> Tensor:
        """See `Glue`."""
        shape, out = self.shape, torch.empty_like(q)
        wide = triton.next_power_of_2(shape.head_width)
        partial = torch.empty(shape.heads, self.parts, wide + 2, device=self.device)
        with on(self.device):
            attend_kernel[(shape.heads, self.parts)](
                q, cache[0], cache[1], position, out, partial, self.counters, cache.shape[2], shape.scaling,
                GROUP=shape.heads // shape.kv_heads, WIDTH=shape.head_width, WIDE=wide, PLACES=_PLACES,
                PARTS=self.parts, SLOTS=triton.next_power_of_2(self.parts), num_warps=4,
            )  # fmt: skip
        return out

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `Glue`."""
        out = torch.empty_like(gate)
        with on(self.device):
            gated_kernel[(triton.cdiv(gate.numel(), _GATED),)](gate, up, out, gate.numel(), BLOCK=_GATED)
        return out


@triton.jit
def add_norm_kernel(x, more, weight, total, normed, width, epsilon, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    keep = at < width
    values = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    if ADDS:
        values += tl.load(more + at, mask=keep, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=keep)
        values = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + epsilon)
    factors = tl.load(weight + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(normed + at, (values * scale * factors).to(normed.dtype.element_ty), mask=keep)


@triton.jit
def place_kernel(q, k, v, query_norm, key_norm, cosines, sines, position, turned, keys, values, length, epsilon,
                 HEADS: tl.constexpr, KV: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
                 NORMS: tl.constexpr):  # fmt: skip
    """A program for each head of q, of k, of v."""
    head = tl.program_id(0)
    place = tl.load(position)
    low = tl.arange(0, HALF)
    keep = low < WIDTH // 2
    high = low + WIDTH // 2
    if head >= HEADS + KV:
        number = head - HEADS - KV
        to = values + (number.to(tl.int64) * length + place) * WIDTH
        one = tl.load(v + number * WIDTH + low, mask=keep, other=0.0).to(tl.float32)
        other = tl.load(v + number * WIDTH + high, mask=keep, other=0.0).to(tl.float32)
        tl.store(to + low, one.to(values.dtype.element_ty), mask=keep)
        tl.store(to + high, other.to(values.dtype.element_ty), mask=keep)
    elif head >= HEADS:
        number = head - HEADS
        one, other = _turn(k + number * WIDTH, key_norm, cosines, sines, place, low, high, keep, epsilon, WIDTH, NORMS)
        to = keys + (number.to(tl.int64) * length + place) * WIDTH
        tl.store(to + low, one.to(keys.dtype.element_ty), mask=keep)
        tl.store(to + high, other.to(keys.dtype.element_ty), mask=keep)
    else:
        one, other = _turn(q + head * WIDTH, query_norm, cosines, sines, place, low, high, keep, epsilon, WIDTH, NORMS)
        tl.store(turned + head * WIDTH + low, one.to(turned.dtype.element_ty), mask=keep)
        tl.store(turned + head * WIDTH + high, other.to(turned.dtype.element_ty), mask=keep)


@triton.jit
def _turn(x, norm, cosines, sines, place, low, high, keep, epsilon, WIDTH: tl.constexpr, NORMS: tl.constexpr):
    one = tl.load(x + low, mask=keep, other=0.0).to(tl.float32)
    other = tl.load(x + high, mask=keep, other=0.0).to(tl.float32)
    if NORMS:
        scale = 1.0 / tl.sqrt(tl.sum(one * one + other * other, 0) / WIDTH + epsilon)
        one *= scale * tl.load(norm + low, mask=keep, other=0.0).to(tl.float32)
        other *= scale * tl.load(norm + high, mask=keep, other=0.0).to(tl.float32)
    row = place * WIDTH
    turned = one * tl.load(cosines + row + low, mask=keep, other=0.0).to(tl.float32)
    turned -= other * tl.load(sines + row + low, mask=keep, other=0.0).to(tl.float32)
    across = other * tl.load(cosines + row + high, mask=keep, other=0.0).to(tl.float32)
    across += one * tl.load(sines + row + high, mask=keep, other=0.0).to(tl.float32)
    return turned, across


@triton.jit
def attend_kernel(q, keys, values, position, out, partial, counters, length, scaling, GROUP: tl.constexpr,
                  WIDTH: tl.constexpr, WIDE: tl.constexpr, PLACES: tl.constexpr, PARTS: tl.constexpr,
                  SLOTS: tl.constexpr):  # fmt: skip
    """A program for each head and part of the places up to `position`; the last of a head to arrive adds them up, in
    their order. `partial` `[heads, PARTS, WIDE + 2]`: weighted values, the largest score, the sum of the weights."""
    head = tl.program_id(0)
    part = tl.program_id(1)
    count = tl.load(position) + 1
    dims = tl.arange(0, WIDE)
    inside = dims < WIDTH
    query = tl.load(q + head * WIDTH + dims, mask=inside, other=0.0).to(tl.float32) * (scaling * 1.4426950408889634)
    base = (head // GROUP).to(tl.int64) * length
    share = tl.cdiv(tl.cdiv(count, PLACES), PARTS) * PLACES
    first = part * share
    last = tl.minimum(first + share, count)
    top = tl.full([1], float("-inf"), tl.float32)
    weights = tl.zeros([1], tl.float32)
    total = tl.zeros([WIDE], tl.float32)
    for start in range(first, last, PLACES):
        places = start + tl.arange(0, PLACES)
        keep = places < last
        at = (base + places)[:, None] * WIDTH + dims[None, :]
        every = keep[:, None] & inside[None, :]
        key = tl.load(keys + at, mask=every, other=0.0).to(tl.float32)
        scores = tl.where(keep, tl.sum(key * query[None, :], 1), float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        weight = tl.exp2(scores - higher)
        fade = tl.exp2(top - higher)
        value = tl.load(values + at, mask=every, other=0.0).to(tl.float32)
        total = total * fade + tl.sum(weight[:, None] * value, 0)
        weights = weights * fade + tl.sum(weight, 0)
        top = higher
    if PARTS == 1:
        tl.store(out + head * WIDTH + dims, (total / weights).to(out.dtype.element_ty), mask=inside)
    else:
        mine = partial + (head * PARTS + part) * (WIDE + 2)
        tl.store(mine + dims, total)
        tl.store(mine + WIDE + tl.arange(0, 1), top)
        tl.store(mine + WIDE + 1 + tl.arange(0, 1), weights)
        tl.debug_barrier()  # every thread's sums, before one of them counts
        if tl.atomic_add(counters + head, 1, sem="acq_rel") == PARTS - 1:
            slots = tl.arange(0, SLOTS)
            there = slots < PARTS
            theirs = partial + (head * PARTS + slots) * (WIDE + 2)
            tops = tl.load(theirs + WIDE, mask=there, other=float("-inf"), cache_modifier=".cg")
            fades = tl.exp2(tops - tl.max(tops, 0))
            sums = tl.sum(tl.load(theirs + WIDE + 1, mask=there, other=0.0, cache_modifier=".cg") * fades, 0)
            found = tl.load(theirs[:, None] + dims[None, :], mask=there[:, None], other=0.0, cache_modifier=".cg")
            seen = tl.sum(found * fades[:, None], 0) / sums
            tl.store(out + head * WIDTH + dims, seen.to(out.dtype.element_ty), mask=inside)
            tl.store(counters + head, 0)


@triton.jit
def gated_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < count
    value = tl.load(gate + at, mask=keep, other=0.0).to(tl.float32)
    value = value / (1.0 + tl.exp(-value)) * tl.load(up + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=keep)
