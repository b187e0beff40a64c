"""The fused product: `product_kernel` multiplies x [tokens, in] by a stored weight of any segments in ONE launch.

Codes are unpacked in registers, multiplied by the tensor cores and summed in fp32. The grid is (tiles of rows x parts
of the columns, tiles of tokens). Every program takes BN rows, BT tokens and a run of chunks (`ops.gpu.unpack_codes`),
which may cross segments.

- S chunks at once. A product of few tokens leaves most columns of a tensor core's tile empty. So S neighbouring chunks
  of a row become S rows of the tile, and the activations of each of the S chunks become columns of their own. Sums of a
  chunk with another chunk's activations are thrown away. A row is then read S x 128 columns at a time, and all warps
  work on few rows: enough programs without splitting a row among several of them.
- parts > 1 splits the columns as well. Each program leaves its sums in `partial`; the last to arrive adds them up in
  their order, so that results never depend on who came first, and resets the counter for the next launch.

What the functions below hand on:

    inputs   (x, its runs, tokens, columns)
    stored   (codes, scales, zeros) of one segment
    size     of one segment: (first column, width, units or words or bytes of a row, words in all, groups, bytes of a
             group's zeros, first chunk)
    span     (tile of rows, rows in all, first chunk, chunk after the last)
    FORMS    per segment (grid, bits, group size or 0 for one group, flag, READ, PTX). The flag is symmetric (uniform),
             E2M3 (mx) or gains (codebook). READ: 0, 1 where the width is whole chunks, 2 where there are planes
             (`ops.gpu.unpack_codes`), 3 and 4 for quads (`ops.gpu.quad_lookup`; S is 1 then) of whole chunks and others
"""

import triton
import triton.language as tl

from bitquilt.ops.gpu.activation_tiles import activations, dot, split
from bitquilt.ops.gpu.quad_lookup import quad_segment
from bitquilt.ops.gpu.unpack_codes import (
    CODEBOOK,
    MX,
    UNIFORM,
    code,
    code_number,
    load_plane,
    load_words,
    mx_element,
    mx_step,
    operand,
    piece,
    piece_count,
    plane_count,
    uniform_step,
    unit_codes,
)


@triton.jit
def product_kernel(
    x,
    plain_x,
    runs,
    codes,
    scales,
    zeros,
    sizes,
    outliers,
    bias,
    out,
    partial,
    counters,
    n_rows,
    n_tokens,
    in_features,
    chunks,
    parts,
    FORMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """`codes`: per segment its planes, or its words alone; `scales` of quads with PTX are look-up tables. `plain_x`: x
    in the order of the channels, for `outliers` (values, columns, row pointers). `runs`, `outliers` and `bias` may be
    None; `partial` and `counters` are None for one part. TILE: an `activation_tiles.Tile`."""
    BN: tl.constexpr = TILE.rows
    BT: tl.constexpr = TILE.tokens
    S: tl.constexpr = TILE.stack
    tile = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    rows = tile * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BT + tl.arange(0, BT)
    first, last = (chunks * part) // parts, (chunks * (part + 1)) // parts
    inputs = (x, runs, n_tokens, in_features)
    acc = tl.zeros([BN * S, BT * S], tl.float32)
    for s in tl.static_range(len(FORMS)):
        stored = (codes[s], scales[s], zeros[s])
        low = tl.maximum(first - sizes[s][6], 0)
        high = tl.minimum(last - sizes[s][6], (sizes[s][1] + 127) // 128)
        if FORMS[s][4] >= 3:
            acc = quad_segment(acc, inputs, stored, sizes[s], (tile, n_rows, low, high), s, FORMS, TILE)
        else:
            acc = _segment(acc, inputs, stored, sizes[s], (tile, n_rows, low, high), s, FORMS, TILE)
    acc = _own_sums(acc, BN, BT, S)
    if outliers is not None:
        acc = _outliers(acc, (plain_x, runs, n_tokens, in_features), outliers, (rows, n_rows), (part, parts), BT)
    keep = (rows < n_rows)[:, None] & (tokens < n_tokens)[None, :]
    at = tokens.to(tl.int64)[None, :] * n_rows + rows[:, None]
    if partial is not None:
        size = n_rows.to(tl.int64) * n_tokens
        tl.store(partial + part * size + at, acc, mask=keep)
        tl.debug_barrier()  # every thread's sums, before one of them counts
        counter = counters + tl.program_id(1) * tl.cdiv(n_rows, BN) + tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
            acc = tl.zeros([BN, BT], tl.float32)
            for i in range(parts):
                acc += tl.load(partial + i * size + at, mask=keep, other=0.0, cache_modifier=".cg")
            _finish(acc, bias, out, at, keep, rows, n_rows)
            tl.store(counter, 0)
    else:
        _finish(acc, bias, out, at, keep, rows, n_rows)


@triton.jit
def _own_sums(acc, BN: tl.constexpr, BT: tl.constexpr, S: tl.constexpr):
    """Sums `[BN, BT]` of each chunk with its own activations."""
    if S == 1:
        return acc
    else:
        spread = tl.reshape(acc, [BN, S, S, BT])
        lane = tl.arange(0, S)
        own = lane[None, :, None, None] == lane[None, None, :, None]
        return tl.sum(tl.sum(tl.where(own, spread, 0.0), 2), 1)


@triton.jit
def _finish(acc, bias, out, at, keep, rows, n_rows):
    if bias is not None:
        acc += tl.load(bias + rows, mask=rows < n_rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _segment(acc, inputs, stored, size, span, s: tl.constexpr, FORMS: tl.constexpr, TILE: tl.constexpr):
    """`acc` plus the products of a segment's chunks, S chunks at a time."""
    GRID: tl.constexpr = FORMS[s][0]
    BITS: tl.constexpr = FORMS[s][1]
    GROUP: tl.constexpr = FORMS[s][2]
    READ: tl.constexpr = FORMS[s][4]
    PTX: tl.constexpr = FORMS[s][5]
    BN: tl.constexpr = TILE.rows
    BT: tl.constexpr = TILE.tokens
    S: tl.constexpr = TILE.stack
    C: tl.constexpr = 8 if READ == 2 and BITS < 8 else unit_codes(BITS)
    CHUNK: tl.constexpr = 128
    U: tl.constexpr = CHUNK // C
    # one scale per row and chunk: codes are multiplied unscaled, exactly, and the sums are scaled
    WHOLE: tl.constexpr = GRID == UNIFORM and GROUP % CHUNK == 0
    DTYPE: tl.constexpr = inputs[0].dtype.element_ty
    DEPTH: tl.constexpr = TILE.stages if WHOLE else 2  # the other way computes more than it waits
    tile, n_rows, low, high = span
    start, width, row_size, _, _, _, _ = size
    codes = stored[0]
    slot = tl.arange(0, BN * S)
    rows = tile * BN + slot // S
    unit = tl.arange(0, U)
    for base in tl.range(low, high, S, num_stages=DEPTH):
        chunk = base + slot % S
        columns = chunk[:, None] * CHUNK + unit[None, :] * C  # of code 0
        keep = (rows < n_rows) & (chunk < high)
        block = activations(inputs, start, base, high, width, READ > 0, C, TILE)
        by_code = split(block, C)
        if WHOLE:
            part = tl.zeros([BN * S, BT * S], tl.float32)
            if READ == 2:
                for p in tl.static_range(plane_count(BITS)):
                    units = load_plane(codes[p], rows, chunk, keep, row_size, U)
                    for i in tl.static_range(piece_count(BITS, p)):
                        number = operand(units, BITS, p, i, DTYPE, PTX)
                        part = dot(number, by_code[piece(BITS, p, i, 0)], part, TILE.wide)
            else:
                words = load_words(codes[0], rows, chunk, keep, size, BITS, READ)
                for j in tl.static_range(C):
                    part = dot(operand(words, BITS, -1, j, DTYPE, PTX), by_code[j], part, TILE.wide)
            total_x = tl.sum(tl.sum(block.to(tl.float32), 2), 1)
            group = chunk * 0
            if GROUP > 0:
                group = chunk // (GROUP // CHUNK)
            step, middle = uniform_step(stored, size, rows, group, keep, BITS, FORMS[s][3])
            shift = middle if BITS == 1 and not FORMS[s][3] else -step * middle
            acc += step[:, None] * part + shift[:, None] * total_x[None, :]
        else:
            if READ == 2:
                words = load_plane(codes[0], rows, chunk, keep, row_size, U)
            else:
                words = load_words(codes[0], rows, chunk, keep, size, BITS, READ)
            for j in tl.static_range(C):
                every = keep[:, None] & (columns + j < width)
                number = _weights(words.to(tl.int32), stored, size, rows[:, None], columns + j, every, j, s, FORMS)
                acc = dot(number.to(DTYPE), by_code[j], acc, TILE.wide)
    return acc


@triton.jit
def _weights(words, stored, size, rows, columns, keep, J: tl.constexpr, s: tl.constexpr, FORMS: tl.constexpr):
    """Weights fp32 `[rows, units]` in code J of each unit, which is in `columns` `[rows, units]` of the segment; zero
    where not `keep`."""
    GRID: tl.constexpr = FORMS[s][0]
    BITS: tl.constexpr = FORMS[s][1]
    GROUP: tl.constexpr = FORMS[s][2]
    FLAG: tl.constexpr = FORMS[s][3]
    group = columns * 0
    if GROUP > 0:
        group = columns // GROUP
    if GRID == CODEBOOK:
        levels = tl.load(stored[1] + group * (1 << BITS) + code(words, J, BITS), mask=keep, other=0.0).to(tl.float32)
        if FLAG:
            levels *= tl.load(stored[2] + columns, mask=keep, other=0.0).to(tl.float32)
        return levels
    elif GRID == MX:
        element = tl.where(keep, mx_element(code(words, J, BITS), BITS, FLAG), 0.0)
        return element * mx_step(stored[1], rows, group, keep, size[4])
    else:
        step, middle = uniform_step(stored, size, rows, group, keep, BITS, FLAG)
        number = code_number(words, J, BITS)
        return middle + step * number if BITS == 1 and not FLAG else step * (number - middle)


@triton.jit
def _outliers(acc, inputs, outliers, rows_of, share, BT: tl.constexpr):
    """`acc` plus the products of every `parts`-th run of outliers of each row. `rows_of`: (rows, rows in all); `share`:
    (part, parts)."""
    OUTLIERS: tl.constexpr = 32  # of a row at a time
    x, _, n_tokens, in_features = inputs
    values, columns, pointers = outliers
    rows, n_rows = rows_of
    part, parts = share
    inside = rows < n_rows
    start = tl.load(pointers + rows, mask=inside, other=0).to(tl.int32)
    end = tl.load(pointers + rows + 1, mask=inside, other=0).to(tl.int32)
    longest = tl.max(end - start, 0)
    number = tl.arange(0, BT)
    first = tl.program_id(1) * BT
    for run in range(part, tl.cdiv(longest, OUTLIERS), parts):
        at = start[:, None] + run * OUTLIERS + tl.arange(0, OUTLIERS)[None, :]
        keep = at < end[:, None]
        value = tl.load(values + at, mask=keep, other=0.0).to(tl.float32)
        column = tl.load(columns + at, mask=keep, other=0).to(tl.int32)
        for t in range(tl.minimum(BT, n_tokens - first)):
            taken = tl.load(x + (first + t).to(tl.int64) * in_features + column, mask=keep, other=0.0).to(tl.float32)
            acc += tl.where(number[None, :] == t, tl.sum(value * taken, 1)[:, None], 0.0)
    return acc
