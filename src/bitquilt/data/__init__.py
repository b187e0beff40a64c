"""Text and token ids: documents, tokenization, calibration samples."""
