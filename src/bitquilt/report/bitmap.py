"""Small pictures of where a layer's bits went: `picture` returns SVG paths, `columns_for` their detail.

A picture is a skyline. Input channels run from left to right and the height is the bits, `UNIT` units each, so the
painted area is the bits spent and nothing depends on colour alone. A layer with more runs than the picture has columns
is drawn column by column: the height is the mean, split into the share of each width, most bits at the bottom.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from bitquilt.core.types import run_lengths

UNIT = 10  # height of one bit
_FEWEST, _MOST = 24, 160  # columns of a picture
_PAGE_BYTES = 1_500_000  # for all pictures together
_STEP_BYTES = 7  # "V37h1" and what it shares, measured 6.2 to 6.9

Runs = Sequence[tuple[int, int]]


def columns_for(layers: Sequence[Runs]) -> int:
    """Columns per picture that keep all of them within 1.5 MB: 160 for up to 500 layers of three widths."""
    levels = sum(len({bits for bits, _ in runs}) for runs in layers)
    return max(_FEWEST, min(_MOST, _PAGE_BYTES // (_STEP_BYTES * max(1, levels))))


def picture(runs: Runs, columns: int) -> tuple[int, list[tuple[int, str]]]:
    """Return the width of the picture in its own units, and (bits, path) to paint one after the other.

    `runs` are (bits, channels) in column order. With at most `columns` runs the picture is exact, in units of channels.
    """
    merged = [(bits, sum(width for _, width in part)) for bits, part in groupby(runs, key=itemgetter(0))]
    if len(merged) <= columns:
        return sum(width for _, width in merged), list(_exact(merged))
    return columns, list(_shares(merged, columns))


def _exact(runs: Runs) -> Iterator[tuple[int, str]]:
    """Bars up from the base line y = 0 (up is negative), one path per width."""
    for bits in sorted({bits for bits, _ in runs}):
        start, parts = 0, []
        for here, width in runs:
            if here == bits:
                parts.append(f"M{start} 0v-{UNIT * bits}h{width}V0z")
            start += width
        yield bits, "".join(parts)


def _shares(runs: Runs, columns: int) -> Iterator[tuple[int, str]]:
    """Skylines to paint over each other: the mean of all widths first, then without the narrowest, and so on."""
    height: NDArray[np.float64] = np.zeros(columns)
    lines = []
    for bits in sorted({bits for bits, _ in runs}, reverse=True):
        height = height + bits * _share(runs, bits, columns)
        lines.append((bits, np.rint(UNIT * height).astype(int).tolist()))
    for bits, line in reversed(lines):
        steps = "".join(f"V-{y}h{count}" for y, count in run_lengths(line))
        yield bits, f"M0 0{steps}V0z".replace("V-0", "V0")


def _share(runs: Runs, bits: int, columns: int) -> NDArray[np.float64]:
    """The share of channels with `bits` bits in each column of the picture."""
    widths = np.array([width for _, width in runs])
    ends = np.cumsum(widths)
    mine = np.cumsum(np.where(np.array([here for here, _ in runs]) == bits, widths, 0))
    edges = np.linspace(0, ends[-1], columns + 1)
    below = np.interp(edges, np.concatenate([[0], ends]), np.concatenate([[0], mine]))
    return np.diff(below) / np.diff(edges)
