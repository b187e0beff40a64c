"""The other side of a product's operands: activations of a chunk, split as the units of a weight are."""

import triton
import triton.language as tl


@triton.jit
def dot(numbers, inputs, acc, WIDE: tl.constexpr):
    """`acc` + numbers `[rows, units]` times inputs `[tokens, units]`. WIDE: operands as fp32, which is the same, for
    Triton's interpreter takes bfloat16 for integers here."""
    if WIDE:
        return tl.dot(numbers.to(tl.float32), tl.trans(inputs.to(tl.float32)), acc, input_precision="ieee")
    else:
        return tl.dot(numbers, tl.trans(inputs), acc, input_precision="ieee")


@triton.jit
def activations(x, runs, n_tokens, in_features, start, base, high, width, EVEN: tl.constexpr, GATHER: tl.constexpr,
                 C: tl.constexpr, U: tl.constexpr, BT: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """x `[S * BT, units, C]`: BT tokens for each of S chunks from `base` on, zero past the end. GATHER: `runs` says
    where each run of eight stored columns stands in x."""
    CHUNK: tl.constexpr = 128
    slot = tl.arange(0, S * BT)
    chunk = base + slot // BT
    token = tl.program_id(1) * BT + slot % BT
    unit = tl.arange(0, U) * C
    inner = tl.arange(0, C)
    columns = chunk[:, None] * CHUNK + unit[None, :]
    inside = (chunk < high)[:, None] if EVEN else (chunk < high)[:, None] & (columns < width)
    if GATHER:
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
    """`[tokens, units, C]` -> C tensors `[tokens, units]`."""
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
