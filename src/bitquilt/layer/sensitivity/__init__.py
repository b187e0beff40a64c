"""Sensitivity: the cost of a rounding error in a weight, a column or a layer."""
