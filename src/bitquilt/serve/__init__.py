"""Loading checkpoints with transformers and generating text with them."""
