"""Codebook weights, four rows at a time: `quad_segment` looks codes in quads (`ops.gpu_order`) up in registers.

A load from a column's table costs a weight fourteen instructions, addresses and the way back through shared memory
included. Here the low and the high bytes of a column's levels are two sets of registers, and four rows' codes are the
selector of a byte permutation: two look-ups for four weights of up to three bits, and for four bits twice that and a
choice. Bytes of two columns and four rows then change places, and each row of the four is an operand of its own.
"""

import triton
import triton.language as tl

from bitquilt.ops.gpu.activation_tiles import activations, dot, split
from bitquilt.ops.gpu.unpack_codes import load_plane

_MASKS = {2: 0x33333333, 3: 0x77777777, 4: 0x77777777}


@triton.constexpr_function
def lookup_ptx(bits):
    """PTX from two columns' selectors (int16, in $4) and their tables ($5, $6 the first word of both, $7, $8 the second
    and so on) to the numbers of four rows in both columns ($0 to $3)."""
    lines = [f"and.b32 s, $4, {_MASKS[bits]:#x};", "shr.u32 t, s, 16;"]
    if bits == 4:  # bit 3 of a code, spread over a byte
        lines += ["shr.u32 u, $4, 3;", "and.b32 u, u, 0x11111111;", "shr.u32 v, u, 16;", "mov.b32 z, 0xFF00;"]
        lines += ["prmt.b32 u, z, z, u;", "prmt.b32 v, z, z, v;"]
    for column, selector, mask in ((0, "s", "u"), (1, "t", "v")):
        for part, name in enumerate(("l", "h")):
            words = [f"${5 + column + 2 * (part * 2 ** (bits - 2) + i)}" for i in range(2 ** (bits - 2))]
            target = f"{name}{column}"
            lines.append(f"prmt.b32 {target}, {words[0]}, {words[1 % len(words)]}, {selector};")
            if bits == 4:
                lines.append(f"prmt.b32 w, {words[2]}, {words[3]}, {selector};")
                lines.append(f"lop3.b32 {target}, w, {target}, {mask}, 0xE4;")  # mask ? w : target
        lines += [
            f"prmt.b32 a{column}, l{column}, h{column}, 0x5140;",
            f"prmt.b32 b{column}, l{column}, h{column}, 0x7362;",
        ]
    lines += ["prmt.b32 $0, a0, a1, 0x5410;", "prmt.b32 $1, a0, a1, 0x7632;"]
    lines += ["prmt.b32 $2, b0, b1, 0x5410;", "prmt.b32 $3, b0, b1, 0x7632;"]
    return "{ .reg .b32 s, t, u, v, w, z, l0, h0, l1, h1, a0, b0, a1, b1;\n" + "\n".join(lines) + " }"


@triton.constexpr_function
def lookup_constraints(bits):
    """Constraints of `lookup_ptx`: four results, the selectors, two columns' tables."""
    return ",".join(["=r"] * 4 + ["r"] * (1 + 2**bits))


@triton.constexpr_function
def code_shift(bits, j):
    """First bit of the selector of column j in its word."""
    return 16 * (j % 2) + (2 * (j // 2 % 2) if bits == 2 else 0)


@triton.jit
def quad_segment(acc, inputs, stored, size, span, s: tl.constexpr, FORMS: tl.constexpr, TILE: tl.constexpr):
    """`acc` `[rows, tokens]` plus the products of a segment's chunks; arguments as in `matmul_kernel`. The scales in
    `stored` are the tables with PTX, else the levels, and the zeros are their gains where the flag is set."""
    BITS: tl.constexpr = FORMS[s][1]
    PTX: tl.constexpr = FORMS[s][5]
    BN: tl.constexpr = TILE.rows
    BT: tl.constexpr = TILE.tokens
    M: tl.constexpr = BN // 4
    DTYPE: tl.constexpr = inputs[0].dtype.element_ty
    tile, n_rows, low, high = span
    start, width, row_size, _, _, _, _ = size
    codes = stored[0]
    quads = tile * M + tl.arange(0, M)
    lane = tl.arange(0, 16)
    acc0 = tl.zeros([M, BT], tl.float32)
    acc1 = tl.zeros([M, BT], tl.float32)
    acc2 = tl.zeros([M, BT], tl.float32)
    acc3 = tl.zeros([M, BT], tl.float32)
    for base in tl.range(low, high, 1, num_stages=TILE.stages):
        keep = quads * 4 < n_rows
        chunk = quads * 0 + base
        w0, w1, w2, w3 = _load_words(codes, quads, chunk, keep, row_size, BITS)
        by_code = split(activations(inputs, start, base, high, width, FORMS[s][4] == 3, 8, TILE), 8)
        for j in tl.static_range(8):
            word = w0
            if BITS == 2:
                word = w0 if j < 4 else w1
            elif j >= 6:
                word = w3
            elif j >= 4:
                word = w2
            elif j >= 2:
                word = w1
            selector = (word >> code_shift(BITS, j)).to(tl.int16)
            if PTX:
                n0, n1, n2, n3 = _look_up(selector, stored[1] + (base * 8 + j) * (16 << (BITS - 1)) + lane, BITS)
                n0 = n0.to(DTYPE, bitcast=True)
                n1 = n1.to(DTYPE, bitcast=True)
                n2 = n2.to(DTYPE, bitcast=True)
                n3 = n3.to(DTYPE, bitcast=True)
            else:
                columns = base * 128 + lane * 8 + j
                n0 = _load_levels(selector, stored, columns, width, 0, s, FORMS).to(DTYPE)
                n1 = _load_levels(selector, stored, columns, width, 1, s, FORMS).to(DTYPE)
                n2 = _load_levels(selector, stored, columns, width, 2, s, FORMS).to(DTYPE)
                n3 = _load_levels(selector, stored, columns, width, 3, s, FORMS).to(DTYPE)
            acc0 = dot(n0, by_code[j], acc0, TILE.wide)
            acc1 = dot(n1, by_code[j], acc1, TILE.wide)
            acc2 = dot(n2, by_code[j], acc2, TILE.wide)
            acc3 = dot(n3, by_code[j], acc3, TILE.wide)
    four = tl.join(tl.join(acc0, acc2), tl.join(acc1, acc3))  # [quads, tokens, 2, 2]: row 2 i + j of the quad
    return acc + tl.reshape(tl.permute(four, (0, 2, 3, 1)), [BN, BT])


@triton.jit
def _load_words(codes, quads, chunk, keep, row_size, BITS: tl.constexpr):
    """The words of columns 0 and 1, 2 and 3, 4 and 5, 6 and 7; at 2 bits those of columns 0 to 3 and 4 to 7, twice."""
    w0 = load_plane(codes[0], quads, chunk, keep, row_size, 16)
    w1 = load_plane(codes[1], quads, chunk, keep, row_size, 16)
    w2 = w0
    w3 = w1
    if BITS >= 3:
        w2 = load_plane(codes[2], quads, chunk, keep, row_size, 16)
    if BITS == 3:
        w3 = ((w0 >> 3) & 0x11111111) | ((w1 >> 2) & 0x22222222) | ((w2 >> 1) & 0x44444444)
    if BITS == 4:
        w3 = load_plane(codes[3], quads, chunk, keep, row_size, 16)
    return w0, w1, w2, w3


@triton.jit
def _look_up(selector, table, BITS: tl.constexpr):
    """Bits of the numbers, int16, of four rows `[quads, lanes]` each; `table`: pointers `[lanes]` to the first word of
    their columns."""
    text: tl.constexpr = lookup_ptx(BITS)
    registers: tl.constexpr = lookup_constraints(BITS)
    kinds: tl.constexpr = (tl.int16, tl.int16, tl.int16, tl.int16)
    t0 = tl.load(table)[None, :]
    t1 = tl.load(table + 16)[None, :]
    if BITS == 2:
        return tl.inline_asm_elementwise(text, registers, [selector, t0, t1], kinds, True, 2)
    else:
        t2 = tl.load(table + 32)[None, :]
        t3 = tl.load(table + 48)[None, :]
        if BITS == 3:
            return tl.inline_asm_elementwise(text, registers, [selector, t0, t1, t2, t3], kinds, True, 2)
        else:
            t4 = tl.load(table + 64)[None, :]
            t5 = tl.load(table + 80)[None, :]
            t6 = tl.load(table + 96)[None, :]
            t7 = tl.load(table + 112)[None, :]
            words = [selector, t0, t1, t2, t3, t4, t5, t6, t7]
            return tl.inline_asm_elementwise(text, registers, words, kinds, True, 2)


@triton.jit
def _load_levels(selector, stored, columns, width, R: tl.constexpr, s: tl.constexpr, FORMS: tl.constexpr):
    """Numbers fp32 of row R of the quads, from the stored levels: for inputs and GPUs without the instruction."""
    BITS: tl.constexpr = FORMS[s][1]
    GROUP: tl.constexpr = FORMS[s][2]
    number = (selector.to(tl.int32) >> (4 * R)) & ((1 << BITS) - 1)
    group = columns * 0
    if GROUP > 0:
        group = columns // GROUP
    inside = columns < width
    at = stored[1] + (group * (1 << BITS))[None, :] + number
    levels = tl.load(at, mask=inside[None, :], other=0.0).to(tl.float32)
    if FORMS[s][3]:
        levels *= tl.load(stored[2] + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return levels


@triton.jit
def quad_codes(codes, rows, columns, keep, n_rows, row_size, BITS: tl.constexpr):
    """Codes int32 of `rows` `[rows, 1]` and `columns` `[1, columns]`, one by one; `codes`: bytes of all planes."""
    j = columns & 7
    plane = ((n_rows.to(tl.int64) + 3) // 4) * row_size * 4
    half = 16 * (j & 1) + 4 * (rows & 3)  # bit in the word
    at = codes + ((rows >> 2).to(tl.int64) * row_size + (columns >> 3)) * 4 + (half >> 3)
    bit = half & 7
    if BITS == 2:
        return (tl.load(at + (j >> 2) * plane, mask=keep, other=0).to(tl.int32) >> (bit + (j & 2))) & 3
    elif BITS == 4:
        return (tl.load(at + (j >> 1) * plane, mask=keep, other=0).to(tl.int32) >> bit) & 15
    else:
        spread = j >= 6
        own = tl.load(at + (j >> 1) * plane, mask=keep & (j < 6), other=0).to(tl.int32) >> bit
        found = own & 7
        for i in tl.static_range(3):
            found |= ((tl.load(at + i * plane, mask=keep & spread, other=0).to(tl.int32) >> (bit + 3)) & 1) << i
        return found
