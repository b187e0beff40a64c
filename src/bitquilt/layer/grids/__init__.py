"""Grids: which levels represent a column group. `GRIDS` is the table of all of them by their stored name.

A new grid is a file in this folder with a class that implements `Grid` and a function that fits it, and a line here.
"""

from collections.abc import Mapping

from bitquilt.layer.grids.codebook import CodebookGrid
from bitquilt.layer.grids.grid import Grid
from bitquilt.layer.grids.mx import MXGrid
from bitquilt.layer.grids.uniform import UniformGrid

GRIDS: Mapping[str, type[Grid]] = {
    "uniform": UniformGrid,
    "codebook": CodebookGrid,
    "mx": MXGrid,
    "mx_e2m3": MXGrid,
}

__all__ = ["GRIDS", "CodebookGrid", "Grid", "MXGrid", "UniformGrid"]
