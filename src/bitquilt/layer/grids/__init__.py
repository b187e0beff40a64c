"""Grids, the levels of a column group: `GRID_CLASSES` has the class of each one by its stored name.

A new grid is a file in this folder, with a subclass of `Grid` and a function that fits it, and a line here.
"""

from collections.abc import Mapping
from typing import cast

from bitquilt.core.types import GridName
from bitquilt.layer.grids.blocks import RunGrid
from bitquilt.layer.grids.codebook import CodebookGrid
from bitquilt.layer.grids.grid import Grid
from bitquilt.layer.grids.mx import MXGrid
from bitquilt.layer.grids.uniform import UniformGrid
from bitquilt.ops.block_types import BLOCK_TYPES

GRID_CLASSES: Mapping[GridName, type[Grid]] = {
    "uniform": UniformGrid,
    "codebook": CodebookGrid,
    "mx": MXGrid,
    "mx_e2m3": MXGrid,
    **{cast(GridName, name): RunGrid for name in BLOCK_TYPES},
}

__all__ = ["GRID_CLASSES", "CodebookGrid", "Grid", "MXGrid", "UniformGrid"]
