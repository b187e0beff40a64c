"""The native sweep inside a block of columns: `sweep_uniform` runs one group, `sweep_shared` a block of shared tables.
`fit_gains` fits the gains of many columns at once; `nearest` and `encode` round to free levels.

`layer/gptq_sweep.py` and `layer/grids/shared_levels.py` are the definitions; csrc/sweep.cpp is the same arithmetic. It
serves on a CPU, where the package was installed with a compiler (`usable`); elsewhere the definitions compute
everything, with the same results.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitquilt.ops import cpu_kernels

# torch's `addr_` rounds product and difference at once in whole runs of 16 numbers, apart in what a row has left.
_FUSED_ROWS = {"DEFAULT": 0, "AVX2": 16, "AVX512": 16}
_GAIN_VALUES = 127  # the positive finite values of float8, from 0


@dataclass(frozen=True, eq=False)
class SweepBlock:
    """Some columns of a sweep, each a row of `[width, out]`: `columns` fp32 with the errors of earlier ones added, and
    what the sweep finds: `quantized` and `errors` fp32, `codes` uint8. `upper` fp32 `[width, width]`: their part of U.
    `kept` bool: weights stored in fp16 with the value that they have when they are reached, `remainder` fp16 less their
    code; or None."""

    columns: Tensor
    quantized: Tensor
    codes: Tensor
    errors: Tensor
    upper: Tensor
    kept: Tensor | None = None
    remainder: Tensor | None = None


def usable(weight: Tensor) -> bool:
    """Whether the native sweep takes this weight."""
    return (
        weight.device.type == "cpu" and weight.dtype == torch.float32 and cpu_kernels.level() != cpu_kernels.REFERENCE
    )


def sweep_uniform(block: SweepBlock, group: slice, scale: Tensor, zero: Tensor | None, bits: int) -> None:
    """Round a group of the block's columns to equal steps and feed their errors back to the rest of the block.

    `scale` and `zero` `[out, 1]` as in `UniformGrid`. Raises ValueError for shapes or types that do not go together.
    """
    addresses, sizes = _described(block)
    rows = block.columns.shape[1]
    steps = _checked("scale", scale.float().contiguous(), (rows, 1), torch.float32)
    offset = None if zero is None else _checked("zero", zero.float().contiguous(), (rows, 1), torch.float32)
    at = 0 if offset is None else offset.data_ptr()
    two_levels = bits == 1 and zero is not None
    span = (group.start, group.stop)
    cpu_kernels.native().sweep_uniform(
        addresses, sizes, *span, steps.data_ptr(), at, two_levels, bits, torch.get_num_threads()
    )


def fit_gains(columns: Tensor, counted: Tensor, table: Tensor, spread: float) -> Tensor:
    """Fit the gains float8 `[n]` of `columns` fp32 `[n, out]` by `SharedTable.fit`; `table` fp32, ascending.

    `counted` fp32 `[n, out]` weighs the errors. Raises ValueError for shapes or types that do not go together.
    """
    shape = (len(columns), columns.shape[-1])
    for name, tensor in (("columns", columns), ("counted", counted)):
        _checked(name, tensor, shape, torch.float32)
    _checked("table", table, tuple(table.shape), torch.float32)
    values, gains = _gain_values(), torch.empty(shape[:1], dtype=torch.uint8)
    described = (columns.data_ptr(), counted.data_ptr(), *shape, table.data_ptr(), len(table), spread)
    cpu_kernels.native().fit_gains(*described, values.data_ptr(), gains.data_ptr(), torch.get_num_threads())
    return gains.view(torch.float8_e4m3fn)


def sweep_shared(
    block: SweepBlock, tables: Sequence[tuple[Tensor, float]], table_of: Sequence[int], counted: Tensor
) -> Tensor:
    """Fit a gain to each column of the block when it is reached, round the column, feed its errors back.

    `tables`: levels fp32 and spread of each `SharedTable`; `table_of`: which one each column has; `counted` fp32
    `[width, out]`. Returns the gains float8 `[width]`. Raises ValueError as `sweep_uniform`.
    """
    addresses, sizes = _described(block)
    shape = tuple(block.columns.shape)
    _checked("counted", counted, shape, torch.float32)
    chosen = _checked("table_of", torch.tensor(table_of, dtype=torch.int32), shape[:1], torch.int32)
    levels = [_checked("levels", table, tuple(table.shape), torch.float32) for table, _ in tables]
    values, gains = _gain_values(), torch.empty(shape[:1], dtype=torch.uint8)
    described = ([table.data_ptr() for table in levels], [len(table) for table in levels], [s for _, s in tables])
    found = (chosen.data_ptr(), counted.data_ptr(), values.data_ptr(), gains.data_ptr())
    cpu_kernels.native().sweep_shared(addresses, sizes, *described, *found, torch.get_num_threads())
    return gains.view(torch.float8_e4m3fn)


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Return fp32 `values` of any shape as the nearest of ascending fp32 `levels`, the lower one of a tie."""
    flat = _checked("values", values, tuple(values.shape), torch.float32)
    table = _checked("levels", levels, tuple(levels.shape[:1]), torch.float32)
    chosen, threads = torch.empty_like(flat), torch.get_num_threads()
    cpu_kernels.native().nearest(
        flat.data_ptr(), flat.numel(), table.data_ptr(), len(table), chosen.data_ptr(), threads
    )
    return chosen


def encode(columns: Tensor, levels: Tensor) -> Tensor:
    """Return the codes uint8 of `columns` fp32 `[n, out]`, the nearest of each column's own `levels` fp32 `[n, k]`."""
    n, rows = _checked("columns", columns, tuple(columns.shape), torch.float32).shape
    table = _checked("levels", levels, (n, levels.shape[-1]), torch.float32)
    codes = torch.empty((n, rows), dtype=torch.uint8)
    described = (columns.data_ptr(), n, rows, table.data_ptr(), table.shape[1], codes.data_ptr())
    cpu_kernels.native().encode(*described, torch.get_num_threads())
    return codes


def _gain_values() -> Tensor:
    return torch.arange(_GAIN_VALUES, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def _described(block: SweepBlock) -> tuple[list[int], list[int]]:
    """Addresses and sizes as csrc/module.cpp wants them."""
    width, rows = shape = tuple(block.columns.shape)
    for name in ("columns", "quantized", "errors"):
        _checked(name, getattr(block, name), shape, torch.float32)
    _checked("codes", block.codes, shape, torch.uint8)
    upper = block.upper
    if upper.shape != (width, width) or upper.dtype != torch.float32 or upper.stride(1) != 1:
        raise ValueError(f"upper is {upper.dtype} {list(upper.shape)}; wanted rows of fp32 [{width}, {width}]")
    if (block.kept is None) != (block.remainder is None):
        raise ValueError("weights are kept without a remainder; wanted both or neither")
    extra = []
    for name, dtype in (("kept", torch.bool), ("remainder", torch.float16)):
        tensor: Tensor | None = getattr(block, name)
        extra.append(0 if tensor is None else _checked(name, tensor, shape, dtype).data_ptr())
    first = [tensor.data_ptr() for tensor in (block.columns, block.quantized, block.codes, block.errors, upper)]
    return [*first, *extra], [upper.stride(0), width, rows, _fused(rows)]


def _fused(rows: int) -> int:
    """The rows of a column whose feedback torch rounds once."""
    chunk = _FUSED_ROWS.get(torch.backends.cpu.get_cpu_capability(), 1)
    return rows - rows % chunk if chunk else 0


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, strides {list(tensor.stride())}; the sweep's kernel "
            f"takes contiguous {dtype} {list(shape)}"
        )
    return tensor
