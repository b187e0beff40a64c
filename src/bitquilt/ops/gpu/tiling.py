"""How is a product cut into programs? choose(rows, chunks, tokens, processors) -> Config."""

from dataclasses import dataclass, replace

# Four warps with 256 rows of the tile each take 2.2 instructions per 2-bit weight, with 128 rows 2.6 (counted in the
# machine code), and four stages of 256 x 32 bytes keep 32 KB under way; bandwidth times latency of an H200 is 25 KB for
# each of its 132 multiprocessors. So one large program for each comes before two small ones.
_TALL, _FULL = 256, 0.9
# By tokens: 16 with 256 rows take 2.7 instructions per weight, with 128 3.3, with 64 5.3; more tokens need registers.
_ROWS = {16: 256, 32: 128, 64: 64}
# Codebooks: 64 quads for four warps take 3.4 instructions per 3-bit weight, 128 take 2.9 but twice the registers.
_QUAD_ROWS = 256
MAX_QUADS = 64  # tokens of a codebook's product, 16 at a time
MAX_FUSED = 512  # tokens; above, the weight is written out once and multiplied by the library


@dataclass(frozen=True)
class Config:
    """`rows` and `tokens` of a tile, `stack` chunks at once, `parts` programs to a row, `warps`, `stages` of loads."""

    rows: int
    tokens: int
    stack: int
    parts: int
    warps: int
    stages: int


def choose(rows: int, chunks: int, tokens: int, processors: int, quads: bool = False) -> Config:
    """For a product of `tokens` tokens with `rows` rows of `chunks` chunks, on so many multiprocessors."""
    if quads:  # 96 registers, 30 KB: several to a multiprocessor, so two for each
        width = 8 if tokens <= 8 else 16  # four sums for each row and token are registers
        return _shared(rows, chunks, Config(_QUAD_ROWS, width, 1, 1, 4, 3), 2 * processors)
    if tokens <= 8:
        width = 1 << (tokens - 1).bit_length()
        stack = 8 // width
        tall = _TALL // stack
        while tall > max(16, 64 // stack) and -(-rows // tall) < _FULL * processors:
            tall //= 2
        return _shared(rows, chunks, Config(tall, width, stack, 1, 4, 4), processors)
    if tokens <= 64:
        width = max(16, 1 << (tokens - 1).bit_length())
        tall = _ROWS[width]
        while tall > 64 and tall >= 2 * rows:
            tall //= 2
        return _shared(rows, chunks, Config(tall, width, 1, 1, 4, 4), processors)
    return Config(128, 64, 1, 1, 8, 3)


def for_quads(config: Config) -> Config:
    """The same for a weight with codes in quads: whole tiles of tokens, no stack."""
    return replace(config, rows=max(64, config.rows), tokens=max(8, config.tokens), stack=1)


def neighbours(config: Config) -> list[Config]:
    """Cuts that differ from `config` in one number, for whoever looks for a better one by measuring."""
    changes = {
        "rows": (config.rows // 2, config.rows * 2), "parts": (config.parts // 2, config.parts + 1, config.parts * 2),
        "warps": (config.warps // 2, config.warps * 2), "stages": (config.stages - 1, config.stages + 2),
        "stack": (config.stack // 2, config.stack * 2),
    }  # fmt: skip
    found = [replace(config, **{name: value}) for name, values in changes.items() for value in values]
    return [c for c in dict.fromkeys(found) if _possible(c)]


def _possible(config: Config) -> bool:
    least, columns = min(config.rows, config.stack, config.parts, config.warps), config.tokens * config.stack
    tile = config.rows * config.stack
    return least >= 1 and config.stages >= 2 and 8 <= columns <= 64 and max(16, 16 * config.warps) <= tile <= 1024


def _shared(rows: int, chunks: int, config: Config, processors: int) -> Config:
    """Share rows out where there are too few tiles of them, each part at least four steps long."""
    tiles = -(-rows // config.rows)
    steps = -(-chunks // config.stack)
    parts = max(1, min(int(_FULL * processors) // tiles, steps // 4))
    return Config(config.rows, config.tokens, config.stack, parts, config.warps, config.stages)
