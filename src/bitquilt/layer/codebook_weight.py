"""How do channels with free levels become a stored weight? round_channels(weight, bits, tables, ...).

Bits differ from channel to channel; channels of equal bits are stored side by side. Two ways to spend bytes on levels
(`Tables`): a table per channel, or one per width that all its channels share, with a gain each. Shared tables may be
multiplied by a gain per row too: then the rows over their gains are what is clustered, swept and stored.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitquilt.core.types import Format, Outliers, Permutation, QuantizedWeight, Segment
from bitquilt.layer.gptq_sweep import Sweep, in_original_order, sweep
from bitquilt.layer.grids.codebook import Clustering, CodebookGrid, fit_codebook
from bitquilt.layer.grids.row_gains import fit_row_gains
from bitquilt.layer.grids.shared_levels import SharedTable, fit_table
from bitquilt.layer.hessian import Factor
from bitquilt.layer.outliers import sparse_remainder

TableScope = Literal["shared", "channel"]
Fit = Callable[[Tensor, Tensor], CodebookGrid]
"""(columns `[out, n]`, which of their weights count, float) -> grid."""


@dataclass(frozen=True)
class LevelTables:
    """`scope`: a table per "channel", or "shared" by the channels of a width, each with a gain of `gain_dtype`.
    `dtype`: of the levels. `clustering`, `iterations` as in `fit_codebook`. `row_gain_dtype`: of a gain per row; None =
    none; with shared tables only."""

    scope: TableScope = "shared"
    clustering: Clustering = "exact"
    iterations: int = 50
    dtype: torch.dtype = torch.float16
    gain_dtype: torch.dtype = torch.float8_e4m3fn
    row_gain_dtype: torch.dtype | None = None

    def format(self, bits: int, width: int) -> Format:
        """How `width` channels of so many bits are stored."""
        if self.scope == "channel":
            return Format(bits, 1, "codebook", self.dtype)
        return Format(bits, width, "codebook", self.dtype, gain_dtype=self.gain_dtype)

    def fitter(self, weight: Tensor, bits: int, counted: Tensor, importance: Tensor | None) -> Fit:
        """How channels of so many bits get levels; a shared table is fitted here, to `weight` fp32 `[out, n]`."""
        options = {"clustering": self.clustering, "iterations": self.iterations, "dtype": self.dtype}
        if self.scope == "channel":
            return lambda columns, mass: fit_codebook(columns, bits, mass, **options)  # type: ignore[arg-type]
        table: SharedTable = fit_table(
            weight, bits, counted, importance, gain_dtype=self.gain_dtype, **options  # type: ignore[arg-type]
        )  # fmt: skip
        return table.fit

    def over_row_gains(self, weight: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`weight` and `counted` `[out, in]` as the tables see them, and the gains as stored `[out]`, or None.

        An error counts by the square of its row's gain: it is that of the weight itself."""
        if self.row_gain_dtype is None:
            return weight, counted, None
        stored = fit_row_gains(weight, counted, self.row_gain_dtype)
        gains = stored.float().unsqueeze(1)
        return weight / gains, counted * gains.square(), stored


def round_channels(
    weight: Tensor, bits: Sequence[int], tables: LevelTables, protected: Tensor, importance: Tensor | None
) -> tuple[QuantizedWeight, Tensor]:
    """Every weight to the nearest level of its channel, what is protected to the level nearest 0 and beside it.

    `weight` fp32, `protected` bool `[out, in]`, which no table sees; `importance` `[in]` weighs the channels in a
    shared table. Also returns the dense part `[out, in]`.
    """
    codes, dense = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    weight, counted, row_gains = tables.over_row_gains(weight, (~protected).float())
    rest = weight.masked_fill(protected, 0.0)
    grids = {}
    for b, channels in channels_by_bits(bits).items():
        fit = tables.fitter(weight[:, channels], b, counted[:, channels], _of(importance, channels))
        grids[b] = fit(weight[:, channels], counted[:, channels])
        nearest = grids[b].encode(rest[:, channels])
        codes[:, channels], dense[:, channels] = nearest.to(torch.uint8), grids[b].decode(nearest)
    stored = assemble_codebooks(codes, bits, grids, tables, sparse_remainder(weight, dense, protected), row_gains)
    return stored, dense if row_gains is None else dense * row_gains.float().unsqueeze(1)


def sweep_channels(
    weight: Tensor,
    bits: Sequence[int],
    tables: LevelTables,
    protected: Tensor,
    importance: Tensor | None,
    factor: Factor,
) -> tuple[QuantizedWeight, float, Tensor]:
    """The GPTQ sweep in the factor's order: a channel's own levels, or its gain, are fitted when the sweep reaches it,
    a shared table to the weights as they were. Also returns the loss, and what the codes were rounded from `[out, in]`,
    over the row gains."""
    upper, order = factor.upper, factor.order
    if order is None:
        order = torch.arange(weight.shape[1], device=weight.device)
    places = order.tolist()
    weight, counted, row_gains = tables.over_row_gains(weight, (~protected).float())
    fits = {
        b: tables.fitter(weight[:, channels], b, counted[:, channels], _of(importance, channels))
        for b, channels in channels_by_bits(bits).items()
    }

    def fit_column(k: int, column: Tensor) -> CodebookGrid:
        return fits[bits[places[k]]](column, counted[:, places[k] : places[k] + 1])

    singles = [slice(k, k + 1) for k in range(len(places))]
    swept = sweep(weight[:, order], upper, singles, fit_column, protected[:, order])
    by_channel = dict(zip(places, swept.grids, strict=True))
    loss = swept.loss if row_gains is None else _loss(swept, upper, row_gains)
    swept = in_original_order(swept, tuple(by_channel[j] for j in range(len(places))), order)
    grids = {b: _joined([swept.grids[j] for j in channels.tolist()]) for b, channels in channels_by_bits(bits).items()}
    outliers = None
    if swept.remainder is not None:
        outliers = sparse_remainder(swept.remainder, torch.zeros(()), protected)
    return assemble_codebooks(swept.codes, bits, grids, tables, outliers, row_gains), loss, swept.aim


def _loss(swept: Sweep[CodebookGrid], upper: Tensor, row_gains: Tensor) -> float:
    """A sweep's loss where its rows are those of the weight over their gains."""
    assert swept.compensated is not None
    errors = (swept.compensated - swept.weight) / upper.diagonal()
    return float(errors.square().sum(dim=1, dtype=torch.float64) @ row_gains.double().square())


def assemble_codebooks(
    codes: Tensor,
    bits: Sequence[int],
    grids: Mapping[int, CodebookGrid],
    tables: LevelTables,
    outliers: Outliers | None,
    row_gains: Tensor | None = None,
) -> QuantizedWeight:
    """Channels by bits: `codes` uint8 `[out, in]`, `bits` per channel, `grids[b]` the levels of the channels of b bits
    in channel order; `row_gains` `[out]` as stored. Channels keep their order inside a segment."""
    segments, order = [], []
    for b, channels in channels_by_bits(bits).items():
        order += channels.tolist()
        grid, form = grids[b], tables.format(b, len(channels))
        scale = grid.levels if grid.table is None else grid.table.unsqueeze(0)
        gains = None if form.gain_dtype is None or grid.gains is None else grid.gains.to(form.gain_dtype)
        segments.append(Segment(form, codes[:, channels], scale.to(form.scale_dtype), gains))
    permutation = Permutation(torch.tensor(order), 1) if order != sorted(order) else None
    return QuantizedWeight(tuple(segments), permutation, outliers, row_gains)


def channels_by_bits(bits: Sequence[int]) -> dict[int, Tensor]:
    """The channels of each width, int64, narrow widths first."""
    members: dict[int, list[int]] = defaultdict(list)
    for channel, b in enumerate(bits):
        members[b].append(channel)
    return {b: torch.tensor(members[b]) for b in sorted(members)}


def _of(importance: Tensor | None, channels: Tensor) -> Tensor | None:
    return None if importance is None else importance[channels]


def _joined(grids: Sequence[CodebookGrid]) -> CodebookGrid:
    gains = [g.gains for g in grids if g.gains is not None]
    return CodebookGrid(
        grids[0].bits, torch.cat([g.levels for g in grids]), torch.cat(gains) if gains else None, grids[0].table
    )
