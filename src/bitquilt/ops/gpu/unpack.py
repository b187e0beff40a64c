"""How does a GPU thread get numbers out of a row's bit stream? Device functions shared by the kernels of this room.

A chunk is 128 stored columns of one segment. It is read as UNITS of `C` neighbouring codes in one int32: eight codes of
up to four bits, four of more. Code j of all units of a chunk makes one operand of a matrix product, so no code ever
has to change its lane; the activations are split the same way, and they are few.

    unit u, 2 bits, C = 8:   columns 8u .. 8u+7 of the chunk, column 8u+j in bits 2j, 2j+1

Three readings of the same bytes: as whole units (int8, int16, int32) for 1, 2, 4 and 8 bits and widths of whole chunks;
two words and a shift with a pattern that repeats for 3, 5, 6 and 7; two words and any shift for odd widths.
"""

import triton
import triton.language as tl

UNIFORM, CODEBOOK, MX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_MANTISSA = {"fp16": 10, "bf16": 7}
_ONE = {"fp16": 0x3C00, "bf16": 0x3F80}


@triton.constexpr_function
def unpack_steps(bits, dtype):
    """How the codes of two units become pairs of half-precision numbers without a conversion instruction.

    Per code: (view, shift, mask, exponent e). The low 16 bits of both units, shifted right by `view` before, share one
    register; it is shifted by `shift`, masked, and ORed into the mantissa of 2^m (m: its bits), which makes
    2^m + code 2^e exactly; times 2^-e, less 2^(m - e), is the code. Empty where a code does not fit the mantissa.
    """
    mantissa, count = _MANTISSA[dtype], 8 if bits <= 4 else 4
    if bits > mantissa:
        return []
    steps, view, shift = [], 0, 0
    for j in range(count):
        if bits * (j + 1) - view > 16:
            view, shift = bits * j, 0
        place = bits * j - view - shift
        if place + bits > mantissa:
            shift, place = bits * j - view, 0
        steps.append((view, shift, (1 << bits) - 1 << place, place))
    return steps


def has_ptx(bits: int, dtype: str) -> bool:
    """Whether `unpack_ptx` knows these codes in this type."""
    return bits <= _MANTISSA.get(dtype, 0)


@triton.constexpr_function
def unpack_view(j, bits, dtype):
    """The view of code j, see `unpack_steps`."""
    return unpack_steps(bits, dtype)[j][0]


@triton.constexpr_function
def unpack_ptx(j, bits, dtype):
    """Code j of `unpack_steps`: from two int16 in one register ($1) to two numbers ($0). An and-or, a multiply-add and
    sometimes a shift for two codes; conversions would take eight."""
    mantissa = _MANTISSA[dtype]
    _view, shift, mask, place = unpack_steps(bits, dtype)[j]
    magic, scale, offset = _power(mantissa, dtype), _power(-place, dtype), _power(mantissa - place, dtype)
    return "\n".join(
        [
            "{ .reg .b32 t, s, b;",
            f"shr.u32 t, $1, {shift};",
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
def load_units(codes, rows, chunk, keep, width, row_size, total, BITS: tl.constexpr, C: tl.constexpr,
               READ: tl.constexpr):  # fmt: skip
    """Units `[rows, 128 / C]` of `chunk` of `rows` (`[rows]` both), where `keep`; int8, int16 or int32, the bits above
    the last code are anything.

    READ 2: `codes` holds whole units, `row_size` counts them. 1: int32 words, `row_size` of them to a row, each chunk
    begins with one. 0: int32 words, `total` in all, `row_size` bytes to a row, nothing is aligned."""
    U: tl.constexpr = 128 // C
    unit = tl.arange(0, U)
    if READ == 2:
        at = rows.to(tl.int64)[:, None] * row_size + (chunk[:, None] * U + unit[None, :])
        return tl.load(codes + at, mask=keep[:, None], other=0, eviction_policy="evict_first")
    else:
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
def code_operand(units, J: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Code J of each unit in DTYPE, exactly."""
    if PTX:
        VIEW: tl.constexpr = unpack_view(J, BITS, "fp16" if tl.float16 == DTYPE else "bf16")
        half = (units >> VIEW).to(tl.int16)
        if tl.float16 == DTYPE:
            return tl.inline_asm_elementwise(unpack_ptx(J, BITS, "fp16"), "=r,r", [half], tl.float16, True, 2)
        else:
            return tl.inline_asm_elementwise(unpack_ptx(J, BITS, "bf16"), "=r,r", [half], tl.bfloat16, True, 2)
    else:
        return code_number(units.to(tl.int32), J, BITS).to(DTYPE)


@triton.jit
def code_number(units, J: tl.constexpr, BITS: tl.constexpr):
    """Code J of each unit (int32), fp32, through the mantissa of 2^23: conversions run at a quarter of the speed."""
    return ((code(units, J, BITS) | 0x4B000000).to(tl.float32, bitcast=True)) - 8388608.0


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
