"""CMPQ (after arXiv 2410.13056) and cmpq+."""
