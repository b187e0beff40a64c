"""Numbers out of a row's bit stream: device functions that the kernels of this room share.

`load_plane` and `load_words` read codes, `operand` and `code` unpack them, `uniform_step`, `mx_step` and `mx_element`
decode scales and elements.

A chunk is 128 stored columns of one segment. It is read as UNITS of `C` neighbouring codes. Code j of all units of a
chunk makes one operand of a matrix product, so no code ever has to change its lane; the activations are split the same
way, and they are few.

    unit u, 2 bits, C = 8:   columns 8u .. 8u+7 of the chunk, column 8u+j in bits 2j, 2j+1

Units are read in three ways. READ 2, whole units (int8, int16, int32): 1, 2, 4 and 8 bits, and 3, 5, 6 and 7 where the
codes were arranged in planes (`ops.gpu_order`), each of which is read like that; a code that two planes share makes two
operands. READ 1 and 0, the stored stream: two words and a shift, whose pattern repeats where widths are whole chunks.
"""

import triton
import triton.language as tl

UNIFORM, CODEBOOK, MX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_MANTISSA = {"fp16": 10, "bf16": 7}
_ONE = {"fp16": 0x3C00, "bf16": 0x3F80}


@triton.constexpr_function
def plane_sizes(bits):
    """Bits of each plane of a unit: eight codes (`ops.gpu_order`), or four codes of eight bits."""
    return [32] if bits == 8 else [8 * size for size in (4, 2, 1) if bits & size]


@triton.constexpr_function
def plane_count(bits):
    """Number of planes."""
    return len(plane_sizes(bits))


@triton.constexpr_function
def plane_part(bits, plane, field):
    """A plane's bytes in a unit: the first (field 0) or their number (field 1)."""
    sizes = plane_sizes(bits)
    return (sum(sizes[:plane]) // 8, sizes[plane] // 8)[field]


@triton.constexpr_function
def pieces(bits, plane):
    """Contents of `plane`: (code, first bit in the plane, bits, first bit in the code). `plane` -1: the unit is one
    word of `unit_codes(bits)` codes."""
    if plane < 0:
        return [(j, bits * j, bits, 0) for j in range(unit_codes(bits))]
    sizes = plane_sizes(bits)
    start, end = sum(sizes[:plane]), sum(sizes[: plane + 1])
    found = []
    for j in range(4 if bits == 8 else 8):
        low, high = max(bits * j, start), min(bits * (j + 1), end)
        if low < high:
            found.append((j, low - start, high - low, low - bits * j))
    return found


@triton.constexpr_function
def piece_count(bits, plane):
    """Number of codes, or parts of codes, in a plane."""
    return len(pieces(bits, plane))


@triton.constexpr_function
def piece(bits, plane, i, field):
    """One number of `pieces`."""
    return pieces(bits, plane)[i][field]


@triton.constexpr_function
def unit_codes(bits):
    """Number of codes in a unit that is one word."""
    return 8 if bits <= 4 else 4


@triton.constexpr_function
def unpack_step(bits, plane, i, dtype):
    """Plan the conversion of one piece of two units into two half-precision numbers: (view, shift, mask, place).

    No conversion instruction is needed. The low 16 bits of both units, after a right shift by `view`, share a register.
    The register is shifted right by `shift` (left where that is negative), masked, and ORed into the mantissa of 2^m,
    where m is the number of mantissa bits. That is 2^m + piece 2^place exactly. A multiply-add with 2^(e - place) and
    -2^(m + e - place) leaves the piece times 2^e, its worth in the code.
    """
    mantissa = _MANTISSA[dtype]
    view, shift = 0, 0
    for _, first, width, _ in pieces(bits, plane)[: i + 1]:
        if first + width - view > 16:
            view, shift = first, 0
        if first - view - shift + width > mantissa:
            shift = first - view
    worth = pieces(bits, plane)[i][3]
    place = max(first - view - shift, mantissa + worth - 15)  # 2^16 is no number in fp16
    return view, first - view - place, (1 << width) - 1 << place, place


def has_ptx(bits: int, dtype: str) -> bool:
    """Whether `unpack_ptx` knows these codes in this type."""
    return bits <= _MANTISSA.get(dtype, 0)


@triton.constexpr_function
def unpack_view(bits, plane, i, dtype):
    """The view of a piece, see `unpack_step`."""
    return unpack_step(bits, plane, i, dtype)[0]


@triton.constexpr_function
def unpack_ptx(bits, plane, i, dtype):
    """PTX of `unpack_step`, from two int16 in one register ($1) to two numbers ($0). Two codes take an and-or, a
    multiply-add and sometimes a shift; conversions would take eight instructions."""
    mantissa, worth = _MANTISSA[dtype], pieces(bits, plane)[i][3]
    _view, shift, mask, place = unpack_step(bits, plane, i, dtype)
    magic, scale = _power(mantissa, dtype), _power(worth - place, dtype)
    offset = _power(mantissa + worth - place, dtype)
    return "\n".join(
        [
            "{ .reg .b32 t, s, b;",
            f"shr.u32 t, $1, {shift};" if shift >= 0 else f"shl.b32 t, $1, {-shift};",
            f"lop3.b32 t, t, {mask * 0x10001:#x}, {magic * 0x10001:#x}, 0xEA;",  # (t & mask) | magic
            f"mov.b32 s, {scale * 0x10001:#x};",
            f"mov.b32 b, {(offset | 0x8000) * 0x10001:#x};",
            f"fma.rn.{'f16x2' if dtype == 'fp16' else 'bf16x2'} $0, t, s, b; }}",
        ]
    )


@triton.constexpr_function
def _power(exponent, dtype):
    """2^exponent as the bits of a half-precision number."""
    return _ONE[dtype] + (exponent << _MANTISSA[dtype])


@triton.jit
def load_plane(plane, rows, chunk, keep, row_size, U: tl.constexpr):
    """Load one plane of the U units of `chunk` in `rows` (both `[rows]`), where `keep`: `[rows, U]`. `row_size`: units
    of a row."""
    at = rows.to(tl.int64)[:, None] * row_size + (chunk[:, None] * U + tl.arange(0, U)[None, :])
    return tl.load(plane + at, mask=keep[:, None], other=0, eviction_policy="evict_first")


@triton.jit
def load_words(codes, rows, chunk, keep, size, BITS: tl.constexpr, READ: tl.constexpr):
    """Load units `[rows, 128 / C]` int32 of C codes from the bit streams of `rows`; bits above the last code are noise.

    `codes` holds int32 words, `size` is as in `product_kernel`. READ 1: a row is so many words, and each chunk begins
    with one. READ 0: a row is so many bytes, and nothing is aligned.
    """
    _, width, row_size, total, _, _, _ = size
    C: tl.constexpr = unit_codes(BITS)
    U: tl.constexpr = 128 // C
    unit = tl.arange(0, U)
    if READ == 1:
        bit = (unit * (BITS * C))[None, :]
        word = (rows.to(tl.int64) * row_size + chunk * (4 * BITS))[:, None] + (bit >> 5)
        inside = keep[:, None]
        follows = inside & ((bit & 31) + BITS * C > 32)
    else:
        start = rows.to(tl.int64) * row_size
        bit = ((start & 3) * 8).to(tl.int32)[:, None] + (chunk[:, None] * U + unit[None, :]) * (BITS * C)
        word = (start >> 2)[:, None] + (bit >> 5)
        inside = keep[:, None] & (chunk[:, None] * 128 + unit[None, :] * C < width) & (word < total)
        follows = inside & (word + 1 < total)
    low = tl.load(codes + word, mask=inside, other=0)
    high = tl.load(codes + word + 1, mask=follows, other=0)
    both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return (both >> (bit & 31)).to(tl.int32)


@triton.jit
def operand(
    units, BITS: tl.constexpr, PLANE: tl.constexpr, PIECE: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):
    """One piece of `units` times its worth in the code, in DTYPE, exactly. PLANE -1: the units are words."""
    if PTX:
        VIEW: tl.constexpr = unpack_view(BITS, PLANE, PIECE, "fp16" if tl.float16 == DTYPE else "bf16")
        half = (units >> VIEW).to(tl.int16)
        if tl.float16 == DTYPE:
            return tl.inline_asm_elementwise(
                unpack_ptx(BITS, PLANE, PIECE, "fp16"), "=r,r", [half], tl.float16, True, 2
            )
        else:
            return tl.inline_asm_elementwise(
                unpack_ptx(BITS, PLANE, PIECE, "bf16"), "=r,r", [half], tl.bfloat16, True, 2
            )
    else:
        number = (units.to(tl.int32) >> piece(BITS, PLANE, PIECE, 1)) & ((1 << piece(BITS, PLANE, PIECE, 2)) - 1)
        return (_as_float(number) * (1 << piece(BITS, PLANE, PIECE, 3))).to(DTYPE)


@triton.jit
def _as_float(number):
    """fp32 of int32 below 2^23, through the mantissa of 2^23: conversions run at a quarter of the speed."""
    return (number | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def code_number(units, J: tl.constexpr, BITS: tl.constexpr):
    """Code J of each unit (int32), fp32."""
    return _as_float(code(units, J, BITS))


@triton.jit
def code(units, J: tl.constexpr, BITS: tl.constexpr):
    """Code J of each unit, both int32."""
    return (units >> (BITS * J)) & ((1 << BITS) - 1)


@triton.jit
def decode_zero(zero, rows, group, keep, zero_size, BITS: tl.constexpr):
    """Integer zeros fp32 of `rows` in `group`, which broadcast. A group's zeros are one bit stream over the rows,
    `zero_size` bytes long."""
    bit = rows * BITS
    byte = group.to(tl.int64) * zero_size + (bit >> 3)
    found = tl.load(zero + byte, mask=keep, other=0).to(tl.int32)
    if 8 % BITS != 0:
        straddles = keep & ((bit & 7) + BITS > 8)
        found |= tl.load(zero + byte + 1, mask=straddles, other=0).to(tl.int32) << 8
    return ((found >> (bit & 7)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def uniform_step(stored, size, rows, group, keep, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """(step, base) fp32 of `rows` in `group`: weights are step * (code - base), or base + step * code for one bit with
    two levels. `stored` and `size` as in `product_kernel`."""
    _, scale, zero = stored
    _, _, _, _, groups, zero_size, _ = size
    at = rows.to(tl.int64) * groups + group
    step = tl.load(scale + at, mask=keep, other=0.0).to(tl.float32)
    if SYMMETRIC:
        base = tl.zeros_like(step) + ((1 << BITS) - 1) / 2
    elif BITS == 1:
        base = tl.load(zero + at, mask=keep, other=0.0).to(tl.float32)
    else:
        base = decode_zero(zero, rows, group, keep, zero_size, BITS)
    return step, base


@triton.jit
def mx_element(codes, BITS: tl.constexpr, E2M3: tl.constexpr):
    """Elements (`ops.microscaling`) fp32. Sign, exponent and mantissa are put where fp16 has them, and a power of two
    makes up for fp16's larger bias; its subnormal numbers are the element's."""
    MANTISSA: tl.constexpr = 1 if BITS == 4 else (3 if BITS == 8 or E2M3 else 2)
    BIAS: tl.constexpr = 7 if BITS == 8 else (3 if BITS == 6 and not E2M3 else 1)
    size = codes & ((1 << (BITS - 1)) - 1)
    half = ((codes >> (BITS - 1)) << 15) | (size << (10 - MANTISSA))
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * (1 << (15 - BIAS))


@triton.jit
def mx_step(scale, rows, group, keep, groups):
    """2^(byte - 127) of the E8M0 `scale` of `rows` in `group`, fp32; byte 0 is a subnormal number."""
    byte = tl.load(scale + rows.to(tl.int64) * groups + group, mask=keep, other=0).to(tl.int32)
    bits = tl.where(byte == 0, 1 << 22, byte << 23)
    return bits.to(tl.float32, bitcast=True)
