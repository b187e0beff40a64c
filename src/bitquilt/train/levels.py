"""Trainable rounding of a stored weight with free levels: `LevelRounding` trains codes, levels and gains.

The counterpart of `rounding.Rounding` for codebooks. A weight has a place among the levels of its channel, a number
that is k at level k and linear in the weight between two levels. It takes the level nearest to its place plus a trained
offset. Levels move by less than half the distance to their neighbours and so stay in order; gains of channels and rows
move by a factor. Rounding to levels and to storage types is passed straight through.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitquilt.core.types import QuantizedWeight, Segment
from bitquilt.ops.reference import column_levels, expand_permutation
from bitquilt.train.problem import Rule, Values, stored_as

_TINY = 1e-30
_REACH = 0.45  # of the distance to the next level: two neighbours never meet


@dataclass(frozen=True, eq=False)
class LevelRounding:
    """A stored weight on codebooks, no outliers, whose codes may move: code = clamp(round(place + V)); V = 0 is the
    stored weight. Values: V `[out, in]`, the shift of every level in units of the distance to its nearer neighbour
    `[levels]`, the factors of the channels' gains `[in]` and of the rows' `[out]`.

    `place` `[out, in]`; `table` `[levels]` of all segments' tables, in which channel j's begins at `base[j]` and ends
    `top[j]` later; `gains` `[in]`, `row_gains` `[out, 1]` as stored, 1 where there are none; `channels` int64 `[in]`:
    the channel at each stored position."""

    stored: QuantizedWeight
    place: Tensor
    table: Tensor
    unit: Tensor
    base: Tensor
    top: Tensor
    gains: Tensor
    row_gains: Tensor
    channels: Tensor
    rules: tuple[Rule, ...]

    @classmethod
    def of(cls, stored: QuantizedWeight, aim: Tensor, rounding: Rule, scaling: Rule) -> "LevelRounding":
        """Start from a stored weight; `aim` fp32 `[out, in]`: the weights behind its codes, over the row gains.

        `scaling` moves levels and gains. Raises ValueError unless all grids are codebooks without outliers."""
        if stored.outliers is not None or any(s.format.grid != "codebook" for s in stored.segments):
            raise ValueError("only codebooks without outliers have levels to train")
        channels = _channels(stored, aim)
        place, gains = torch.empty_like(aim), aim.new_ones(aim.shape[1])
        base, top = torch.empty_like(channels), aim.new_empty(aim.shape[1])
        for segment, own, first in _pieces(stored, channels):
            place[:, own] = _places(segment, aim[:, own])
            if segment.zero is not None:
                gains[own] = segment.zero.float()
            groups = torch.arange(len(own), device=aim.device) // segment.format.group_size
            count = segment.scale.shape[1]
            base[own], top[own] = first + count * groups, float(count - 1)
        rows, still = stored.row_gains, Rule(0.0)
        row_gains = aim.new_ones(len(aim)) if rows is None else rows.float().to(aim.device)
        tables = [segment.scale.float() for segment in stored.segments]
        return cls(
            stored=stored,
            place=place,
            table=torch.cat([table.flatten() for table in tables]),
            unit=torch.cat([_nearer_distance(table).flatten() for table in tables]),
            base=base,
            top=top,
            gains=gains,
            row_gains=row_gains.unsqueeze(1),
            channels=channels,
            rules=(
                rounding,
                replace(scaling, low=-_REACH, high=_REACH),
                scaling if all(s.zero is not None for s in stored.segments) else still,
                still if rows is None else scaling,
            ),
        )

    @property
    def start(self) -> Values:
        """The stored weight."""
        zeros, ones = torch.zeros_like, torch.ones_like
        return zeros(self.place), zeros(self.table), ones(self.gains), ones(self.row_gains[:, 0])

    def weight(self, values: Values) -> Tensor:
        """The weight `[out, in]` with these values."""
        levels: Tensor = _Nearest.apply(self.place, values[0], self._table(values), self.base, self.top)
        weight = levels * self._gains(values)
        rows = self._row_gains(values)
        return weight if rows is None else weight * rows

    def export(self, values: Values) -> tuple[QuantizedWeight, Tensor]:
        """Return the trained weight as it is stored, and the weights behind its codes, as `of` takes them."""
        with torch.no_grad():
            place = self.place + values[0]
            codes = torch.minimum(place.round().clamp_min(0), self.top)
            table, gains = self._table(values), self._gains(values)
            below = torch.minimum(place.floor().clamp_min(0), self.top - 1)
            low, high = (table.take(self.base + (below + step).long()) for step in (0, 1))
            aim = (low + (place - below) * (high - low)) * gains
            segments = []
            for segment, own, first in _pieces(self.stored, self.channels):
                kept = None if segment.zero is None else gains[own].to(segment.zero.dtype)
                scale = table[first : first + segment.scale.numel()].view(segment.scale.shape).to(segment.scale.dtype)
                segments.append(replace(segment, codes=codes[:, own].to(torch.uint8), scale=scale, zero=kept))
            rows, stored_rows = self._row_gains(values), self.stored.row_gains
            if rows is not None and stored_rows is not None:
                stored_rows = rows.squeeze(1).to(stored_rows.dtype)
            return replace(self.stored, segments=tuple(segments), row_gains=stored_rows), aim

    def _table(self, values: Values) -> Tensor:
        return stored_as(self.stored.segments[0].scale.dtype, self.table + self.unit * values[1])

    def _gains(self, values: Values) -> Tensor:
        kept = self.stored.segments[0].zero
        return self.gains if kept is None else stored_as(kept.dtype, self.gains * values[2])

    def _row_gains(self, values: Values) -> Tensor | None:
        rows = self.stored.row_gains
        return None if rows is None else stored_as(rows.dtype, self.row_gains * values[3].unsqueeze(1))


def _channels(stored: QuantizedWeight, aim: Tensor) -> Tensor:
    """The channel at each stored position, int64 `[in]`, on the device of `aim` `[out, in]`."""
    if stored.permutation is None:
        return torch.arange(aim.shape[1], device=aim.device)
    order = stored.permutation.order.to(aim.device)
    return expand_permutation(order, stored.permutation.block, len(stored.segments), aim.shape[1])


def _pieces(stored: QuantizedWeight, channels: Tensor) -> Iterator[tuple[Segment, Tensor, int]]:
    """Each segment with its channels, and the place of its first level in the table of all."""
    start = first = 0
    for segment in stored.segments:
        stop = start + segment.codes.shape[1]
        yield segment, channels[start:stop], first
        start, first = stop, first + segment.scale.numel()


def _nearer_distance(levels: Tensor) -> Tensor:
    """The distance from every level `[tables, levels]` to the nearer of its neighbours."""
    apart = levels.diff(dim=1).abs()
    missing = apart.new_full((len(apart), 1), torch.inf)
    return torch.minimum(torch.cat((missing, apart), dim=1), torch.cat((apart, missing), dim=1))


def _places(segment: Segment, aim: Tensor) -> Tensor:
    """The places of `aim` `[out, width]` among the levels; the code itself where rounding would give another."""
    gains = segment.zero if segment.zero is not None else segment.scale.new_empty(0)
    levels = column_levels(segment.scale, gains, segment.format.group_size, aim.shape[1])
    values, codes = aim.t().contiguous(), segment.codes.t().float()
    below = (torch.searchsorted(levels, values) - 1).clamp_(0, levels.shape[1] - 2)
    low = levels.gather(1, below)
    place = below + (values - low) / (levels.gather(1, below + 1) - low).clamp_min(_TINY)
    agree = place.round().clamp(0, levels.shape[1] - 1) == codes
    return torch.where(agree, place, codes).t()


class _Nearest(torch.autograd.Function):
    """table[base + clamp(round(place + offset), 0, top)].

    The offset's gradient is the slope between the two levels around the place, and zero outside all levels. A level's
    gradient is the sum of the gradients of the weights that take it."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, offset: Tensor, table: Tensor, base: Tensor, top: Tensor) -> Tensor:
        moved = place + offset
        free = moved.round()
        codes = torch.minimum(free.clamp_min(0), top)
        index = codes.long().add_(base)
        # the lower one of the two levels around the place
        lower = torch.where(moved < codes, index - 1, index).clamp_(min=base, max=base + top.long() - 1)
        ctx.save_for_backward(index, lower, codes == free, table)
        return table.take(index)

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor | None, ...]:
        index, lower, inside, table = ctx.saved_tensors
        _, wants_offset, wants_table, _, _ = ctx.needs_input_grad
        by_offset = by_table = None
        if wants_offset:
            by_offset = (table.take(lower + 1) - table.take(lower)) * arriving * inside
        if wants_table:
            by_table = torch.bincount(index.flatten(), arriving.flatten(), minlength=len(table)).to(arriving.dtype)
        return None, by_offset, by_table, None, None
