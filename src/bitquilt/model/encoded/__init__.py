"""Checkpoints that other tools quantized: recognized by their headers, decoded matrix by matrix while they are read."""
