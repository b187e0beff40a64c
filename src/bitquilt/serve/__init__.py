"""Loading and running quantized checkpoints."""
