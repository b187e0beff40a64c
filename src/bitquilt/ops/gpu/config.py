"""How is a product cut into programs? choose(rows, chunks, tokens, processors) -> Config."""

from dataclasses import dataclass

# Programs per multiprocessor that keep enough loads under way: with two of four warps each, 16 rows of 8 chunks of
# 32 bytes and four stages, 32 KB; bandwidth times latency of an H200 is 25 KB for each of its 132.
_WAVES = 2
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


def choose(rows: int, chunks: int, tokens: int, processors: int) -> Config:
    """For a product of `tokens` tokens with `rows` rows of `chunks` chunks, on so many multiprocessors."""
    if tokens <= 8:
        width = 1 << (tokens - 1).bit_length()
        stack = 8 // width
        tall = 128 // stack
        while tall > max(16, 64 // stack) and -(-rows // tall) < _WAVES * processors:
            tall //= 2
        return _shared(rows, chunks, Config(tall, width, stack, 1, 4, 4), processors)
    if tokens <= 64:
        width = max(16, 1 << (tokens - 1).bit_length())
        return _shared(rows, chunks, Config(64, width, 1, 1, 4, 4), processors)
    return Config(128, 64, 1, 1, 8, 3)


def _shared(rows: int, chunks: int, config: Config, processors: int) -> Config:
    """Share rows out where there are too few tiles of them, each part at least four steps long."""
    tiles = -(-rows // config.rows)
    steps = -(-chunks // config.stack)
    parts = max(1, min(_WAVES * processors // tiles, steps // 4))
    return Config(config.rows, config.tokens, config.stack, parts, config.warps, config.stages)
