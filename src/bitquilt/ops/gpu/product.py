"""x [tokens, in] times a stored weight in ONE launch, whatever its segments: unpacked in registers, multiplied by the
tensor cores, summed in fp32. `product_kernel` over (tiles of rows x parts of the columns, tiles of tokens).

Every program takes BN rows, BT tokens and a run of chunks (`ops.gpu.unpack`), which may cross segments.

- S chunks at once. A product of few tokens leaves most columns of a tensor core's tile empty. So S neighbouring chunks
  of a row stand as S rows of the tile, and the activations of each of the S chunks as columns of their own; of the
  sums, those of a chunk with another chunk's activations are thrown away. A row is then read S x 128 columns at a time,
  and all warps work on few rows: enough programs without sharing a row out among several of them.
- parts > 1 shares the columns out all the same: each program leaves its sums in `partial`; the last to arrive adds them
  up, in their order, so that results never depend on who came first, and puts the counter back for the next launch.
"""

import triton
import triton.language as tl

from bitquilt.ops.gpu.operands import activations, dot, split
from bitquilt.ops.gpu.quads import quad_segment
from bitquilt.ops.gpu.unpack import (
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
def product_kernel(x, plain_x, runs, codes, scales, zeros, sizes, outlier_values, outlier_columns, outlier_rows, bias,
                   out, partial, counters, n_rows, n_tokens, in_features, chunks, parts,
                   FORMS: tl.constexpr, GATHER: tl.constexpr, HAS_OUTLIERS: tl.constexpr, HAS_BIAS: tl.constexpr,
                   SHARED: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, S: tl.constexpr,
                   STAGES: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """`codes`: per segment its planes, or its words alone.
    FORMS: per segment (grid, bits, group size or 0 for one group, symmetric or E2M3 or gains, READ, PTX);
    `sizes`: per segment (first column, width, units or bytes of a row, words in all, groups, bytes of a group's zeros,
    first chunk). READ: 0, 1 where the width is whole chunks, 2 where there are planes (`ops.gpu.unpack`), 3
    and 4 of quads (`ops.gpu.quads`; S is 1 then) of whole chunks and others, whose `scales` are tables with PTX.
    SHARED: parts > 1. `plain_x`: x in the order of the channels, for the outliers. WIDE: see `_dot`."""
    CHUNK: tl.constexpr = 128
    tile = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    rows = tile * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BT + tl.arange(0, BT)
    first = (chunks * part) // parts
    last = (chunks * (part + 1)) // parts
    acc = tl.zeros([BN * S, BT * S], tl.float32)
    for s in tl.static_range(len(FORMS)):
        begin = sizes[s][6]
        low = tl.maximum(first - begin, 0)
        high = tl.minimum(last - begin, (sizes[s][1] + CHUNK - 1) // CHUNK)
        if FORMS[s][4] >= 3:
            acc = quad_segment(acc, x, runs, codes[s], scales[s], zeros[s], sizes[s][0], sizes[s][1], sizes[s][2], tile,
                               n_rows, n_tokens, in_features, low, high, FORMS[s][1], FORMS[s][2], FORMS[s][3],
                               FORMS[s][4] == 3, FORMS[s][5], GATHER, BN, BT, STAGES, WIDE)  # fmt: skip
        else:
            acc = _segment(acc, x, runs, codes[s], scales[s], zeros[s], sizes[s][0], sizes[s][1], sizes[s][2],
                           sizes[s][3], sizes[s][4], sizes[s][5], tile, n_rows, n_tokens, in_features, low, high,
                           FORMS[s][0], FORMS[s][1], FORMS[s][2], FORMS[s][3], FORMS[s][4], FORMS[s][5],
                           GATHER, BN, BT, S, STAGES, WIDE)  # fmt: skip
    if S > 1:
        spread = tl.reshape(acc, [BN, S, S, BT])
        lane = tl.arange(0, S)
        own = lane[None, :, None, None] == lane[None, None, :, None]
        acc = tl.sum(tl.sum(tl.where(own, spread, 0.0), 2), 1)
    if HAS_OUTLIERS:
        acc = _outliers(acc, plain_x, outlier_values, outlier_columns, outlier_rows, rows, n_rows, n_tokens,
                        in_features, part, parts, BT)  # fmt: skip
    keep = (rows < n_rows)[:, None] & (tokens < n_tokens)[None, :]
    at = tokens.to(tl.int64)[None, :] * n_rows + rows[:, None]
    if SHARED:
        size = n_rows.to(tl.int64) * n_tokens
        tl.store(partial + part * size + at, acc, mask=keep)
        tl.debug_barrier()  # every thread's sums, before one of them counts
        counter = counters + tl.program_id(1) * tl.cdiv(n_rows, BN) + tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
            acc = tl.zeros([BN, BT], tl.float32)
            for i in range(parts):
                acc += tl.load(partial + i * size + at, mask=keep, other=0.0, cache_modifier=".cg")
            _finish(acc, bias, out, at, keep, rows, n_rows, HAS_BIAS)
            tl.store(counter, 0)
    else:
        _finish(acc, bias, out, at, keep, rows, n_rows, HAS_BIAS)


@triton.jit
def _finish(acc, bias, out, at, keep, rows, n_rows, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=rows < n_rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _segment(acc, x, runs, codes, scale, zero, start, width, row_size, total, groups, zero_size, tile, n_rows, n_tokens,
             in_features, low, high, GRID: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, FLAG: tl.constexpr,
             READ: tl.constexpr, PTX: tl.constexpr, GATHER: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
             S: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """`acc` and the products of chunks `low` to `high` of one segment, S chunks at a time."""
    C: tl.constexpr = 8 if READ == 2 and BITS < 8 else unit_codes(BITS)
    CHUNK: tl.constexpr = 128
    U: tl.constexpr = CHUNK // C
    # one scale per row and chunk: codes are multiplied as they are, exactly, and the sums are scaled
    WHOLE: tl.constexpr = GRID == UNIFORM and GROUP % CHUNK == 0
    DTYPE: tl.constexpr = x.dtype.element_ty
    DEPTH: tl.constexpr = STAGES if WHOLE else 2  # the other way computes more than it waits
    slot = tl.arange(0, BN * S)
    rows = tile * BN + slot // S
    unit = tl.arange(0, U)
    for base in tl.range(low, high, S, num_stages=DEPTH):
        chunk = base + slot % S
        columns = chunk[:, None] * CHUNK + unit[None, :] * C  # of code 0
        keep = (rows < n_rows) & (chunk < high)
        inputs = activations(x, runs, n_tokens, in_features, start, base, high, width, READ > 0, GATHER, C, U, BT, S)
        by_code = split(inputs, C)
        if WHOLE:
            part = tl.zeros([BN * S, BT * S], tl.float32)
            if READ == 2:
                for p in tl.static_range(plane_count(BITS)):
                    units = load_plane(codes[p], rows, chunk, keep, row_size, U)
                    for i in tl.static_range(piece_count(BITS, p)):
                        number = operand(units, BITS, p, i, DTYPE, PTX)
                        part = dot(number, by_code[piece(BITS, p, i, 0)], part, WIDE)
            else:
                words = load_words(codes[0], rows, chunk, keep, width, row_size, total, BITS, READ)
                for j in tl.static_range(C):
                    part = dot(operand(words, BITS, -1, j, DTYPE, PTX), by_code[j], part, WIDE)
            total_x = tl.sum(tl.sum(inputs.to(tl.float32), 2), 1)
            group = chunk * 0
            if GROUP > 0:
                group = chunk // (GROUP // CHUNK)
            step, middle = uniform_step(scale, zero, rows, group, keep, groups, zero_size, BITS, FLAG)
            shift = middle if BITS == 1 and not FLAG else -step * middle
            acc += step[:, None] * part + shift[:, None] * total_x[None, :]
        else:
            if READ == 2:
                words = load_plane(codes[0], rows, chunk, keep, row_size, U)
            else:
                words = load_words(codes[0], rows, chunk, keep, width, row_size, total, BITS, READ)
            for j in tl.static_range(C):
                every = keep[:, None] & (columns + j < width)
                number = _weights(words.to(tl.int32), scale, zero, rows[:, None], columns + j, every, groups, zero_size,
                                  j, GRID, BITS, GROUP, FLAG)  # fmt: skip
                acc = dot(number.to(DTYPE), by_code[j], acc, WIDE)
    return acc


@triton.jit
def _weights(words, scale, zero, rows, columns, keep, groups, zero_size, J: tl.constexpr, GRID: tl.constexpr,
             BITS: tl.constexpr, GROUP: tl.constexpr, FLAG: tl.constexpr):  # fmt: skip
    """Weights fp32 `[rows, units]` in code J of each unit, which stands in `columns` `[rows, units]` of the segment;
    zero where not `keep`."""
    group = columns * 0
    if GROUP > 0:
        group = columns // GROUP
    if GRID == CODEBOOK:
        levels = tl.load(scale + group * (1 << BITS) + code(words, J, BITS), mask=keep, other=0.0).to(tl.float32)
        if FLAG:
            levels *= tl.load(zero + columns, mask=keep, other=0.0).to(tl.float32)
        return levels
    elif GRID == MX:
        element = tl.where(keep, mx_element(code(words, J, BITS), BITS, FLAG), 0.0)
        return element * mx_step(scale, rows, group, keep, groups)
    else:
        step, middle = uniform_step(scale, zero, rows, group, keep, groups, zero_size, BITS, FLAG)
        number = code_number(words, J, BITS)
        return middle + step * number if BITS == 1 and not FLAG else step * (number - middle)


@triton.jit
def _outliers(acc, x, values, columns, pointers, rows, n_rows, n_tokens, in_features, part, parts, BT: tl.constexpr):
    """`acc` and the products of every `parts`-th run of outliers of each row."""
    OUTLIERS: tl.constexpr = 32  # of a row at a time
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
            inputs = tl.load(x + (first + t).to(tl.int64) * in_features + column, mask=keep, other=0.0).to(tl.float32)
            acc += tl.where(number[None, :] == t, tl.sum(value * inputs, 1)[:, None], 0.0)
    return acc
