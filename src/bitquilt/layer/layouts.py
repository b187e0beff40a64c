"""Layouts of plans before anything is solved: `grouped_layout` for column groups, `channel_layout` for codebooks.

Both describe what `assemble` will store, for arrays of millions of groups or channels too.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitquilt.core.types import MAX_BITS, Format, Layout
from bitquilt.layer.codebook_weight import LevelTables

GROUP_WIDTHS = tuple(range(2, MAX_BITS + 1))
WIDTHS_FROM_ONE = (1, *GROUP_WIDTHS)
_GROUP_SIZE_STEP = 8
Widths = Sequence[int] | NDArray[np.integer[Any]]


def check_group_size(group_size: int) -> None:
    """Raise ValueError unless groups of this many columns can be packed."""
    if group_size < _GROUP_SIZE_STEP or group_size % _GROUP_SIZE_STEP:
        raise ValueError(f"group size is {group_size}; wanted a positive multiple of 8, such as 32, 64 or 128")


def grouped_layout(
    out_features: int,
    in_features: int,
    bits: Widths,
    group_size: int,
    *,
    symmetric: Collection[int] = (1,),
    outliers: int = 0,
) -> Layout:
    """The layout of uniform groups with `bits` each; `symmetric`: the widths that store no zero."""

    def form(width: int, _columns: int) -> Format:
        return Format(width, group_size, "uniform", symmetric=width in symmetric)

    return _side_by_side((out_features, in_features), bits, group_size, form, outliers)


def channel_layout(out_features: int, bits: Widths, tables: LevelTables, outliers: int = 0) -> Layout:
    """The layout of channels with `bits` each, and levels as `tables` says."""
    shape = (out_features, len(bits))
    return _side_by_side(shape, bits, 1, tables.format, outliers, tables.row_gain_dtype)


def _side_by_side(
    shape: tuple[int, int],
    bits: Widths,
    group_size: int,
    form: Callable[[int, int], Format],
    outliers: int,
    row_gain_dtype: torch.dtype | None = None,
) -> Layout:
    """Groups of equal bits next to each other, in their own order; `form` (bits, columns) -> format of a segment."""
    widths = np.asarray(bits)
    columns = group_size * np.bincount(widths)
    columns[widths[-1]] += shape[1] - group_size * len(widths)  # the last group may be narrower
    segments = tuple((form(b, int(columns[b])), int(columns[b])) for b in np.flatnonzero(columns).tolist())
    mixed = not bool((np.diff(widths) >= 0).all())
    return Layout(
        *shape, segments, "map" if mixed else "identity", group_size if mixed else 0, outliers, row_gain_dtype
    )
