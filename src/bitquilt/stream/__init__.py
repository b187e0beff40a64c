"""The loop over blocks: statistics, resume, training, writing."""
