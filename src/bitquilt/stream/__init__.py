"""The loop over blocks: `loop.stream` quantizes a model block by block, `writer.assemble` makes the checkpoint.

Weights in memory are *released*, files on disk are *deleted*, and a finished file is *committed* by its record.
"""
