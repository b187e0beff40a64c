"""Trainable parts of a stored weight, and the trainer."""
