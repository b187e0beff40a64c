"""Where did a layer's bits go, in one small picture? `picture(runs, columns) -> [(bits, SVG path)]`, painted in order.

A skyline: left to right the input channels, height the bits, `UNIT` units each; so the painted area is the bits spent,
and nothing depends on colour alone. A layer of more channel groups than the picture has columns is drawn by the
column: its height is the mean, cut into the shares of each width, most bits at the bottom. Paths hold no text.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bitquilt.core.types import run_lengths

UNIT = 10  # height of one bit
_FEWEST, _MOST = 24, 160  # columns of a picture
_PAGE_BYTES = 1_500_000  # of all pictures together
_STEP_BYTES = 7  # "V37h1" and what it shares, measured 6.2 to 6.9

Runs = Sequence[tuple[int, int]]


def columns_for(layers: Sequence[Runs]) -> int:
    """Columns of every picture such that all of them stay within 1.5 MB: 160 for up to 500 layers of three widths."""
    levels = sum(len({bits for bits, _ in runs}) for runs in layers)
    return max(_FEWEST, min(_MOST, _PAGE_BYTES // (_STEP_BYTES * max(1, levels))))


def picture(runs: Runs, columns: int) -> tuple[int, list[tuple[int, str]]]:
    """Width of the picture in its own units, and (bits, path) to paint one after the other.

    `runs` are (bits, channels) in column order. Exact, in units of channels, where there are few enough runs.
    """
    merged = _merge(runs)
    if len(merged) <= columns:
        return sum(width for _, width in merged), list(_exact(merged))
    return columns, list(_shares(merged, columns))


def _merge(runs: Runs) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for bits, width in runs:
        if merged and merged[-1][0] == bits:
            merged[-1] = (bits, merged[-1][1] + width)
        else:
            merged.append((bits, width))
    return merged


def _exact(runs: Runs) -> Iterator[tuple[int, str]]:
    """Bars from the base line up (y = 0 is the base, upwards is negative): one path for each width."""
    for bits in sorted({bits for bits, _ in runs}):
        start, parts = 0, []
        for here, width in runs:
            if here == bits:
                parts.append(f"M{start} 0v-{UNIT * bits}h{width}V0z")
            start += width
        yield bits, "".join(parts)


def _shares(runs: Runs, columns: int) -> Iterator[tuple[int, str]]:
    """Skylines over the column's mean: all widths first, then without the fewest bits, and so on, one over another."""
    height: NDArray[np.float64] = np.zeros(columns)
    lines = []
    for bits in sorted({bits for bits, _ in runs}, reverse=True):
        height = height + bits * _share(runs, bits, columns)
        lines.append((bits, np.rint(UNIT * height).astype(int).tolist()))
    for bits, line in reversed(lines):
        steps = "".join(f"V-{y}h{count}" for y, count in run_lengths(line))
        yield bits, f"M0 0{steps}V0z".replace("V-0", "V0")


def _share(runs: Runs, bits: int, columns: int) -> NDArray[np.float64]:
    """Of each column of the picture, the share of its channels with so many bits."""
    widths = np.array([width for _, width in runs])
    ends = np.cumsum(widths)
    mine = np.cumsum(np.where(np.array([here for here, _ in runs]) == bits, widths, 0))
    edges = np.linspace(0, ends[-1], columns + 1)
    below = np.interp(edges, np.concatenate([[0], ends]), np.concatenate([[0], mine]))
    return np.diff(below) / np.diff(edges)
