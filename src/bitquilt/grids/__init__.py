"""Fitting grids to column groups: the levels a code can stand for."""
