"""Checkpoints read lazily, model structure found by inspection, and quantized modules."""
