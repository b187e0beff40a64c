"""The native body of the operators on a CPU: which instruction set, which calls it takes, tensors as addresses.

`BITQUILT_ISA` forces a level: avx512, avx2, portable, or reference for none of them. Where the extension was not
built (no compiler when the package was installed) everything is the reference's.
"""

import functools
import os
from typing import Any

import torch
from torch import Tensor

from bitquilt.errors import UserError
from bitquilt.ops import reference

try:
    import bitquilt._kernels as _kernels
except ImportError:
    _kernels = None  # type: ignore[assignment]

REFERENCE = "reference"
_VARIABLE = "BITQUILT_ISA"
_DTYPES = {torch.uint8: 1, torch.int16: 2, torch.int32: 3, torch.float16: 4, torch.bfloat16: 5, torch.float32: 6}
_OUTPUTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MAX_COLUMNS = 2**20  # integer sums of 8-bit codes stay within 32 bits
# Rows unpacked at a time when there are many tokens: some MiB, so that the allocator hands the same pages out again.
# torch's bf16 product of 4096 x 11008 with 512 tokens takes as long in parts of 512 rows as whole, but half as long
# again in parts of 64, 128 or 380.
_TILE_ROWS = 512
# Bytes of a fixed-point activation (avx512): 16 bits per group exceed what bf16 and fp16 hold of all but its smallest.
_DIGITS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}


def built() -> bool:
    """Whether the package was installed with its kernels."""
    return _kernels is not None


@functools.cache
def level() -> str:
    """The instruction set in use, or "reference". Raises UserError if `BITQUILT_ISA` asks for what is not here."""
    here = [*(_kernels.levels() if built() else []), REFERENCE]
    wanted = os.environ.get(_VARIABLE, here[0])
    if wanted not in here:
        reason = "this processor has" if built() else "the kernels are not built; there is"
        raise UserError(f"{_VARIABLE} is {wanted!r}; {reason} {', '.join(here)}")
    return wanted


def quantized_matmul(
    x: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    layout: list[int],
    permutation: Tensor | None,
    block: int,
    outlier_values: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_rows: Tensor | None,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    """`reference.quantized_matmul`; up to 16 tokens without ever writing the weight, unpacked once for more."""
    weight = (codes, scales, zeros, layout, permutation, block,
              outlier_values, outlier_columns, outlier_rows, out_features)  # fmt: skip
    if x.dtype not in _OUTPUTS or not _takes(layout, scales):
        return reference.quantized_matmul(x, *weight[:-1], bias, out_features)
    in_features = sum(layout[reference.LAYOUT_FIELDS - 1 :: reference.LAYOUT_FIELDS])
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x is {list(x.shape)}; the layer takes [..., {in_features}]")
    if bias is not None and bias.numel() != out_features:
        raise ValueError(f"bias holds {bias.numel()} entries; the layer has {out_features} outputs")
    if out_features < 0:
        raise ValueError(f"out_features is {out_features}")
    tokens = x.numel() // in_features
    if tokens > _kernels.MAX_TOKENS:
        return _linear(x, weight, None if bias is None else bias.to(x.dtype))
    output = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32)
    if tokens:
        flat = x.to(torch.float32).contiguous()
        shift = None if bias is None else bias.to(torch.float32).contiguous()
        description, _alive = _describe(*weight)
        _kernels.matmul(
            level(), description, flat.data_ptr(), tokens, in_features, 0 if shift is None else shift.data_ptr(),
            output.data_ptr(), _DIGITS[x.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return output.to(x.dtype)


def dequantize(
    codes: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    layout: list[int],
    permutation: Tensor | None,
    block: int,
    outlier_values: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_rows: Tensor | None,
    out_features: int,
) -> Tensor:
    """`reference.dequantize`, bit for bit."""
    weight = (codes, scales, zeros, layout, permutation, block,
              outlier_values, outlier_columns, outlier_rows, out_features)  # fmt: skip
    return _dense(weight, torch.float32) if _takes(layout, scales) else reference.dequantize(*weight)


def _takes(layout: list[int], scales: list[Tensor]) -> bool:
    """Whether the kernels know the layout (groups of a multiple of 8 columns, or one group) and the scales' type."""
    if level() == REFERENCE or any(s.is_floating_point() and s.dtype not in _DTYPES for s in scales):
        return False
    fields = reference.LAYOUT_FIELDS
    if len(layout) % fields:
        raise ValueError(f"a layout of {len(layout)} numbers; wanted {fields} per segment")
    for grid, bits, group_size, width in zip(*(layout[i::fields] for i in range(fields)), strict=True):
        if reference.is_mx(grid, bits):
            return False
        if grid == reference.GRID_UNIFORM and group_size % 8 and group_size < width:
            return False
    return sum(layout[fields - 1 :: fields]) <= _MAX_COLUMNS


def _linear(x: Tensor, weight: tuple[Any, ...], bias: Tensor | None) -> Tensor:
    """The product with the weight unpacked some rows at a time: the buffer stays in the allocator's hands and in cache.

    Unpacked whole, a layer of 4096 x 11008 costs 22 000 page faults, as long again as its product with 512 tokens.
    """
    out_features = weight[-1]
    parts = []
    for first in range(0, max(out_features, 1), _TILE_ROWS):  # one part, empty, of a layer without outputs
        last = min(first + _TILE_ROWS, out_features)
        tile = _dense(weight, x.dtype, first, last)
        parts.append(torch.nn.functional.linear(x, tile, None if bias is None else bias[first:last]))
        del tile
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _dense(weight: tuple[Any, ...], dtype: torch.dtype, first: int = 0, last: int | None = None) -> Tensor:
    """Rows first..last of the weight."""
    layout, out_features = weight[3], weight[-1]
    last = out_features if last is None else last
    dense = torch.empty(
        (last - first, sum(layout[reference.LAYOUT_FIELDS - 1 :: reference.LAYOUT_FIELDS])), dtype=dtype
    )
    description, _alive = _describe(*weight)
    _kernels.dequantize(
        level(), description, first, last, dense.data_ptr(), _OUTPUTS[dtype], torch.get_num_threads()
    )  # fmt: skip
    return dense


def _describe(
    codes: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    layout: list[int],
    permutation: Tensor | None,
    block: int,
    outlier_values: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_rows: Tensor | None,
    out_features: int,
) -> tuple[list[int], list[Tensor]]:
    """The weight as csrc/weight.h reads it, and the tensors that must live until the call is over."""
    fields = reference.LAYOUT_FIELDS
    if not len(codes) == len(scales) == len(zeros) == len(layout) / fields:
        raise ValueError(
            f"{len(codes)} codes, {len(scales)} scales, {len(zeros)} zeros and a layout of {len(layout)} numbers; "
            f"wanted one each per segment and {fields} numbers"
        )
    alive: list[Tensor] = []

    def array(tensor: Tensor | None) -> tuple[int, int, int]:
        if tensor is None:
            return 0, 0, 0
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"a stored tensor of {list(tensor.shape)} is {tensor.dtype}; known are {list(_DTYPES)}")
        aligned = tensor.data_ptr() % tensor.itemsize == 0  # a file mapped into memory may begin anywhere
        if not (aligned and tensor.is_contiguous()):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        alive.append(tensor)
        return tensor.data_ptr(), tensor.numel(), _DTYPES[tensor.dtype]

    numbers = [out_features, len(codes), block]
    for tensor in (permutation, outlier_values, outlier_columns, outlier_rows):
        numbers += array(tensor)
    for i in range(len(codes)):
        numbers += layout[fields * i : fields * (i + 1)]
        numbers += (*array(codes[i]), *array(scales[i]), *array(zeros[i]))
    return numbers, alive
