"""Grids: which levels represent a column group."""
