"""The whole weight written out: `dense_kernel` unpacks every segment in one launch, `outlier_kernel` adds the outliers.

`dequantize` uses them, and so do products of so many tokens that unpacking each tile again for every tile of tokens
costs more than writing the weight once. The arithmetic is `ops.reference`'s, operation by operation, so fp32 is equal
to the bit.
"""

import triton
import triton.language as tl

from bitquilt.ops.gpu.quad_lookup import quad_codes
from bitquilt.ops.gpu.unpack_codes import CODEBOOK, MX, mx_element, mx_step, plane_count, plane_part, uniform_step


@triton.jit
def dense_kernel(
    out,
    channels,
    codes,
    scales,
    zeros,
    sizes,
    n_rows,
    in_features,
    FORMS: tl.constexpr,
    BN: tl.constexpr,
):
    """Fill out `[rows, in]`, in the original order of the channels, over (tiles of BN rows, chunks).

    `channels`: the channel at each stored column, or None. `codes`: bytes. `sizes` as in `matmul_kernel`, a row in
    bytes or units of quads. FORMS: per segment (grid, bits, group size or 0, flag, and 1 for planes or 2 for quads).
    """
    CHUNK: tl.constexpr = 128
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    chunk = tl.program_id(1)
    for s in tl.static_range(len(FORMS)):
        width = sizes[s][1]
        here = chunk - sizes[s][6]
        if (here >= 0) & (here < (width + CHUNK - 1) // CHUNK):
            columns = here * CHUNK + tl.arange(0, CHUNK)
            keep = (rows < n_rows)[:, None] & (columns < width)[None, :]
            stored = (codes[s], scales[s], zeros[s])
            weight = _columns(stored, sizes[s], rows, columns, keep, n_rows, s, FORMS)
            place = sizes[s][0] + columns
            if channels is not None:
                place = tl.load(channels + place, mask=columns < width, other=0)
            at = rows.to(tl.int64)[:, None] * in_features + place[None, :]
            tl.store(out + at, weight.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _columns(stored, size, rows, columns, keep, n_rows, s: tl.constexpr, FORMS: tl.constexpr):
    """Weights fp32 `[rows, columns]` of segment s."""
    GRID: tl.constexpr = FORMS[s][0]
    BITS: tl.constexpr = FORMS[s][1]
    GROUP: tl.constexpr = FORMS[s][2]
    FLAG: tl.constexpr = FORMS[s][3]
    codes, scale, zero = stored
    if FORMS[s][4] == 2:
        number = quad_codes(codes, rows[:, None], columns[None, :], keep, n_rows, size[2], BITS)
    else:
        number = _stream_codes(codes, rows, columns, keep, n_rows, size[2], BITS, FORMS[s][4] == 1)
    group = columns[None, :] * 0
    if GROUP > 0:
        group = (columns // GROUP)[None, :]
    if GRID == CODEBOOK:
        levels = tl.load(scale + group * (1 << BITS) + number, mask=keep, other=0.0).to(tl.float32)
        if FLAG:
            levels *= tl.load(zero + columns, mask=columns < size[1], other=0.0).to(tl.float32)[None, :]
        return levels
    elif GRID == MX:
        return mx_element(number, BITS, FLAG) * mx_step(scale, rows[:, None], group, keep, size[4])
    else:
        step, base = uniform_step(stored, size, rows[:, None], group, keep, BITS, FLAG)
        value = number.to(tl.float32)
        return base + step * value if BITS == 1 and not FLAG else step * (value - base)


@triton.jit
def _stream_codes(codes, rows, columns, keep, n_rows, row_bytes, BITS: tl.constexpr, PLANES: tl.constexpr):
    """Codes int32 `[rows, columns]` of a stored stream or of planes."""
    bit = columns[None, :] * BITS
    found = tl.load(_byte(codes, bit >> 3, rows, n_rows, row_bytes, BITS, PLANES), mask=keep, other=0).to(tl.int32)
    if 8 % BITS != 0:
        follows = keep & ((bit & 7) + BITS > 8)
        after = tl.load(_byte(codes, (bit >> 3) + 1, rows, n_rows, row_bytes, BITS, PLANES), mask=follows, other=0)
        found |= after.to(tl.int32) << 8
    return (found >> (bit & 7)) & ((1 << BITS) - 1)


@triton.jit
def _byte(codes, byte, rows, n_rows, row_bytes, BITS: tl.constexpr, PLANES: tl.constexpr):
    """Addresses of byte `byte` `[1, columns]` of the streams of `rows`."""
    row = rows.to(tl.int64)[:, None]
    if PLANES:
        inner = byte % BITS  # of a unit, which is BITS bytes
        unit = row * (row_bytes // BITS) + byte // BITS
        units = n_rows.to(tl.int64) * (row_bytes // BITS)
        at = unit * 0
        for p in tl.static_range(plane_count(BITS)):
            there = units * plane_part(BITS, p, 0) + unit * plane_part(BITS, p, 1) + inner - plane_part(BITS, p, 0)
            at = tl.where(inner >= plane_part(BITS, p, 0), there, at)
        return codes + at
    else:
        return codes + row * row_bytes + byte


@triton.jit
def outlier_kernel(out, values, columns, pointers, in_features):
    """Add the outliers of one row to out `[rows, in]`; no two of them share a place."""
    row = tl.program_id(0)
    start = tl.load(pointers + row).to(tl.int32)
    end = tl.load(pointers + row + 1).to(tl.int32)
    for first in range(start, end, 128):
        at = first + tl.arange(0, 128)
        keep = at < end
        place = out + row.to(tl.int64) * in_features + tl.load(columns + at, mask=keep, other=0).to(tl.int32)
        value = tl.load(place, mask=keep, other=0.0).to(tl.float32) + tl.load(values + at, mask=keep, other=0.0)
        tl.store(place, value.to(out.dtype.element_ty), mask=keep)
