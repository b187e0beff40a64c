"""Sensitivity: what a rounding error in a weight or a column costs."""
