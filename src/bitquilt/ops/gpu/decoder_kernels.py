"""`FusedDecoderOps` does each step of `ops.decoder_ops` in one Triton kernel.

Torch's operators would be twenty launches a layer, and each launch costs as much as reading 4 MB. Sums are in fp32;
values that torch rounds in between are not rounded here.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitquilt.ops.decoder_ops import AttentionShape, HeadNorms, RotaryPosition
from bitquilt.ops.gpu.launch import on, processors

_PLACES = 64  # of the cache that a program reads at once: 16 KB of keys in half precision
_GATED = 1024


class Heads(NamedTuple):
    """Compile-time numbers of the attention.

    `group`: query heads to a key head. `width` of a head, `half` of it rounded up to a power of two. `places` read at
    once, `parts` of all places, `slots`: parts rounded up to a power of two. `norms`: whether heads have norms.
    """

    group: int
    width: int
    half: int
    places: int
    parts: int
    slots: int
    norms: bool


class FusedDecoderOps:
    """`DecoderOps` by Triton's kernels, for one stream at a time."""

    def __init__(self, shape: AttentionShape, length: int, device: torch.device) -> None:
        """Prepare for a cache of `length` places."""
        self.shape, self.device = shape, device
        # programs enough for every multiprocessor twice, each with something to read once the cache is full
        self.parts = max(1, min(2 * processors(device) // shape.heads, -(-length // _PLACES)))
        self.counters = torch.zeros(shape.heads, dtype=torch.int32, device=device)  # left at zero by every launch

    def add_norm(self, x: Tensor, more: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `DecoderOps`."""
        normed, total = torch.empty_like(x), x if more is None else torch.empty_like(x)
        width, epsilon = weight.numel(), self.shape.epsilon
        block = triton.next_power_of_2(width)
        warps = max(1, min(16, block // 256))
        with on(self.device):
            add_norm_kernel[(1,)](x, more, weight, total, normed, width, epsilon, BLOCK=block, num_warps=warps)
        return total, normed

    def attend(
        self, projected: tuple[Tensor, Tensor, Tensor], norms: HeadNorms, rotary: RotaryPosition, cache: Tensor
    ) -> Tensor:
        """See `DecoderOps`."""
        shape, out = self.shape, torch.empty_like(projected[0])
        half, slots = (triton.next_power_of_2(n) for n in (shape.head_width // 2, self.parts))
        partial = torch.empty(shape.heads, self.parts, 2 * half + 2, device=self.device)
        group = shape.heads // shape.kv_heads
        heads = Heads(group, shape.head_width, half, _PLACES, self.parts, slots, norms is not None)
        tables = (rotary.cosines, rotary.sines, rotary.position)
        inputs = (projected, norms or projected[:2], tables, (cache[0], cache[1]))
        numbers = (cache.shape[2], shape.scaling, shape.epsilon)
        with on(self.device):
            attend_kernel[(shape.heads, self.parts)](
                *inputs, out, partial, self.counters, *numbers, HEADS=heads, num_warps=4
            )
        return out

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `DecoderOps`."""
        out = torch.empty_like(gate)
        with on(self.device):
            gated_kernel[(triton.cdiv(gate.numel(), _GATED),)](gate, up, out, gate.numel(), BLOCK=_GATED)
        return out


@triton.jit
def add_norm_kernel(x, more, weight, total, normed, width, epsilon, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    keep = at < width
    values = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    if more is not None:
        values += tl.load(more + at, mask=keep, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=keep)
        values = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + epsilon)
    factors = tl.load(weight + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(normed + at, (values * scale * factors).to(normed.dtype.element_ty), mask=keep)


@triton.jit
def attend_kernel(
    projected,
    norms,
    rotary,
    cache,
    out,
    partial,
    counters,
    length,
    scaling,
    epsilon,
    HEADS: tl.constexpr,
):
    """A program for each head and part of the places before `position`; the last of a head to arrive adds them up, in
    their order. The first part also takes the place itself, from k and v directly: no program reads it from the cache,
    into which the first head of its group writes it. Heads are in two halves, as positions turn them.
    `partial` `[heads, parts, 2 half + 2]`: weighted values, the largest score, the sum of the weights."""
    HALF: tl.constexpr = HEADS.half
    head = tl.program_id(0)
    part = tl.program_id(1)
    place = tl.load(rotary[2]).to(tl.int32)
    low = tl.arange(0, HALF)
    one, other = _turn(projected[0] + head * HEADS.width, norms[0], rotary, place, low, epsilon, HEADS)
    query = (one * (scaling * 1.4426950408889634), other * (scaling * 1.4426950408889634))
    base = (head // HEADS.group).to(tl.int64) * length
    top = tl.full([1], float("-inf"), tl.float32)
    weights = tl.zeros([1], tl.float32)
    total = tl.zeros([HALF], tl.float32)
    across = tl.zeros([HALF], tl.float32)
    if part == 0:
        score, total, across = _append(projected, norms, rotary, cache, query, head, place, base, low, epsilon, HEADS)
        top = tl.zeros([1], tl.float32) + score
        weights += 1.0
    share = tl.cdiv(tl.cdiv(place, HEADS.places), HEADS.parts) * HEADS.places
    first = part * share
    last = tl.minimum(first + share, place)
    top, weights, total, across = _attend(top, weights, total, across, query, cache, base, first, last, low, HEADS)
    _finish(top, weights, total, across, out + head * HEADS.width, partial, counters, low, HEADS)


@triton.jit
def _append(projected, norms, rotary, cache, query, head, place, base, low, epsilon, HEADS: tl.constexpr):
    """Put the key and value at `place` into the cache; returns their score and both halves of the value."""
    keys, values = cache
    kind: tl.constexpr = keys.dtype.element_ty
    inside = low < HEADS.width // 2
    high = low + HEADS.width // 2
    group = head // HEADS.group
    key, key_across = _turn(projected[1] + group * HEADS.width, norms[1], rotary, place, low, epsilon, HEADS)
    key, key_across = key.to(kind), key_across.to(kind)
    value = tl.load(projected[2] + group * HEADS.width + low, mask=inside, other=0.0).to(kind)
    value_across = tl.load(projected[2] + group * HEADS.width + high, mask=inside, other=0.0).to(kind)
    first_of_group = inside & (head % HEADS.group == 0)
    to = (base + place) * HEADS.width
    tl.store(keys + to + low, key, mask=first_of_group)
    tl.store(keys + to + high, key_across, mask=first_of_group)
    tl.store(values + to + low, value, mask=first_of_group)
    tl.store(values + to + high, value_across, mask=first_of_group)
    score = tl.sum(key.to(tl.float32) * query[0] + key_across.to(tl.float32) * query[1], 0)
    return score, value.to(tl.float32), value_across.to(tl.float32)


@triton.jit
def _attend(top, weights, total, across, query, cache, base, first, last, low, HEADS: tl.constexpr):
    """Add cached places `first` to `last` to the running softmax: largest score, sum of weights, weighted values."""
    keys, values = cache
    inside = low < HEADS.width // 2
    for start in range(first, last, HEADS.places):
        places = start + tl.arange(0, HEADS.places)
        keep = places < last
        every = keep[:, None] & inside[None, :]
        at = (base + places)[:, None] * HEADS.width + low[None, :]
        near = tl.load(keys + at, mask=every, other=0.0).to(tl.float32)
        far = tl.load(keys + at + HEADS.width // 2, mask=every, other=0.0).to(tl.float32)
        scores = tl.where(keep, tl.sum(near * query[0][None, :] + far * query[1][None, :], 1), float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        weight = tl.exp2(scores - higher)
        fade = tl.exp2(top - higher)
        near = tl.load(values + at, mask=every, other=0.0).to(tl.float32)
        far = tl.load(values + at + HEADS.width // 2, mask=every, other=0.0).to(tl.float32)
        total = total * fade + tl.sum(weight[:, None] * near, 0)
        across = across * fade + tl.sum(weight[:, None] * far, 0)
        weights = weights * fade + tl.sum(weight, 0)
        top = higher
    return top, weights, total, across


@triton.jit
def _finish(top, weights, total, across, to, partial, counters, low, HEADS: tl.constexpr):
    """Write a head's values; of several parts the last to arrive adds up all."""
    head = tl.program_id(0)
    kind: tl.constexpr = to.dtype.element_ty
    HALF: tl.constexpr = HEADS.half
    inside = low < HEADS.width // 2
    high = low + HEADS.width // 2
    if HEADS.parts == 1:
        tl.store(to + low, (total / weights).to(kind), mask=inside)
        tl.store(to + high, (across / weights).to(kind), mask=inside)
    else:
        size: tl.constexpr = 2 * HALF + 2
        mine = partial + (head * HEADS.parts + tl.program_id(1)) * size
        tl.store(mine + low, total)
        tl.store(mine + HALF + low, across)
        tl.store(mine + 2 * HALF + tl.arange(0, 1), top)
        tl.store(mine + 2 * HALF + 1 + tl.arange(0, 1), weights)
        tl.debug_barrier()  # every thread's sums, before one of them counts
        if tl.atomic_add(counters + head, 1, sem="acq_rel") == HEADS.parts - 1:
            slots = tl.arange(0, HEADS.slots)
            there = slots < HEADS.parts
            theirs = partial + (head * HEADS.parts + slots) * size
            tops = tl.load(theirs + 2 * HALF, mask=there, other=float("-inf"), cache_modifier=".cg")
            fades = tl.exp2(tops - tl.max(tops, 0))
            sums = tl.sum(tl.load(theirs + 2 * HALF + 1, mask=there, other=0.0, cache_modifier=".cg") * fades, 0)
            fades = fades[:, None] / sums
            at = theirs[:, None] + low[None, :]
            near = tl.load(at, mask=there[:, None], other=0.0, cache_modifier=".cg")
            far = tl.load(at + HALF, mask=there[:, None], other=0.0, cache_modifier=".cg")
            tl.store(to + low, tl.sum(near * fades, 0).to(kind), mask=inside)
            tl.store(to + high, tl.sum(far * fades, 0).to(kind), mask=inside)
            tl.store(counters + head, 0)


@triton.jit
def _turn(x, norm, rotary, place, low, epsilon, HEADS: tl.constexpr):
    """Both halves of the head at `x`, normed and turned by its position."""
    cosines, sines, _ = rotary
    keep = low < HEADS.width // 2
    high = low + HEADS.width // 2
    one = tl.load(x + low, mask=keep, other=0.0).to(tl.float32)
    other = tl.load(x + high, mask=keep, other=0.0).to(tl.float32)
    if HEADS.norms:
        scale = 1.0 / tl.sqrt(tl.sum(one * one + other * other, 0) / HEADS.width + epsilon)
        one *= scale * tl.load(norm + low, mask=keep, other=0.0).to(tl.float32)
        other *= scale * tl.load(norm + high, mask=keep, other=0.0).to(tl.float32)
    row = place * HEADS.width
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
