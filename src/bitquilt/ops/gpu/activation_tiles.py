"""Activations of a chunk, loaded by `activations` and split by `split` as the units of a weight are; `dot` multiplies.

A `Tile` says what one program of the fused product takes.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """Compile-time numbers of a program.

    `rows` and `tokens` of its tile, `stack` chunks at once, `stages` of loads under way. `gather`: a table says where
    each run of eight stored columns is in x. `wide`: see `dot`.
    """

    rows: int
    tokens: int
    stack: int
    stages: int
    gather: bool
    wide: bool


@triton.jit
def dot(numbers, inputs, acc, WIDE: tl.constexpr):
    """`acc` + numbers `[rows, units]` times inputs `[tokens, units]`. WIDE: operands as fp32, which gives the same
    sums; Triton's interpreter takes bfloat16 for integers here."""
    if WIDE:
        return tl.dot(numbers.to(tl.float32), tl.trans(inputs.to(tl.float32)), acc, input_precision="ieee")
    else:
        return tl.dot(numbers, tl.trans(inputs), acc, input_precision="ieee")


@triton.jit
def activations(inputs, start, base, high, width, EVEN: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr):
    """x `[S * BT, units, C]`: BT tokens for each of S chunks from `base` on, zero past the end. `inputs`: (x, its runs,
    tokens, columns)."""
    CHUNK: tl.constexpr = 128
    U: tl.constexpr = CHUNK // C
    BT: tl.constexpr = TILE.tokens
    S: tl.constexpr = TILE.stack
    x, runs, n_tokens, in_features = inputs
    slot = tl.arange(0, S * BT)
    chunk = base + slot // BT
    token = tl.program_id(1) * BT + slot % BT
    unit = tl.arange(0, U) * C
    inner = tl.arange(0, C)
    columns = chunk[:, None] * CHUNK + unit[None, :]
    inside = (chunk < high)[:, None] if EVEN else (chunk < high)[:, None] & (columns < width)
    if TILE.gather:
        run = tl.load(runs + start // 8 + columns // 8, mask=inside, other=0)
        place = run * 8 + unit[None, :] % 8
    else:
        place = start + columns
    keep = ((token < n_tokens) & (chunk < high))[:, None, None]
    if not EVEN:
        keep = keep & (columns[:, :, None] + inner[None, None, :] < width)
    at = token.to(tl.int64)[:, None, None] * in_features + (place[:, :, None] + inner[None, None, :])
    return tl.load(x + at, mask=keep, other=0.0, eviction_policy="evict_last")


@triton.jit
def split(tile, C: tl.constexpr):
    """Split a tensor `[tokens, units, C]` into C tensors `[tokens, units]`."""
    T: tl.constexpr = tile.shape[0]
    U: tl.constexpr = tile.shape[1]
    if C == 4:
        even, odd = tl.split(tl.reshape(tile, [T, U, 2, 2]))
        a0, a2 = tl.split(even)
        a1, a3 = tl.split(odd)
        return a0, a1, a2, a3
    else:
        even, odd = tl.split(tl.reshape(tile, [T, U, 2, 2, 2]))
        e0, e1 = tl.split(even)
        o0, o1 = tl.split(odd)
        a0, a4 = tl.split(e0)
        a2, a6 = tl.split(e1)
        a1, a5 = tl.split(o0)
        a3, a7 = tl.split(o1)
        return a0, a1, a2, a3, a4, a5, a6, a7
