"""The body of the operators on a GPU: Triton kernels on the stored layout.

| file | question it answers |
|---|---|
| `unpack.py` | how do bits become numbers? |
| `product.py` | x W^T in one launch, fused |
| `dense.py` | the weight written out |
| `weight.py` | is a weight sound, and what do the kernels need beside it? |
| `config.py` | how is a product cut into programs? |
| `tuned.py` | how was it, where that was measured on this GPU? |
| `body.py` | which of these, with which arguments? |

Triton is imported with the first product: it takes half a second. Without it, or with `BITQUILT_ISA=reference`, a GPU
computes through the reference body.
"""

import functools
import importlib.util
import os
from typing import Any

from torch import Tensor

from bitquilt.ops import reference


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed (it comes with PyTorch for GPUs)."""
    return importlib.util.find_spec("triton") is not None


def quantized_matmul(x: Tensor, *arguments: Any) -> Tensor:
    """`body.quantized_matmul`, unless the environment asks for the reference."""
    if _asked_for_reference():
        return reference.quantized_matmul(x, *arguments)
    from bitquilt.ops.gpu import body

    return body.quantized_matmul(x, *arguments)


def dequantize(*arguments: Any) -> Tensor:
    """`body.dequantize`, unless the environment asks for the reference."""
    if _asked_for_reference():
        return reference.dequantize(*arguments)
    from bitquilt.ops.gpu import body

    return body.dequantize(*arguments)


def in_use() -> bool:
    """Whether layers on a GPU are computed here."""
    return has_triton() and not _asked_for_reference()


@functools.cache
def _asked_for_reference() -> bool:
    return os.environ.get("BITQUILT_ISA") == "reference"
