"""The nouns: `QuantizedWeight` and its parts, `GRID_KINDS`, and what a recipe sees of a layer (`Layer`, `LayerStats`,
`LayerPlan`, `Cost`, `Solution`).

A stored weight is an optional permutation of the input channels, then a few column segments with one storage format
each, plus an optional sparse remainder. A recipe decides the segments. Weights are `[out, in]`: y = x W^T + b.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from bitquilt.ops.block_types import BLOCK_TYPES
from bitquilt.ops.reference import GRID_CODEBOOK, GRID_MX, GRID_UNIFORM, mx_grid

BlockName = Literal["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"]
SuperBlockName = Literal["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"]
GridName = Literal["uniform", "codebook", "mx", "mx_e2m3", BlockName, SuperBlockName]
Activation = Literal["none", "ceil", "paper", "ocp"]
Ordering = Literal["identity", "map", "order"]
MIN_BITS, MAX_BITS = 1, 8


@dataclass(frozen=True)
class GridKind:
    """A row of `GRID_KINDS`: the op's `number` of the grid and the code widths in `bits` that it has.

    `microscaled`: elements are small floats that share a power of two.
    """

    number: int
    bits: tuple[int, ...]
    microscaled: bool = False


_ALL_BITS = tuple(range(MIN_BITS, MAX_BITS + 1))
GRID_KINDS: Mapping[GridName, GridKind] = {
    "uniform": GridKind(GRID_UNIFORM, _ALL_BITS),
    "codebook": GridKind(GRID_CODEBOOK, _ALL_BITS),
    "mx": GridKind(GRID_MX, (4, 6, 8), microscaled=True),
    "mx_e2m3": GridKind(mx_grid(True, "none"), (6,), microscaled=True),
    **{cast(GridName, name): GridKind(kind.grid, (kind.bits,)) for name, kind in BLOCK_TYPES.items()},
}
"""Every grid by the name that config.json uses. A new grid needs a row here and a class in `layer/grids`."""


@dataclass(frozen=True)
class Format:
    """How the columns of a segment are stored.

    uniform: one scale and one zero per row and `group_size` columns; at one bit, two free levels per row and group.
    With `symmetric` there is no zero: levels are scale * (code - (2^bits - 1) / 2), for one bit +-scale / 2.
    codebook: 2^bits free levels per `group_size` columns (1: one codebook per column). With a `gain_dtype`, the columns
    of a group share the levels and each column has a factor of its own.
    mx: elements of 4 (E2M1), 6 (E3M2; mx_e2m3: E2M3) or 8 bits (E4M3) with one power of two, a uint8 E8M0, per row and
    32 columns. `activation`: the scale rule by which the layer's input is quantized to the same elements in this
    segment; "none" leaves the input alone.
    q2_k and the other names of `ops.block_types`: llama.cpp's blocks; `group_size` is the columns of a block, the scale
    uint8, the bytes of its head.
    """

    bits: int
    group_size: int
    grid: GridName = "uniform"
    scale_dtype: torch.dtype = torch.float16
    symmetric: bool = False
    gain_dtype: torch.dtype | None = None
    activation: Activation = "none"

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits is {self.bits}; a code takes {MIN_BITS} to {MAX_BITS} bits")
        if self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; a group holds at least one column")
        if self.gain_dtype is not None and self.grid != "codebook":
            raise ValueError(f"grid {self.grid} has no gains; only a codebook takes a gain_dtype")
        kind = GRID_KINDS[self.grid]
        if self.bits not in kind.bits:
            raise ValueError(f"grid {self.grid} stores {kind.bits} bits, not {self.bits}")
        if kind.microscaled:
            stored = self.group_size == 32 and self.scale_dtype == torch.uint8 and self.symmetric
            if not stored:
                raise ValueError(f"grid {self.grid} stores 32 columns to a uint8 scale and no zero")
        elif self.grid in BLOCK_TYPES:
            columns = BLOCK_TYPES[self.grid].columns
            if (self.group_size, self.scale_dtype, self.symmetric) != (columns, torch.uint8, True):
                raise ValueError(f"grid {self.grid} stores {columns} columns to a uint8 head and no zero")
        if self.activation != "none" and not kind.microscaled:
            raise ValueError(f"grid {self.grid} with activation {self.activation!r}; only mx quantizes its input")


@dataclass(frozen=True)
class Layout:
    """Everything that fixes the shapes, and so the size, of one stored weight. No tensors.

    `segments`: (format, width) in stored order; the widths sum to `in_features`. `ordering`: how the order of the input
    channels is stored. "identity" stores nothing; "map" stores the segment of each block of `block` neighbouring
    channels, which keep their order inside a segment; "order" stores a full order of blocks. `outliers`: number of
    entries of the sparse remainder. `row_gain_dtype`: type of one factor per row, None without such factors. `of_rows`:
    the number of rows of the table whose rows this weight holds in part; 0 for a weight of its own.
    """

    out_features: int
    in_features: int
    segments: tuple[tuple[Format, int], ...]
    ordering: Ordering = "identity"
    block: int = 0
    outliers: int = 0
    row_gain_dtype: torch.dtype | None = None
    of_rows: int = 0

    def __post_init__(self) -> None:
        total = sum(width for _, width in self.segments)
        if total != self.in_features or any(width < 1 for _, width in self.segments):
            raise ValueError(f"segment widths {[w for _, w in self.segments]} do not sum to {self.in_features} inputs")
        if (self.ordering == "identity") != (self.block == 0):
            raise ValueError(f"ordering {self.ordering!r} does not go with blocks of {self.block} channels")
        if self.of_rows and self.of_rows < self.out_features:
            raise ValueError(f"{self.out_features} rows cannot be part of a table of {self.of_rows}")

    @property
    def blocks(self) -> int:
        """Number of channel blocks that the ordering moves."""
        return -(-self.in_features // self.block) if self.block else 0

    @property
    def nominal_bits(self) -> float:
        """Mean code width over the weights: the average that papers report. It counts codes only."""
        return sum(form.bits * width for form, width in self.segments) / self.in_features


@dataclass(frozen=True, eq=False)
class Permutation:
    """Order of the input channels in storage: stored block i holds original block `order[i]` of `block` channels.
    `full`: always store the order itself, even where a segment map would do, so that the size is known in advance."""

    order: Tensor
    block: int
    full: bool = False


@dataclass(frozen=True, eq=False)
class Outliers:
    """Compressed sparse rows added to the dense weight: `values [n]`, `columns [n]`, `rows [out + 1]` (pointers)."""

    values: Tensor
    columns: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive stored columns of one format. `codes` uint8 `[out, width]`. `scale` and `zero` are unpacked and mean
    what `ops.reference` defines: for uniform `[out, groups]` (integer zeros as uint8), for a codebook its levels
    `[groups, 2^bits]` and its gains `[width]` or None."""

    format: Format
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A linear layer's weight in its stored form: the packed model computes with exactly what the solver chose.

    `row_gains` `[out]`: one factor per row, applied to segments and outliers together, or None. `rows` bool `[table
    rows]`: which rows of a larger table these are, in the table's order, or None."""

    segments: tuple[Segment, ...]
    permutation: Permutation | None = None
    outliers: Outliers | None = None
    row_gains: Tensor | None = None
    rows: Tensor | None = None

    @property
    def layout(self) -> Layout:
        """The shapes alone."""
        out_features = self.segments[0].codes.shape[0]
        segments = tuple((s.format, s.codes.shape[1]) for s in self.segments)
        return Layout(
            out_features,
            sum(width for _, width in segments),
            segments,
            ordering=self._ordering(),
            block=self.permutation.block if self.permutation else 0,
            outliers=len(self.outliers.values) if self.outliers else 0,
            row_gain_dtype=None if self.row_gains is None else self.row_gains.dtype,
            of_rows=0 if self.rows is None else len(self.rows),
        )

    def _ordering(self) -> Ordering:
        if self.permutation is None:
            return "identity"
        return "map" if not self.permutation.full and self.segment_of_block() is not None else "order"

    def segment_of_block(self) -> list[int] | None:
        """Segment of each block of channels, by original block. None if a segment map cannot express the order: a
        block straddles two segments, or blocks change their order inside one."""
        assert self.permutation is not None
        order, block = self.permutation.order.tolist(), self.permutation.block
        in_features = sum(s.codes.shape[1] for s in self.segments)
        segments = [0] * len(order)
        position = 0
        for i, segment in enumerate(self.segments):
            left, previous = segment.codes.shape[1], -1
            while left > 0:
                index = order[position]
                left -= min(block, in_features - index * block)
                if left < 0 or index < previous:
                    return None
                segments[index], previous = i, index
                position += 1
        return segments


@dataclass(frozen=True, eq=False)
class LayerStats:
    """Calibration statistics of one layer input: sums over tokens, so that `a + b` merges two shards.

    `hessian` fp32 `[in, in]`: sum of x x^T over `tokens` tokens. `sample` fp32 `[n, in]`: an even subsample of the
    tokens for objectives that need outputs, or None.
    With the full-precision model alongside: `drift` fp32 `[in, in]`, the sum of (x_fp - x) x^T, is what earlier layers
    did to the input; `stream_drift` fp32 `[out, in]` is the sum of (r_fp - r) x^T for a layer whose output is added to
    the residual stream r.
    """

    hessian: Tensor
    tokens: int
    sample: Tensor | None = None
    drift: Tensor | None = None
    stream_drift: Tensor | None = None

    def __add__(self, other: "LayerStats") -> "LayerStats":
        both = [s for s in (self.sample, other.sample) if s is not None]
        return LayerStats(
            self.hessian + other.hessian,
            self.tokens + other.tokens,
            torch.cat(both) if both else None,
            _sum("drift", self.drift, other.drift),
            _sum("stream_drift", self.stream_drift, other.stream_drift),
        )


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear layer to quantize: `weight` fp32 `[out, in]`, `bias` fp32 `[out]` or None, statistics of its input."""

    name: str
    weight: Tensor
    bias: Tensor | None
    stats: LayerStats | None


@dataclass(frozen=True)
class LayerPlan:
    """Bits per column group of one layer, in the original column order; groups have `group_size` columns."""

    bits: tuple[int, ...]
    group_size: int

    def widths(self, in_features: int) -> list[int]:
        """Columns per group; the last group may be narrower."""
        return [min(self.group_size, in_features - start) for start in range(0, in_features, self.group_size)]


@dataclass(frozen=True)
class Cost:
    """Candidate plans of a layer and the loss of each, all in one unit. `details`: plain values for the report about
    how the plans were found."""

    plans: tuple[LayerPlan, ...]
    losses: tuple[float, ...]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """An entry in the report: a fallback, a dead channel, a raised damp. Every fallback records one."""

    layer: str
    kind: str
    detail: str


@dataclass(frozen=True, eq=False)
class Solution:
    """A solved layer. `loss`: tr((W-Q) H (W-Q)^T) of the solver, H being the mean of x x^T plus damp; None for RTN.
    `details`: values that the recipe keeps until the block is done; they are not stored."""

    weight: QuantizedWeight
    loss: float | None = None
    events: tuple[Event, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


def group_slices(in_features: int, group_size: int) -> list[slice]:
    """Column groups in order; the last one may be narrower than `group_size`."""
    return [slice(start, min(start + group_size, in_features)) for start in range(0, in_features, group_size)]


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floating-point numbers holds no NaN or Inf; without a temporary of its size."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def check_finite(name: str, **tensors: Tensor | None) -> None:
    """Raise ValueError naming the layer and the first tensor that holds NaN or Inf."""
    for label, tensor in tensors.items():
        if tensor is not None and not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"{name}: {label} holds {bad} NaN or Inf values of {tensor.numel()}")


def run_lengths(values: Sequence[int]) -> list[tuple[int, int]]:
    """[2, 2, 3] -> [(2, 2), (3, 1)]: value and count of each run."""
    runs: list[tuple[int, int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    return runs


def uniform_plan(in_features: int, bits: int, group_size: int) -> LayerPlan:
    """The same bits for every column group."""
    return LayerPlan((bits,) * len(group_slices(in_features, group_size)), group_size)


def _sum(what: str, one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None and other is None:
        return None
    if one is None or other is None:
        raise ValueError(f"cannot merge statistics: one shard has no {what}; collect it for every shard")
    return one + other
