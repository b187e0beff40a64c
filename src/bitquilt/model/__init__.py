"""Checkpoints read lazily, structure found by inspection, quantized modules."""
