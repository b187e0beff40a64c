"""`pack` and `unpack` convert a QuantizedWeight to named tensors and back; `tensor_specs` is the only size model.

The planner, the report, the module and the writer all ask here, so predicted bytes are the bytes on disk.
`layout_to_json` and `layout_from_json` are the form of a layout in config.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from bitquilt.core.types import GRID_KINDS, Format, Layout, Ordering, Outliers, Permutation, QuantizedWeight, Segment
from bitquilt.ops.bits import pack_bits, packed_bytes, unpack_bits
from bitquilt.ops.block_types import BLOCK_TYPES, read_heads
from bitquilt.ops.reference import ACTIVATIONS, expand_permutation, map_bits

_SCALE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "uint8": torch.uint8,  # E8M0 exponents of mx
    "float8_e4m3fn": torch.float8_e4m3fn,  # codebooks and gains only: small scales would underflow
}
_DTYPE_NAMES = {dtype: name for name, dtype in _SCALE_DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def tensor_specs(layout: Layout) -> dict[str, TensorSpec]:
    """Stored tensors of a weight by name, in stored order: the size model and the file layout in one."""
    rows, columns = layout.out_features, layout.in_features
    index = torch.int16 if columns <= 2**15 else torch.int32
    specs: dict[str, TensorSpec] = {}
    for i, (form, width) in enumerate(layout.segments):
        groups = -(-width // form.group_size)
        specs[f"codes_{i}"] = TensorSpec((rows, packed_bytes(width, form.bits)), torch.uint8)
        if form.grid == "codebook":
            specs[f"scale_{i}"] = TensorSpec((groups, 1 << form.bits), form.scale_dtype)
            if form.gain_dtype is not None:
                specs[f"gain_{i}"] = TensorSpec((width,), form.gain_dtype)
            continue
        own = BLOCK_TYPES[form.grid].head if form.grid in BLOCK_TYPES else 1
        specs[f"scale_{i}"] = TensorSpec((rows, groups * own), form.scale_dtype)
        if form.symmetric:
            continue
        if form.bits == 1:
            specs[f"zero_{i}"] = TensorSpec((rows, groups), form.scale_dtype)
        else:  # packed along the rows: their count is a multiple of 8 far more often than the groups'
            specs[f"zero_{i}"] = TensorSpec((groups, packed_bytes(rows, form.bits)), torch.uint8)
    if layout.ordering == "map":
        specs["permutation"] = TensorSpec((packed_bytes(layout.blocks, map_bits(len(layout.segments))),), torch.uint8)
    elif layout.ordering == "order":
        specs["permutation"] = TensorSpec((layout.blocks,), index)
    if layout.outliers:
        specs["outlier_values"] = TensorSpec((layout.outliers,), torch.float16)
        specs["outlier_columns"] = TensorSpec((layout.outliers,), _index_dtype(columns - 1))
        specs["outlier_rows"] = TensorSpec((rows + 1,), _index_dtype(layout.outliers))
    if layout.row_gain_dtype is not None:
        specs["row_gains"] = TensorSpec((rows,), layout.row_gain_dtype)
    if layout.of_rows:  # a bit per row of the table: a width for each of 49,152 rows takes 6 kB per width
        specs["rows"] = TensorSpec((packed_bytes(layout.of_rows, 1),), torch.uint8)
    return specs


def _index_dtype(largest: int) -> torch.dtype:
    """The narrowest integer that holds 0 .. largest."""
    return torch.uint8 if largest < 2**8 else torch.int16 if largest < 2**15 else torch.int32


def storage_bits(layout: Layout) -> int:
    """Bits of everything stored for one weight: codes, scales, zeros, codebooks, permutation, outliers, padding."""
    return 8 * sum(spec.nbytes for spec in tensor_specs(layout).values())


def bits_per_weight(layout: Layout) -> float:
    """True bits per weight (`bpw`)."""
    return storage_bits(layout) / (layout.out_features * layout.in_features)


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the stored tensors, with the names and shapes of `tensor_specs`."""
    layout = weight.layout
    tensors: dict[str, Tensor] = {}
    for i, segment in enumerate(weight.segments):
        bits = segment.format.bits
        tensors[f"codes_{i}"] = pack_bits(segment.codes, bits)
        tensors[f"scale_{i}"] = segment.scale
        if segment.format.grid == "codebook":
            if segment.zero is not None:
                tensors[f"gain_{i}"] = segment.zero
        elif segment.zero is not None:
            tensors[f"zero_{i}"] = segment.zero if bits == 1 else pack_bits(segment.zero.t().contiguous(), bits)
    if weight.permutation is not None:
        tensors["permutation"] = weight.permutation.order
        if layout.ordering == "map":
            segments = torch.tensor([weight.segment_of_block()], dtype=torch.uint8)
            tensors["permutation"] = pack_bits(segments, map_bits(len(layout.segments))).squeeze(0)
    if weight.outliers is not None and layout.outliers:
        tensors["outlier_values"] = weight.outliers.values
        tensors["outlier_columns"] = weight.outliers.columns
        tensors["outlier_rows"] = weight.outliers.rows
    if weight.row_gains is not None:
        tensors["row_gains"] = weight.row_gains
    if weight.rows is not None:
        tensors["rows"] = pack_bits(weight.rows.to(torch.uint8).unsqueeze(0), 1).squeeze(0)
    specs = tensor_specs(layout)
    device = tensors["codes_0"].device  # the permutation may be on the host
    return {name: tensor.to(device, specs[name].dtype).contiguous() for name, tensor in tensors.items()}


def unpack(tensors: Mapping[str, Tensor], layout: Layout, name: str = "weight") -> QuantizedWeight:
    """Invert `pack`. Raises ValueError naming the tensor that is missing or contradicts `layout`."""
    check_tensors(tensors, layout, name)
    segments = []
    for i, (form, width) in enumerate(layout.segments):
        zero = tensors.get(f"gain_{i}" if form.grid == "codebook" else f"zero_{i}")
        if zero is not None and form.grid == "uniform" and form.bits > 1:
            zero = unpack_bits(zero, form.bits, layout.out_features).t()
        codes = unpack_bits(tensors[f"codes_{i}"], form.bits, width)
        segments.append(Segment(form, codes, tensors[f"scale_{i}"], zero))
    permutation = outliers = None
    if layout.ordering != "identity":
        channels = expand_permutation(tensors["permutation"], layout.block, len(layout.segments), layout.in_features)
        starts = channels[channels % layout.block == 0]
        permutation = Permutation(starts // layout.block, layout.block, full=layout.ordering == "order")
    if layout.outliers:
        outliers = Outliers(tensors["outlier_values"], tensors["outlier_columns"], tensors["outlier_rows"])
    return QuantizedWeight(
        tuple(segments), permutation, outliers, tensors.get("row_gains"), table_rows(tensors, layout)
    )


def table_rows(tensors: Mapping[str, Tensor], layout: Layout) -> Tensor | None:
    """Which rows of its table a packed weight holds, bool `[layout.of_rows]`; None for a weight of its own."""
    if not layout.of_rows:
        return None
    return unpack_bits(tensors["rows"].unsqueeze(0), 1, layout.of_rows).squeeze(0).bool()


def check_tensors(tensors: Mapping[str, Tensor], layout: Layout, name: str) -> None:
    """Raise ValueError naming the first tensor that is missing or whose shape or dtype contradicts `layout`."""
    for key, spec in tensor_specs(layout).items():
        if key not in tensors:
            raise ValueError(f"tensor {name}.{key} is missing; the layout wants {list(spec.shape)} {spec.dtype}")
        got = tensors[key]
        if tuple(got.shape) != spec.shape or got.dtype != spec.dtype:
            raise ValueError(
                f"tensor {name}.{key} is {list(got.shape)} {got.dtype}; "
                f"the layout wants {list(spec.shape)} {spec.dtype}"
            )


def check_indices(tensors: Mapping[str, Tensor], layout: Layout, name: str) -> None:
    """Raise ValueError naming the first index tensor whose values contradict `layout`; its shapes are right."""
    order = tensors.get("permutation")
    if layout.ordering == "map" and order is not None:
        owner = unpack_bits(order.unsqueeze(0), map_bits(len(layout.segments)), layout.blocks).squeeze(0).long()
        sizes = torch.full_like(owner, layout.block)
        sizes[-1] = layout.in_features - layout.block * (layout.blocks - 1)
        wanted = [width for _, width in layout.segments]
        got = [int(sizes[owner == i].sum()) for i in range(len(wanted))]
        if got != wanted:
            raise ValueError(f"tensor {name}.permutation gives the segments {got} channels; the layout says {wanted}")
    elif layout.ordering == "order" and order is not None:
        expected = torch.arange(layout.blocks, device=order.device)
        if not torch.equal(order.long().sort().values, expected):
            raise ValueError(f"tensor {name}.permutation is not an order of 0 to {layout.blocks - 1}, each once")
    if layout.outliers:
        columns, rows = tensors["outlier_columns"].long(), tensors["outlier_rows"].long()
        low, high = int(columns.min()), int(columns.max())
        if low < 0 or high >= layout.in_features:
            raise ValueError(
                f"tensor {name}.outlier_columns holds {low} to {high}; the layer has inputs 0 to "
                f"{layout.in_features - 1}"
            )
        if int(rows[0]) != 0 or int(rows[-1]) != layout.outliers or bool((rows.diff() < 0).any()):
            raise ValueError(f"tensor {name}.outlier_rows does not rise from 0 to {layout.outliers}, the outliers")
    held = table_rows(tensors, layout)
    if held is not None and (count := int(held.sum())) != layout.out_features:
        raise ValueError(f"tensor {name}.rows names {count} rows; the layout says {layout.out_features}")


def not_finite(tensors: Mapping[str, Tensor], layout: Layout | None = None) -> list[str]:
    """Names of the stored tensors that hold NaN or infinity: scales, gains, levels, zeros and outliers.

    `layout` tells which scales are heads of blocks."""
    found = []
    segments = () if layout is None else layout.segments
    heads = {f"scale_{i}": BLOCK_TYPES[form.grid] for i, (form, _) in enumerate(segments) if form.grid in BLOCK_TYPES}
    for name, tensor in tensors.items():
        if name in heads:
            step, low = read_heads(tensor, heads[name]).steps()
            bad = not bool(step.isfinite().all()) or (low is not None and not bool(low.isfinite().all()))
        elif tensor.is_floating_point():
            bad = not bool(tensor.float().isfinite().all())
        else:  # 255 is the NaN of E8M0, the exponents of mx
            bad = name.startswith("scale_") and tensor.dtype == torch.uint8 and bool((tensor == 255).any())
        found += [name] * bad
    return found


def op_layout(layout: Layout) -> list[int]:
    """The op's `layout` argument: grid number, bits, group_size and width of each segment."""
    numbers: list[int] = []
    for form, width in layout.segments:
        grid = GRID_KINDS[form.grid].number + ACTIVATIONS.index(form.activation)
        numbers += [grid, form.bits, form.group_size, width]
    return numbers


def layout_to_json(layout: Layout) -> dict[str, Any]:
    """Return the form that a layout has in config.json."""
    segments = [
        {
            "grid": form.grid,
            "bits": form.bits,
            "group_size": form.group_size,
            "width": width,
            "scale_dtype": _DTYPE_NAMES[form.scale_dtype],
            "symmetric": form.symmetric,
            **({} if form.gain_dtype is None else {"gain_dtype": _DTYPE_NAMES[form.gain_dtype]}),
            **({} if form.activation == "none" else {"activation": form.activation}),
        }
        for form, width in layout.segments
    ]
    return {
        "out_features": layout.out_features,
        "in_features": layout.in_features,
        "segments": segments,
        "ordering": layout.ordering,
        "block": layout.block,
        "outliers": layout.outliers,
        **({} if layout.row_gain_dtype is None else {"row_gain_dtype": _DTYPE_NAMES[layout.row_gain_dtype]}),
        **({"of_rows": layout.of_rows} if layout.of_rows else {}),
    }


def layout_from_json(value: Mapping[str, Any], name: str = "weight") -> Layout:
    """Invert `layout_to_json`. Raises ValueError naming the layer and the field that is wrong."""
    try:
        segments = [(_format_from_json(item), _whole(item, "width", 1)) for item in value["segments"]]
        if value["ordering"] not in _ORDERINGS:
            raise ValueError(f"ordering is {value['ordering']!r}; known are {', '.join(_ORDERINGS)}")
        rows, columns = _whole(value, "out_features", 1), _whole(value, "in_features", 1)
        return Layout(
            rows,
            columns,
            tuple(segments),
            ordering=value["ordering"],
            block=_whole(value, "block"),
            outliers=_whole(value, "outliers", most=rows * columns),
            row_gain_dtype=_dtype(value, "row_gain_dtype") if "row_gain_dtype" in value else None,
            of_rows=_whole(value, "of_rows") if "of_rows" in value else 0,
        )
    except KeyError as error:
        raise ValueError(f"layout of {name}: field {error} is missing") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"layout of {name}: {error}") from None


_ORDERINGS = get_args(Ordering)


def _whole(item: Mapping[str, Any], field: str, least: int = 0, most: int = 2**62) -> int:
    value = item[field]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{field} is {value!r:.60}; wanted a whole number from {least} to {most}")
    return value


def _dtype(item: Mapping[str, Any], field: str, numbers: bool = True) -> torch.dtype:
    """The type in a field; `numbers`: a floating one, else the exponents of mx."""
    known = [name for name, dtype in _SCALE_DTYPES.items() if dtype.is_floating_point == numbers]
    if item[field] not in known:
        raise ValueError(f"{field} is {item[field]!r:.60}; known are {', '.join(known)}")
    return _SCALE_DTYPES[item[field]]


def _format_from_json(item: Mapping[str, Any]) -> Format:
    grid, activation = item["grid"], item.get("activation", "none")
    if not isinstance(grid, str) or grid not in GRID_KINDS:
        raise ValueError(f"grid is {grid!r:.60}; known are {sorted(GRID_KINDS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r:.60}; known are {sorted(ACTIVATIONS)}")
    if not isinstance(item["symmetric"], bool):
        raise ValueError(f"symmetric is {item['symmetric']!r:.60}; wanted true or false")
    return Format(
        _whole(item, "bits"),
        _whole(item, "group_size"),
        grid,  # type: ignore[arg-type]
        _dtype(item, "scale_dtype", numbers=not (GRID_KINDS[grid].microscaled or grid in BLOCK_TYPES)),  # type: ignore[index]
        item["symmetric"],
        _dtype(item, "gain_dtype") if "gain_dtype" in item else None,
        activation,
    )
