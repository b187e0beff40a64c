"""The body of the operators on a GPU: Triton kernels on the stored layout.

| file | what it holds |
|---|---|
| `launch.py` | the operators: which kernel is launched, with which arguments |
| `prepared_weight.py` | a weight, checked once, and the tables that kernels need besides |
| `matmul_kernel.py` | x W^T in one launch, fused |
| `dequantize_kernel.py` | the weight written out |
| `unpack_codes.py`, `quad_lookup.py` | how bits become numbers; codebooks looked up in registers |
| `activation_tiles.py` | the activations of a chunk, split as the weight is |
| `tiling.py`, `tuned_tilings.py` | how a product is split into programs: by rule, and as measured on this GPU |
| `decoder_kernels.py` | the steps between the products of one token |

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
    """Multiply by the kernels (`launch`), or by the reference if the environment asks for it."""
    if _asked_for_reference():
        return reference.quantized_matmul(x, *arguments)
    from bitquilt.ops.gpu import launch

    return launch.quantized_matmul(x, *arguments)


def dequantize(*arguments: Any) -> Tensor:
    """Write the weight out by the kernels (`launch`), or by the reference if the environment asks for it."""
    if _asked_for_reference():
        return reference.dequantize(*arguments)
    from bitquilt.ops.gpu import launch

    return launch.dequantize(*arguments)


def in_use() -> bool:
    """Whether layers on a GPU are computed by these kernels."""
    return has_triton() and not _asked_for_reference()


@functools.cache
def _asked_for_reference() -> bool:
    return os.environ.get("BITQUILT_ISA") == "reference"
