"""How does a GPU thread get numbers out of a row's bit stream? Device functions shared by the kernels of this room.

A chunk is 128 stored columns of one segment. It is read as UNITS of `C` neighbouring codes. Code j of all units of a
chunk makes one operand of a matrix product, so no code ever has to change its lane; the activations are split the same
way, and they are few.

    unit u, 2 bits, C = 8:   columns 8u .. 8u+7 of the chunk, column 8u+j in bits 2j, 2j+1

Three readings: as whole units (int8, int16, int32) for 1, 2, 4 and 8 bits and, where the codes were arranged in planes
(`ops.planes`), for 3, 5, 6 and 7: each plane is read like that; a code that two planes share makes two operands. From
the stored stream two words and a shift, with a pattern that repeats where widths are whole chunks, any shift elsewhere.
"""

import triton
import triton.language as tl

UNIFORM, CODEBOOK, MX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_MANTISSA = {"fp16": 10, "bf16": 7}
_ONE = {"fp16": 0x3C00, "bf16": 0x3F80}


@triton.constexpr_function
def plane_sizes(bits):
    """Bits of each plane of a unit of eight codes (`ops.planes`), of four codes at eight bits."""
    return [32] if bits == 8 else [8 * size for size in (4, 2, 1) if bits & size]


@triton.constexpr_function
def plane_count(bits):
    """How many planes there are."""
    return len(plane_sizes(bits))


@triton.constexpr_function
def plane_part(bits, plane, field):
    """Of the bytes of a unit: (the plane's first, how many it has)."""
    sizes = plane_sizes(bits)
    return (sum(sizes[:plane]) // 8, sizes[plane] // 8)[field]


@triton.constexpr_function
def pieces(bits, plane):
    """What `plane` holds: (code, first bit in the plane, bits, first bit in the code). `plane` -1: the unit is one word
    of `unit_codes(bits)` codes."""
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
    """How many codes, or parts of codes, a plane holds."""
    return len(pieces(bits, plane))


@triton.constexpr_function
def piece(bits, plane, i, field):
    """A number of `pieces`."""
    return pieces(bits, plane)[i][field]


@triton.constexpr_function
def unit_codes(bits):
    """Codes of a unit that is one word."""
    return 8 if bits <= 4 else 4


@triton.constexpr_function
def unpack_step(bits, plane, i, dtype):
    """How a piece of two units becomes a pair of half-precision numbers without a conversion instruction: (view, shift,
    mask, place).

    The low 16 bits of both units, shifted right by `view` before, share one register; it is shifted by `shift` (left
    where that is negative), masked, and ORed into the mantissa of 2^m (m: its bits), which makes 2^m + piece 2^place
    exactly; times 2^(e - place), less 2^(m + e - place), is the piece times 2^e, its worth in the code.
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
    """`unpack_step`: from two int16 in one register ($1) to two numbers ($0). An and-or, a multiply-add and sometimes a
    shift for two codes; conversions would take eight."""
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
    """What one plane holds of the U units `[rows, U]` of `chunk` of `rows` (`[rows]` both), where `keep`; `row_size`:
    units of a row."""
    at = rows.to(tl.int64)[:, None] * row_size + (chunk[:, None] * U + tl.arange(0, U)[None, :])
    return tl.load(plane + at, mask=keep[:, None], other=0, eviction_policy="evict_first")


@triton.jit
def load_words(codes, rows, chunk, keep, width, row_size, total, BITS: tl.constexpr, READ: tl.constexpr):
    """Units `[rows, 128 / C]` int32 of C codes from the bit stream of the row, the bits above the last code are
    anything. `codes` holds int32 words; READ 1: `row_size` of them to a row, each chunk begins with one. 0: `total` in
    all, `row_size` bytes to a row, nothing is aligned."""
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
    """A piece of `units`, a plane's or (-1) words, times its worth in the code: in DTYPE, exactly."""
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
    """Of int32 below 2^23, through the mantissa of 2^23: conversions run at a quarter of the speed."""
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
    """Integer zeros of `rows` in `group` (one a broadcast of the other), fp32: a group's zeros are one bit stream over
    the rows, `zero_size` bytes long."""
    bit = rows * BITS
    byte = group.to(tl.int64) * zero_size + (bit >> 3)
    found = tl.load(zero + byte, mask=keep, other=0).to(tl.int32)
    if 8 % BITS != 0:
        straddles = keep & ((bit & 7) + BITS > 8)
        found |= tl.load(zero + byte + 1, mask=straddles, other=0).to(tl.int32) << 8
    return ((found >> (bit & 7)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def uniform_step(scale, zero, rows, group, keep, groups, zero_size, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """(step, base) fp32 of `rows` in `group`, such that weights are step * (code - base); at one bit with two levels
    base + step * code."""
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
    """Elements (`ops.mx`) fp32: sign, exponent and mantissa are put where fp16 has them, and a power of two makes up
    for fp16's larger bias; its subnormal numbers are the element's."""
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
