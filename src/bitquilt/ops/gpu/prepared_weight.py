"""A stored weight prepared for the GPU's kernels: `prepared` checks it once and remembers it as long as its codes live.

A weight is prepared again when one of its tensors is another one or was written to. The stored layout is the kernels'
layout: codes, scales and zeros are read in place, so nothing is held twice. What is made: a table of the channels' runs
(4 bytes for eight channels), a counter per tile of rows (so one stream uses a weight at a time), and copies of tensors
that are not contiguous or end within a word of their codes. Preparing reads a few numbers back from the GPU; a product
reads none.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bitquilt.ops import reference
from bitquilt.ops.bits import packed_bytes
from bitquilt.ops.block_types import BY_GRID
from bitquilt.ops.gpu_order import ARRANGED, TAIL, arrangeable, plane_bytes, quad_bytes, quad_units
from bitquilt.ops.stored_weight import StoredWeight, TensorVersions

CHUNK = 128
DIRECT, QUADS = 2, 3
_LEAST_ROWS = 16  # of a tile
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by bytes: of planes, see `ops.gpu.unpack_codes`
_DIRECT_BITS = (1, 2, 4, 8)  # whose stored stream is a plane
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class PreparedSegment:
    """A segment as the kernels read it.

    `form`: (grid, bits, group size or 0 for one group, flag), compiled in; the flag is symmetric (uniform), E2M3 (mx)
    or gains (codebook). `read`: READ in `matmul_kernel`; `arranged`: see `ops.gpu_order`.
    """

    form: tuple[int, int, int, bool]
    start: int
    width: int
    row_bytes: int
    groups: int
    zero_bytes: int
    first_chunk: int
    read: int
    arranged: bool

    def sizes(self, words: int) -> tuple[int, ...]:
        """Numbers for `product_kernel`; `words`: how many there are, where codes are read as words."""
        if self.read >= QUADS:
            row = quad_units(self.width)
        elif self.read == DIRECT:
            row = self.width // (4 if self.form[1] == 8 else 8)
        else:
            row = self.row_bytes // (1, 4)[self.read]
        return (self.start, self.width, row, words, self.groups, self.zero_bytes, self.first_chunk)

    def byte_sizes(self) -> tuple[int, ...]:
        """The same numbers for `dense_kernel`, which reads bytes."""
        row = quad_units(self.width) if self.read >= QUADS else self.row_bytes
        return (self.start, self.width, row, 0, self.groups, self.zero_bytes, self.first_chunk)

    def planes(self, codes: Tensor) -> tuple[Tensor, ...]:
        """Split a segment's bytes into planes, or view them as words."""
        flat, bits = codes.view(-1), self.form[1]
        if self.read >= QUADS:
            return flat[:-TAIL].view(torch.int32).view(bits, -1).unbind()
        if self.read != DIRECT:
            return (flat.view(torch.int32),)
        if not self.arranged:
            return (flat.view(_WORDS[min(bits, 4)]),)
        sizes = plane_bytes(bits)
        parts = flat.split([flat.numel() // bits * size for size in sizes])
        return tuple(part.view(_WORDS[size]) for part, size in zip(parts, sizes, strict=True))


class PreparedWeight:
    """A weight whose tensors were checked, with what the kernels need besides.

    `channels` int32 `[in]`: the channel at each stored column, or None. `runs` int32 `[in / 8]`: the same for runs of
    eight, where channels stay together in eights. `own`: tensors that replace stored ones, by name.
    """

    def __init__(self, weight: StoredWeight, out_features: int) -> None:
        self.rows, self.columns = out_features, weight.in_features
        self.device = weight.codes[0].device
        self._seen = TensorVersions(weight)
        self.own: dict[str, Tensor] = {}
        _check_devices(weight, self.device)
        self.parts = self._describe(weight)
        self.quads = any(part.read >= QUADS for part in self.parts)
        rounds_mx = any(part.form[0] == reference.GRID_MX for part in self.parts)
        self.kind = "codebook" if self.quads else "mx" if rounds_mx else "bits"  # products with tilings alike
        self._tables: dict[torch.dtype, tuple[Tensor | None, ...]] = {}
        self.chunks = sum(-(-part.width // CHUNK) for part in self.parts)
        self.bits = sum(part.form[1] * part.width for part in self.parts) / self.columns  # mean of the codes
        self.channels, self.runs = self._order(weight)
        self.outliers = weight.outlier_values is not None and weight.outlier_values.numel() > 0
        if self.outliers:
            _check_outliers(weight, out_features)
        # made here, not when first used: what is made while a graph is captured belongs to the graph
        self.counters = torch.zeros(-(-out_features // _LEAST_ROWS), dtype=torch.int32, device=self.device)

    def fits(self, weight: StoredWeight, out_features: int) -> bool:
        """Whether it still describes `weight`: the same tensors, not written to since."""
        return self.rows == out_features and self._seen.again(weight)

    def counter(self, count: int) -> Tensor:
        """`count` zeros int32, left at zero by every launch that uses them. ValueError in a graph that wants more."""
        if self.counters.numel() < count:
            refuse_in_a_graph()
            self.counters = torch.zeros(count, dtype=torch.int32, device=self.device)
        return self.counters

    def codes(self, weight: StoredWeight) -> tuple[tuple[Tensor, ...], ...]:
        """Planes or words of each segment."""
        return tuple(part.planes(stored) for part, stored in zip(self.parts, self.stored(weight, "codes"), strict=True))

    def tables(self, weight: StoredWeight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Scales of each segment; for quads the levels in `dtype`, as `quad_lookup` reads them."""
        if dtype not in self._tables:
            if self.device.type == "cuda":
                refuse_in_a_graph()
            self._tables[dtype] = tuple(
                lookup_tables(reference.column_levels(scale, zero, part.form[2] or part.width, part.width), dtype)
                if part.read >= QUADS
                else None
                for part, scale, zero in zip(self.parts, weight.scales, weight.zeros, strict=True)
            )
        return tuple(
            stored if made is None else made
            for made, stored in zip(self._tables[dtype], self.stored(weight, "scales"), strict=True)
        )

    def stored(self, weight: StoredWeight, name: str) -> tuple[Tensor, ...]:
        """`codes` (bytes), `scales` or `zeros` of each segment."""
        return tuple(self.own.get(f"{name}_{i}", tensor) for i, tensor in enumerate(getattr(weight, name)))

    def _describe(self, weight: StoredWeight) -> tuple[PreparedSegment, ...]:
        fields, parts = reference.LAYOUT_FIELDS, []
        start = chunk = 0
        for i, (codes, scale, zero) in enumerate(zip(weight.codes, weight.scales, weight.zeros, strict=True)):
            grid, bits, group_size, width = weight.layout[fields * i : fields * (i + 1)]
            arranged, grid = grid >= ARRANGED, grid % ARRANGED
            row_bytes, groups = packed_bytes(width, bits), -(-width // group_size)
            zero_bytes = packed_bytes(self.rows, bits)
            quads = arranged and grid == reference.GRID_CODEBOOK
            shape = (quad_bytes(bits, self.rows, width),) if quads else (self.rows, row_bytes)
            _check(f"codes_{i}", codes, shape, (torch.uint8,))
            kind = min(grid, reference.GRID_MX)
            if kind == reference.GRID_CODEBOOK:
                _check(f"scale_{i}", scale, (groups, 2**bits), None)
                flag = zero.numel() > 0
                if flag:
                    _check(f"gain_{i}", zero, (width,), None)
            else:
                mx = kind == reference.GRID_MX
                _check(f"scale_{i}", scale, (self.rows, groups), (torch.uint8,) if mx else None)
                flag = (grid - reference.GRID_MX) // len(reference.ACTIVATIONS) > 0 if mx else zero.numel() == 0
                if not mx and not flag and bits == 1:
                    _check(f"zero_{i}", zero, (self.rows, groups), None)
                elif not mx and not flag:
                    _check(f"zero_{i}", zero, (groups, zero_bytes), (torch.uint8,))
            self._keep(i, codes, scale, zero, float_zero=kind == reference.GRID_CODEBOOK or bits == 1)
            base = self.own.get(f"codes_{i}", codes)
            even = width % CHUNK == 0  # then a row begins on 16 bytes too
            if arranged and base.data_ptr() % 16:
                self.own[f"codes_{i}"] = base = base.clone()
            direct = arranged or (even and bits in _DIRECT_BITS and base.data_ptr() % 16 == 0)
            if not direct and (base.numel() % 4 or base.data_ptr() % 4):
                self.own[f"codes_{i}"] = _in_words(base)
            group = 0 if group_size >= width else group_size
            form, read = (kind, bits, group, flag), DIRECT if direct else int(even)
            if quads:
                read = QUADS if even else QUADS + 1
            parts.append(
                PreparedSegment(
                    form, start, width, row_bytes, groups, zero_bytes, first_chunk=chunk, read=read, arranged=arranged
                )
            )
            start += width
            chunk += -(-width // CHUNK)
        return tuple(parts)

    def _keep(self, i: int, codes: Tensor, scale: Tensor, zero: Tensor, float_zero: bool) -> None:
        for name, tensor in (("codes", codes), ("scales", scale), ("zeros", zero)):
            if not tensor.is_contiguous():
                self.own[f"{name}_{i}"] = tensor = tensor.contiguous()
            wide = tensor.is_floating_point() and tensor.dtype not in _FLOATS  # float8: tables and gains
            if wide and (name == "scales" or (name == "zeros" and float_zero)):
                self.own[f"{name}_{i}"] = tensor.float()

    def _order(self, weight: StoredWeight) -> tuple[Tensor | None, Tensor | None]:
        if weight.permutation is None:
            return None, None
        if weight.block < 1:
            raise ValueError(f"blocks of {weight.block} channels")
        channels = reference.expand_permutation(weight.permutation, weight.block, len(weight.codes), self.columns)
        every = torch.arange(self.columns, device=self.device)
        if channels.numel() != self.columns or not torch.equal(channels.sort().values, every):
            raise ValueError(f"permutation is not an order of {self.columns} channels: an entry is bad or twice")
        runs = None
        if weight.block % 8 == 0 and self.columns % 8 == 0 and all(part.start % 8 == 0 for part in self.parts):
            runs = (channels[::8] // 8).to(torch.int32)
        return channels.to(torch.int32), runs


_known = WeakTensorKeyDictionary()  # by the first segment's codes; False where the kernels do not know the layout


def prepared(weight: StoredWeight, out_features: int) -> PreparedWeight | None:
    """Return the weight for the kernels, or None where they leave it to the reference.

    ValueError: tensors that do not go together, naming the first.
    """
    if any(grid in BY_GRID for grid in weight.layout[:: reference.LAYOUT_FIELDS]):
        return None
    _check_layout(weight, out_features)
    key = weight.codes[0]
    found: Any = _known.get(key)
    if found is None or not found.fits(weight, out_features):
        if not _has_kernel(weight):
            return None
        if key.is_cuda:
            refuse_in_a_graph()
        found = _known[key] = PreparedWeight(weight, out_features)
    return found


def refuse_in_a_graph() -> None:
    """Raise ValueError while the current stream is captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ValueError("this weight meets a GPU for the first time in a graph; call the layer once before")


def _has_kernel(weight: StoredWeight) -> bool:
    """Whether the kernels take the weight: it has entries, and no two outliers share a place."""
    if weight.in_features == 0 or weight.codes[0].shape[0] == 0:
        return False
    return weight.outlier_values is None or _unique(weight)


def _unique(weight: StoredWeight) -> bool:
    assert weight.outlier_columns is not None
    assert weight.outlier_rows is not None
    counts = weight.outlier_rows.to(torch.int64).diff()
    if weight.outlier_columns.numel() != int(weight.outlier_rows[-1]) or int(counts.min()) < 0:
        return True  # does not go together: named later
    rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    places = (rows * weight.in_features + weight.outlier_columns.to(torch.int64)).sort().values
    return not bool((places.diff() == 0).any())


def _check_layout(weight: StoredWeight, out_features: int) -> None:
    fields = reference.LAYOUT_FIELDS
    count = len(weight.codes)
    if not count == len(weight.scales) == len(weight.zeros) == len(weight.layout) / fields or count == 0:
        raise ValueError(
            f"{count} codes, {len(weight.scales)} scales, {len(weight.zeros)} zeros and a layout of "
            f"{len(weight.layout)} numbers; wanted one each per segment and {fields} numbers"
        )
    if out_features < 0:
        raise ValueError(f"out_features is {out_features}")
    for i in range(count):
        grid, bits, group_size, width = weight.layout[fields * i : fields * (i + 1)]
        known = grid in (reference.GRID_UNIFORM, reference.GRID_CODEBOOK) or reference.is_mx(grid, bits)
        known = known or (grid >= ARRANGED and arrangeable(grid - ARRANGED, bits, group_size, width))
        if not known or not 1 <= bits <= 8 or group_size < 1 or width < 0:
            raise ValueError(
                f"segment {i} has grid {grid}, {bits} bits, group size {group_size} and width {width}; known are grids "
                "0, 1 and mx, 1 to 8 bits, groups of at least one column"
            )


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] | None) -> None:
    if tuple(tensor.shape) != shape or (tensor.dtype not in dtypes if dtypes else not tensor.is_floating_point()):
        wanted = " or ".join(map(str, dtypes)) if dtypes else "floating"
        raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}; wanted {list(shape)} {wanted}")


def _check_devices(weight: StoredWeight, device: torch.device) -> None:
    for tensor in weight.tensors():
        if tensor.device != device:
            raise ValueError(f"the weight is on {device} and on {tensor.device}; move the whole layer with .to(device)")


def _check_outliers(weight: StoredWeight, out_features: int) -> None:
    values, columns, rows = weight.outlier_values, weight.outlier_columns, weight.outlier_rows
    assert values is not None
    if columns is None or rows is None or columns.numel() != values.numel() or rows.numel() != out_features + 1:
        raise ValueError("outlier_values, outlier_columns and outlier_rows do not go together")
    pointers = rows.to(torch.int64)
    if int(pointers[0]) != 0 or int(pointers[-1]) != values.numel() or bool((pointers.diff() < 0).any()):
        raise ValueError(f"outlier_rows are not pointers from 0 to {values.numel()}, ascending")
    low, high = int(columns.min()), int(columns.max())
    if low < 0 or high >= weight.in_features:
        raise ValueError(f"outlier_columns go from {low} to {high}; the layer has {weight.in_features} columns")


def lookup_tables(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Pack levels fp32 `[columns, 2^bits]`, rounded to a 16-bit `dtype`, into words of four bytes: int32 `[chunks,
    8 codes, 2^bits / 2 words, 16 units]`, the low bytes of all levels before the high ones."""
    columns, count = levels.shape
    pairs = levels.to(dtype).view(torch.uint8).view(columns, count, 2)
    words = pairs.transpose(1, 2).contiguous().view(torch.int32).view(columns, count // 2)
    words = torch.nn.functional.pad(words, (0, 0, 0, -columns % CHUNK))
    return words.view(-1, 16, 8, count // 2).permute(0, 2, 3, 1).contiguous()


def _in_words(codes: Tensor) -> Tensor:
    """Copy codes into a whole number of aligned words: kernels read nothing past a tensor's end."""
    copy = torch.zeros(-(-codes.numel() // 4) * 4, dtype=torch.uint8, device=codes.device)
    copy[: codes.numel()] = codes.reshape(-1)
    return copy
