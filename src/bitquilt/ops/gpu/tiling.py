"""`choose_tiling` decides how the fused product is split into programs."""

from dataclasses import dataclass, replace

# Four warps with 256 rows of the tile each take 2.2 instructions per 2-bit weight, with 128 rows 2.6 (counted in the
# machine code). Four stages of 256 x 32 bytes keep 32 KB of loads under way; bandwidth times latency of an H200 is
# 25 KB for each of its 132 multiprocessors. So one large program per multiprocessor is preferred to two small ones.
_TALL, _FULL = 256, 0.9
# By tokens: 16 with 256 rows take 2.7 instructions per weight, with 128 3.3, with 64 5.3; more tokens need registers.
_ROWS = {16: 256, 32: 128, 64: 64}
# Codebooks: 64 quads for four warps take 3.4 instructions per 3-bit weight, 128 take 2.9 but twice the registers.
_QUAD_ROWS = 256
MAX_QUADS = 64  # tokens of a codebook's product, 16 at a time
MAX_FUSED = 512  # tokens; for more the weight is written out once and multiplied by the library


@dataclass(frozen=True)
class Tiling:
    """One way to split a product into programs.

    `rows` and `tokens` of a program's tile, `stack` chunks at once, `parts` programs to a row, `warps`, and `stages` of
    loads under way.
    """

    rows: int
    tokens: int
    stack: int
    parts: int
    warps: int
    stages: int


def choose_tiling(rows: int, chunks: int, tokens: int, processors: int, quads: bool = False) -> Tiling:
    """Choose the tiling of `tokens` tokens times `rows` rows of `chunks` chunks, on that many multiprocessors."""
    if quads:  # 96 registers, 30 KB: several to a multiprocessor, so two for each
        width = 8 if tokens <= 8 else 16  # four sums for each row and token are registers
        return _shared(rows, chunks, Tiling(_QUAD_ROWS, width, 1, 1, 4, 3), 2 * processors)
    if tokens <= 8:
        width = 1 << (tokens - 1).bit_length()
        stack = 8 // width
        tall = _TALL // stack
        while tall > max(16, 64 // stack) and -(-rows // tall) < _FULL * processors:
            tall //= 2
        return _shared(rows, chunks, Tiling(tall, width, stack, 1, 4, 4), processors)
    if tokens <= 64:
        width = max(16, 1 << (tokens - 1).bit_length())
        tall = _ROWS[width]
        while tall > 64 and tall >= 2 * rows:
            tall //= 2
        return _shared(rows, chunks, Tiling(tall, width, 1, 1, 4, 4), processors)
    return Tiling(128, 64, 1, 1, 8, 3)


def for_quads(tiling: Tiling) -> Tiling:
    """Return the nearest tiling for codes in quads, which take whole tiles of tokens and no stack."""
    return replace(tiling, rows=max(64, tiling.rows), tokens=max(8, tiling.tokens), stack=1)


def _shared(rows: int, chunks: int, tiling: Tiling, processors: int) -> Tiling:
    """Split every row into parts where there are too few tiles, each part at least four steps long."""
    tiles = -(-rows // tiling.rows)
    steps = -(-chunks // tiling.stack)
    parts = max(1, min(int(_FULL * processors) // tiles, steps // 4))
    return replace(tiling, parts=parts)
