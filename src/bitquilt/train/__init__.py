"""Trainable parts of a stored weight: rounding offsets, scales, levels and gains.

Read `problem`, then `trainer`, then `rounding`, `levels` and `ranges`, the three kinds of trainable weights.
"""
