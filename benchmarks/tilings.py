"""`neighbours` are the tilings of a fused product that a search by measuring tries next."""

from dataclasses import replace

from bitquilt.ops.gpu.tiling import Tiling


def neighbours(tiling: Tiling) -> list[Tiling]:
    """Return the possible tilings that differ from `tiling` in one number, for a search by measuring."""
    changes = {
        "rows": (tiling.rows // 2, tiling.rows * 2),
        "parts": (tiling.parts // 2, tiling.parts + 1, tiling.parts * 2),
        "warps": (tiling.warps // 2, tiling.warps * 2),
        "stages": (tiling.stages - 1, tiling.stages + 2),
        "stack": (tiling.stack // 2, tiling.stack * 2),
    }
    found = [replace(tiling, **{name: value}) for name, values in changes.items() for value in values]
    return [c for c in dict.fromkeys(found) if _possible(c)]


def _possible(tiling: Tiling) -> bool:
    least, columns = min(tiling.rows, tiling.stack, tiling.parts, tiling.warps), tiling.tokens * tiling.stack
    tile = tiling.rows * tiling.stack
    return least >= 1 and tiling.stages >= 2 and 8 <= columns <= 64 and max(16, 16 * tiling.warps) <= tile <= 1024
