"""Channels with free levels as a stored weight: `round_channels` by rounding, `sweep_channels` with error feedback.

Bits differ from channel to channel; channels of equal bits are stored side by side. `LevelTables` has two ways to spend
bytes on levels: a table per channel, or one per width that all its channels share, with a gain each. Shared tables may
be multiplied by a gain per row too: then the rows over their gains are clustered, swept and stored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitquilt.core.types import Format, LayerPlan, QuantizedWeight
from bitquilt.layer.assembly import assemble, groups_by_bits, permutation_of
from bitquilt.layer.gptq_sweep import Sweep, in_original_order, sweep
from bitquilt.layer.grids.codebook import CodebookGrid, fit_codebook
from bitquilt.layer.grids.row_gains import fit_row_gains
from bitquilt.layer.grids.shared_levels import SharedTable, fit_table
from bitquilt.layer.hessian import Factor
from bitquilt.layer.outliers import sparse_remainder
from bitquilt.ops import sweep_kernels

TableScope = Literal["shared", "channel"]
FitChannels = Callable[[Tensor, Tensor], CodebookGrid]
"""(columns `[out, n]`, which of their weights count, float) -> grid."""


@dataclass(frozen=True)
class LevelTables:
    """`scope`: a table per "channel", or "shared" by the channels of a width, each with a gain of `gain_dtype`.
    `dtype`: of the levels. `row_gain_dtype`: of a gain per row, for shared tables only; None = no row gains."""

    scope: TableScope = "shared"
    dtype: torch.dtype = torch.float16
    gain_dtype: torch.dtype = torch.float8_e4m3fn
    row_gain_dtype: torch.dtype | None = None

    def format(self, bits: int, width: int) -> Format:
        """The format of `width` channels with this many bits."""
        if self.scope == "channel":
            return Format(bits, 1, "codebook", self.dtype)
        return Format(bits, width, "codebook", self.dtype, gain_dtype=self.gain_dtype)

    def fitter(self, weight: Tensor, bits: int, counted: Tensor, importance: Tensor | None) -> FitChannels:
        """Return the fit for channels with these bits; a shared table is fitted here, to `weight` fp32 `[out, n]`."""
        if self.scope == "shared":
            return fit_table(weight, bits, counted, importance, dtype=self.dtype, gain_dtype=self.gain_dtype)
        return lambda columns, mass: fit_codebook(columns, bits, mass, self.dtype)

    def over_row_gains(self, weight: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`weight` and `counted` `[out, in]` as the tables see them, and the gains as stored `[out]`, or None.

        An error in a row over its gain counts by the square of the gain, like the same error in the weight."""
        if self.row_gain_dtype is None:
            return weight, counted, None
        stored = fit_row_gains(weight, counted, self.row_gain_dtype)
        gains = stored.float().unsqueeze(1)
        return weight / gains, counted * gains.square(), stored


def round_channels(
    weight: Tensor, bits: Sequence[int], tables: LevelTables, protected: Tensor, importance: Tensor | None
) -> tuple[QuantizedWeight, Tensor]:
    """Round every weight to the nearest level of its channel; a protected one takes the level nearest 0.

    `weight` fp32, `protected` bool `[out, in]`, which no table sees and an outlier completes; `importance` `[in]`
    weighs the channels in a shared table. Also returns the dense part `[out, in]`.
    """
    weight, counted, row_gains = tables.over_row_gains(weight, (~protected).float())
    kept, dense = weight.masked_fill(protected, 0.0), torch.empty_like(weight)
    segments, order = [], []
    for b, channels in groups_by_bits(bits).items():
        order += channels
        # all channels in one width, as when a width is tried: a view, copies took a fifth of the time
        index = slice(None) if len(channels) == len(bits) else torch.tensor(channels)
        fit = tables.fitter(weight[:, index], b, counted[:, index], _of(importance, index))
        grid = fit(weight[:, index], counted[:, index])
        nearest = grid.encode(kept[:, index])
        dense[:, index] = grid.decode(nearest)
        segments.append(CodebookGrid.segment([grid], nearest.to(torch.uint8).contiguous()))
    outliers = sparse_remainder(weight - dense, protected)
    stored = QuantizedWeight(tuple(segments), permutation_of(order, 1), outliers, row_gains)
    return stored, dense if row_gains is None else dense * row_gains.float().unsqueeze(1)


def sweep_channels(
    weight: Tensor,
    bits: Sequence[int],
    tables: LevelTables,
    protected: Tensor,
    importance: Tensor | None,
    factor: Factor,
) -> tuple[QuantizedWeight, float, Tensor]:
    """Sweep in the factor's order: a channel's own levels, or its gain, are fitted when the sweep reaches it, a shared
    table beforehand to the weights. Also returns the loss and the swept weights `[out, in]` over the row gains."""
    upper, order = factor.upper, factor.order
    if order is None:
        order = torch.arange(weight.shape[1], device=weight.device)
    places = order.tolist()
    weight, counted, row_gains = tables.over_row_gains(weight, (~protected).float())
    fits: dict[int, FitChannels] = {}
    for b, channels in groups_by_bits(bits).items():
        index = torch.tensor(channels)
        fits[b] = tables.fitter(weight[:, index], b, counted[:, index], _of(importance, index))

    def fit_column(k: int, column: Tensor) -> CodebookGrid:
        return fits[bits[places[k]]](column, counted[:, places[k] : places[k] + 1])

    def whole_block(block: sweep_kernels.SweepBlock, columns: slice) -> list[CodebookGrid] | None:
        members = places[columns]
        return _sweep_natively(block, [fits[bits[j]] for j in members], counted[:, members])

    singles = [slice(k, k + 1) for k in range(len(places))]
    kept = protected[:, order] if bool(protected.any()) else None
    swept = sweep(weight[:, order], upper, singles, fit_column, kept, whole_block)
    loss = swept.loss if row_gains is None else _loss(swept, upper, row_gains)
    by_channel = dict(zip(places, swept.grids, strict=True))
    swept = in_original_order(swept, tuple(by_channel[j] for j in range(len(places))), order)
    outliers = None if swept.remainder is None else sparse_remainder(swept.remainder, protected)
    return assemble(swept, LayerPlan(tuple(bits), 1), outliers, row_gains), loss, swept.aim


def _sweep_natively(
    block: sweep_kernels.SweepBlock, fits: Sequence[FitChannels], counted: Tensor
) -> list[CodebookGrid] | None:
    """Sweep a block of channels with shared tables by the kernel; None where it cannot: `counted` `[out, width]`."""
    tables = [fit for fit in fits if isinstance(fit, SharedTable) and fit.native]
    if len(tables) < len(fits) or not sweep_kernels.usable(block.columns):
        return None
    distinct = list(dict.fromkeys(tables))
    known = [(table.table.float(), table.spread) for table in distinct]
    gains = sweep_kernels.sweep_shared(
        block, known, [distinct.index(table) for table in tables], counted.t().contiguous()
    )
    return [table.grid(gains[j : j + 1]) for j, table in enumerate(tables)]


def _loss(swept: Sweep[CodebookGrid], upper: Tensor, row_gains: Tensor) -> float:
    """The loss of a sweep over rows that were divided by their gains."""
    assert swept.compensated is not None
    errors = (swept.compensated - swept.weight) / upper.diagonal()
    return float(errors.square().sum(dim=1, dtype=torch.float64) @ row_gains.double().square())


def _of(importance: Tensor | None, channels: Tensor | slice) -> Tensor | None:
    return None if importance is None else importance[channels]
