"""`ops.decode`'s three steps in one Triton kernel each: torch's operators would be twenty launches a layer, and each
costs as much as reading 4 MB. Sums in fp32; what torch rounds in between is not rounded here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitquilt.ops.decoder_ops import Angles, HeadNorms, Shape
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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms, angles: Angles, cache: Tensor) -> Tensor:
        """See `Glue`."""
        shape, out = self.shape, torch.empty_like(q)
        half, stride = triton.next_power_of_2(shape.head_width // 2), cache.shape[2]
        partial = torch.empty(shape.heads, self.parts, 2 * half + 2, device=self.device)
        queries, keys = norms or (q, q)
        with on(self.device):
            attend_kernel[(shape.heads, self.parts)](
                q, k, v, queries, keys, angles.cosines, angles.sines, angles.position, cache[0], cache[1], out, partial,
                self.counters, stride, shape.scaling, shape.epsilon, GROUP=shape.heads // shape.kv_heads,
                WIDTH=shape.head_width, HALF=half, PLACES=_PLACES, PARTS=self.parts,
                SLOTS=triton.next_power_of_2(self.parts), NORMS=norms is not None, num_warps=4,
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
def attend_kernel(q, k, v, query_norm, key_norm, cosines, sines, position, keys, values, out, partial, counters, length,
                  scaling, epsilon, GROUP: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, PLACES: tl.constexpr,
                  PARTS: tl.constexpr, SLOTS: tl.constexpr, NORMS: tl.constexpr):  # fmt: skip
    """A program for each head and part of the places before `position`; the last of a head to arrive adds them up, in
    their order. The place itself is the first part's, from k and v as they come: nobody reads it from the cache, into
    which the first head of its group writes it. Heads in two halves, as positions turn them.
    `partial` `[heads, PARTS, 2 HALF + 2]`: weighted values, the largest score, the sum of the weights."""
    head = tl.program_id(0)
    part = tl.program_id(1)
    place = tl.load(position).to(tl.int32)
    low = tl.arange(0, HALF)
    inside = low < WIDTH // 2
    high = low + WIDTH // 2
    one, other = _turn(q + head * WIDTH, query_norm, cosines, sines, place, low, high, inside, epsilon, WIDTH, NORMS)
    one *= scaling * 1.4426950408889634
    other *= scaling * 1.4426950408889634
    group = head // GROUP
    base = group.to(tl.int64) * length
    top = tl.full([1], float("-inf"), tl.float32)
    weights = tl.zeros([1], tl.float32)
    total = tl.zeros([HALF], tl.float32)
    across = tl.zeros([HALF], tl.float32)
    if part == 0:
        kind = keys.dtype.element_ty
        key, key_across = _turn(k + group * WIDTH, key_norm, cosines, sines, place, low, high, inside, epsilon, WIDTH,
                                NORMS)  # fmt: skip
        key, key_across = key.to(kind), key_across.to(kind)
        value = tl.load(v + group * WIDTH + low, mask=inside, other=0.0).to(kind)
        value_across = tl.load(v + group * WIDTH + high, mask=inside, other=0.0).to(kind)
        first_of_group = inside & (head % GROUP == 0)
        to = (base + place) * WIDTH
        tl.store(keys + to + low, key, mask=first_of_group)
        tl.store(keys + to + high, key_across, mask=first_of_group)
        tl.store(values + to + low, value, mask=first_of_group)
        tl.store(values + to + high, value_across, mask=first_of_group)
        top = tl.zeros([1], tl.float32) + tl.sum(key.to(tl.float32) * one + key_across.to(tl.float32) * other, 0)
        weights += 1.0
        total += value.to(tl.float32)
        across += value_across.to(tl.float32)
    share = tl.cdiv(tl.cdiv(place, PLACES), PARTS) * PLACES
    first = part * share
    last = tl.minimum(first + share, place)
    for start in range(first, last, PLACES):
        places = start + tl.arange(0, PLACES)
        keep = places < last
        every = keep[:, None] & inside[None, :]
        at = (base + places)[:, None] * WIDTH + low[None, :]
        near = tl.load(keys + at, mask=every, other=0.0).to(tl.float32)
        far = tl.load(keys + at + WIDTH // 2, mask=every, other=0.0).to(tl.float32)
        scores = tl.where(keep, tl.sum(near * one[None, :] + far * other[None, :], 1), float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        weight = tl.exp2(scores - higher)
        fade = tl.exp2(top - higher)
        near = tl.load(values + at, mask=every, other=0.0).to(tl.float32)
        far = tl.load(values + at + WIDTH // 2, mask=every, other=0.0).to(tl.float32)
        total = total * fade + tl.sum(weight[:, None] * near, 0)
        across = across * fade + tl.sum(weight[:, None] * far, 0)
        weights = weights * fade + tl.sum(weight, 0)
        top = higher
    to = out + head * WIDTH
    if PARTS == 1:
        tl.store(to + low, (total / weights).to(out.dtype.element_ty), mask=inside)
        tl.store(to + high, (across / weights).to(out.dtype.element_ty), mask=inside)
    else:
        size: tl.constexpr = 2 * HALF + 2
        mine = partial + (head * PARTS + part) * size
        tl.store(mine + low, total)
        tl.store(mine + HALF + low, across)
        tl.store(mine + 2 * HALF + tl.arange(0, 1), top)
        tl.store(mine + 2 * HALF + 1 + tl.arange(0, 1), weights)
        tl.debug_barrier()  # every thread's sums, before one of them counts
        if tl.atomic_add(counters + head, 1, sem="acq_rel") == PARTS - 1:
            slots = tl.arange(0, SLOTS)
            there = slots < PARTS
            theirs = partial + (head * PARTS + slots) * size
            tops = tl.load(theirs + 2 * HALF, mask=there, other=float("-inf"), cache_modifier=".cg")
            fades = tl.exp2(tops - tl.max(tops, 0))
            sums = tl.sum(tl.load(theirs + 2 * HALF + 1, mask=there, other=0.0, cache_modifier=".cg") * fades, 0)
            fades = fades[:, None] / sums
            at = theirs[:, None] + low[None, :]
            near = tl.load(at, mask=there[:, None], other=0.0, cache_modifier=".cg")
            far = tl.load(at + HALF, mask=there[:, None], other=0.0, cache_modifier=".cg")
            tl.store(to + low, tl.sum(near * fades, 0).to(out.dtype.element_ty), mask=inside)
            tl.store(to + high, tl.sum(far * fades, 0).to(out.dtype.element_ty), mask=inside)
            tl.store(counters + head, 0)


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
def gated_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < count
    value = tl.load(gate + at, mask=keep, other=0.0).to(tl.float32)
    value = value / (1.0 + tl.exp(-value)) * tl.load(up + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=keep)
