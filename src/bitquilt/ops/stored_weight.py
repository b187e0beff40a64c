"""A `StoredWeight` as the operators take it, and `handle_of`, its remembered form for the native code.

A `Handle` turns tensors into addresses and sizes once, not at every call. A weight is checked the first time, and again
whenever one of its tensors is another one, was written to, or moved to other memory in place. That takes 0.1 ms, as
long as a small layer's product.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bitquilt.ops import reference

DTYPES = {torch.uint8: 1, torch.int16: 2, torch.int32: 3, torch.float16: 4, torch.bfloat16: 5, torch.float32: 6}
_MAX_COLUMNS = 2**20  # integer sums of 8-bit codes stay within 32 bits


class StoredWeight(NamedTuple):
    """One weight as both operators take it; `ops.reference` explains the fields."""

    codes: list[Tensor]
    scales: list[Tensor]
    zeros: list[Tensor]
    layout: list[int]
    permutation: Tensor | None
    block: int
    outlier_values: Tensor | None
    outlier_columns: Tensor | None
    outlier_rows: Tensor | None

    @property
    def in_features(self) -> int:
        """Input channels: the widths of all segments."""
        return sum(self.layout[reference.LAYOUT_FIELDS - 1 :: reference.LAYOUT_FIELDS])

    def tensors(self) -> list[Tensor]:
        """All tensors with entries, codes first. The empty zeros of a grid without any are new at every call."""
        single = (self.permutation, self.outlier_values, self.outlier_columns, self.outlier_rows)
        zeros = (t for t in self.zeros if t.numel())
        return [*self.codes, *self.scales, *zeros, *(t for t in single if t is not None)]

    def plain(self) -> "StoredWeight":
        """Return the weight as the kernels read it, or the weight itself where nothing has to change.

        Shared tables, gains and float8 become fp32 levels for every column; outliers get integers that are wide enough.
        """
        scales, zeros, layout, fields = list(self.scales), list(self.zeros), list(self.layout), reference.LAYOUT_FIELDS
        for i in range(min(len(layout) // fields, len(scales), len(zeros))):
            grid, bits, group_size, width = layout[fields * i : fields * (i + 1)]
            own = group_size == 1 and not zeros[i].numel() and scales[i].dtype in DTYPES
            tables = (-(-width // max(group_size, 1)), 1 << bits)
            fits = scales[i].shape == tables and zeros[i].numel() in (0, width)  # the native check names others
            if grid == reference.GRID_CODEBOOK and fits and not own:
                scales[i] = reference.column_levels(scales[i], zeros[i], group_size, width)
                zeros[i], layout[fields * i + 2] = zeros[i][:0].float(), 1
        columns, rows = self.outlier_columns, self.outlier_rows
        if columns is not None and columns.dtype == torch.uint8:
            columns = columns.to(torch.int16)
        if rows is not None:
            rows = rows.to(torch.int32)
        return self._replace(scales=scales, zeros=zeros, layout=layout, outlier_columns=columns, outlier_rows=rows)

    def known(self) -> bool:
        """Whether the kernels know the layout and the type of the scales of a `plain` weight.

        They know uniform and codebook grids in stored order. Groups are a multiple of 8 columns, or the whole row.
        """
        fields = reference.LAYOUT_FIELDS
        if len(self.layout) % fields:
            raise ValueError(f"a layout of {len(self.layout)} numbers; wanted {fields} per segment")
        for grid, _bits, group_size, width in zip(*(self.layout[i::fields] for i in range(fields)), strict=True):
            if grid not in (reference.GRID_UNIFORM, reference.GRID_CODEBOOK):
                return False
            if grid == reference.GRID_UNIFORM and group_size % 8 and group_size < width:
                return False
        if any(s.is_floating_point() and s.dtype not in DTYPES for s in self.scales):
            return False
        return self.in_features <= _MAX_COLUMNS


class TensorVersions:
    """A weight's layout and tensors at one moment, without keeping the tensors alive."""

    def __init__(self, weight: StoredWeight) -> None:
        self._tensors = [(weakref.ref(t), state(t)) for t in weight.tensors()]
        self._layout = (list(weight.layout), weight.block)

    def again(self, weight: StoredWeight) -> bool:
        """Whether `weight` still has the same layout and tensors, neither written to nor moved since."""
        if self._layout != (weight.layout, weight.block):
            return False
        tensors = weight.tensors()
        return len(tensors) == len(self._tensors) and all(
            seen() is tensor and before == state(tensor)
            for tensor, (seen, before) in zip(tensors, self._tensors, strict=True)
        )


def state(tensor: Tensor) -> tuple[int, int]:
    """The number of writes to a tensor, -1 for one made in inference mode, which does not count them, and its address.

    A storage moves without a write: `share_memory_`, and so pickling for another process, replaces it in place."""
    return -1 if tensor.is_inference() else tensor._version, tensor.data_ptr()


class Handle:
    """A weight as one instruction set's kernels know it. The caller keeps the tensors alive, whose memory it reads."""

    def __init__(
        self,
        weight: StoredWeight,
        plain: StoredWeight,
        out_features: int,
        level: str,
        make: Callable[[str, list[int]], Any],
    ) -> None:
        """Describe `plain`, the form of `weight` that the native code reads."""
        self.level, self.out_features, self.in_features = level, out_features, weight.in_features
        self._seen = TensorVersions(weight)
        numbers, copies = describe(plain, out_features)
        # Keep alive what `plain` made, but never the weight's own tensors: handles are remembered by their codes, and a
        # key never leaves the table while its value holds it.
        own = {id(t) for t in weight.tensors()}
        self._copies = [*copies, *(t for t in plain.tensors() if id(t) not in own)]
        self.native = make(level, numbers)

    def fits(self, weight: StoredWeight, out_features: int, level: str) -> bool:
        """Whether it still describes `weight`: the same tensors, neither written to nor moved since."""
        return (self.level, self.out_features) == (level, out_features) and self._seen.again(weight)


_handles = WeakTensorKeyDictionary()  # by the first segment's codes


def handle_of(
    weight: StoredWeight, out_features: int, level: str, make: Callable[[str, list[int]], Any]
) -> Handle | None:
    """Return the weight's handle, remembered as long as its codes live, or None for a layout the kernels do not know.

    ValueError: tensors that do not go together, naming the first."""
    key = weight.codes[0] if weight.codes else None
    handle: Handle | None = None if key is None else _handles.get(key)
    if handle is None or not handle.fits(weight, out_features, level):
        plain = weight.plain()
        if not plain.known():
            return None
        handle = Handle(weight, plain, out_features, level, make)
        if key is not None:
            _handles[key] = handle
    return handle


def describe(weight: StoredWeight, out_features: int) -> tuple[list[int], list[Tensor]]:
    """Return the weight as csrc/weight.h reads it, and copies of tensors that were not contiguous or not aligned."""
    codes, scales, zeros, layout = weight.codes, weight.scales, weight.zeros, weight.layout
    fields = reference.LAYOUT_FIELDS
    if not len(codes) == len(scales) == len(zeros) == len(layout) / fields:
        raise ValueError(
            f"{len(codes)} codes, {len(scales)} scales, {len(zeros)} zeros and a layout of {len(layout)} numbers; "
            f"wanted one each per segment and {fields} numbers"
        )
    if out_features < 0:
        raise ValueError(f"out_features is {out_features}")
    copies: list[Tensor] = []

    def array(tensor: Tensor | None) -> tuple[int, int, int]:
        if tensor is None:
            return 0, 0, 0
        if tensor.dtype not in DTYPES:
            raise ValueError(f"a stored tensor of {list(tensor.shape)} is {tensor.dtype}; known are {list(DTYPES)}")
        aligned = tensor.data_ptr() % tensor.itemsize == 0  # a file mapped into memory may begin anywhere
        if not (aligned and tensor.is_contiguous()):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
            copies.append(tensor)
        return tensor.data_ptr(), tensor.numel(), DTYPES[tensor.dtype]

    numbers = [out_features, len(codes), weight.block]
    for tensor in (weight.permutation, weight.outlier_values, weight.outlier_columns, weight.outlier_rows):
        numbers += array(tensor)
    for i in range(len(codes)):
        numbers += layout[fields * i : fields * (i + 1)]
        numbers += (*array(codes[i]), *array(scales[i]), *array(zeros[i]))
    return numbers, copies
