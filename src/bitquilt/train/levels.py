"""What can be trained in a stored weight with free levels? Which level each weight takes, the levels, and the gains.

The trainable part of `solvers.trainable.Rounding` for codebooks: a weight has a place among the levels of its channel,
a number that is k at level k and linear in the weight between two of them, and takes the level nearest to its place
plus an offset that is trained. Levels move by less than half the distance to their neighbours and so stay in order;
gains of channels and rows move by a factor. Rounding is straight through, storage types are rounded to likewise.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitquilt.core.types import QuantizedWeight, Segment
from bitquilt.ops.reference import column_levels, expand_permutation
from bitquilt.train.problem import Rule, Values, straight_through

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
        """`aim` fp32 `[out, in]`: what the codes were rounded from, over the row gains; `scaling` moves levels and
        gains. Raises ValueError unless all grids are codebooks without outliers."""
        if stored.outliers is not None or any(s.format.grid != "codebook" for s in stored.segments):
            raise ValueError("only codebooks without outliers have levels to train")
        out_features, in_features = aim.shape
        channels = torch.arange(in_features, device=aim.device)
        if stored.permutation is not None:
            order = stored.permutation.order.to(aim.device)
            channels = expand_permutation(order, stored.permutation.block, len(stored.segments), in_features)
        place, gains = torch.empty_like(aim), aim.new_ones(in_features)
        base, top = torch.empty_like(channels), aim.new_empty(in_features)
        tables, units, start, first = [], [], 0, 0
        for segment in stored.segments:
            width, levels = segment.codes.shape[1], 1 << segment.format.bits
            own, own_levels = channels[start : start + width], segment.scale.float()
            place[:, own] = _places(segment, aim[:, own])
            if segment.zero is not None:
                gains[own] = segment.zero.float()
            groups = torch.arange(width, device=aim.device) // segment.format.group_size
            base[own], top[own] = first + levels * groups, float(levels - 1)
            tables.append(own_levels.flatten())
            apart = own_levels.diff(dim=1).abs()
            units.append(torch.minimum(_beside(apart, 0), _beside(apart, 1)).flatten())
            start, first = start + width, first + own_levels.numel()
        rows = stored.row_gains
        still = Rule(0.0)
        rules = (
            rounding,
            replace(scaling, low=-_REACH, high=_REACH),
            scaling if all(s.zero is not None for s in stored.segments) else still,
            still if rows is None else scaling,
        )
        row_gains = aim.new_ones(out_features) if rows is None else rows.float().to(aim.device)
        table, unit = torch.cat(tables), torch.cat(units)
        return cls(stored, place, table, unit, base, top, gains, row_gains.unsqueeze(1), channels, rules)

    @property
    def start(self) -> Values:
        """The stored weight."""
        return (
            torch.zeros_like(self.place),
            torch.zeros_like(self.table),
            torch.ones_like(self.gains),
            torch.ones_like(self.row_gains).squeeze(1),
        )

    def weight(self, values: Values) -> Tensor:
        """`[out, in]`."""
        levels: Tensor = _Nearest.apply(self.place, values[0], self._table(values), self.base, self.top)
        weight = levels * self._gains(values)
        return weight if self.stored.row_gains is None else weight * self._row_gains(values)

    def export(self, values: Values) -> tuple[QuantizedWeight, Tensor]:
        """The trained weight as it is stored, and what its codes were rounded from, as `of` takes it."""
        with torch.no_grad():
            place = self.place + values[0]
            codes = torch.minimum(place.round().clamp_min(0), self.top)
            table, gains = self._table(values), self._gains(values)
            below = torch.minimum(place.floor().clamp_min(0), self.top - 1)
            low, high = (table.take(self.base + (below + step).long()) for step in (0, 1))
            aim = (low + (place - below) * (high - low)) * gains
            segments, start, first = [], 0, 0
            for segment in self.stored.segments:
                stop, last = start + segment.codes.shape[1], first + segment.scale.numel()
                own = self.channels[start:stop]
                kept = None if segment.zero is None else gains[own].to(segment.zero.dtype)
                scale = table[first:last].view(segment.scale.shape).to(segment.scale.dtype)
                segments.append(replace(segment, codes=codes[:, own].to(torch.uint8), scale=scale, zero=kept))
                start, first = stop, last
            rows = self.stored.row_gains
            if rows is not None:
                rows = self._row_gains(values).squeeze(1).to(rows.dtype)
            return replace(self.stored, segments=tuple(segments), row_gains=rows), aim

    def _table(self, values: Values) -> Tensor:
        return _as(self.stored.segments[0].scale.dtype, self.table + self.unit * values[1])

    def _gains(self, values: Values) -> Tensor:
        kept = self.stored.segments[0].zero
        return self.gains if kept is None else _as(kept.dtype, self.gains * values[2])

    def _row_gains(self, values: Values) -> Tensor:
        rows = self.stored.row_gains
        assert rows is not None
        return _as(rows.dtype, self.row_gains * values[3].unsqueeze(1))


def _as(dtype: torch.dtype, value: Tensor) -> Tensor:
    """As it is stored."""
    limit = torch.finfo(dtype).max
    return straight_through(value, value.clamp(-limit, limit).to(dtype).float())


def _beside(apart: Tensor, end: int) -> Tensor:
    """The distance from every level to the one before (`end` 0) or behind it; infinite where there is none."""
    missing = apart.new_full((len(apart), 1), torch.inf)
    return torch.cat((missing, apart) if end == 0 else (apart, missing), dim=1)


def _places(segment: Segment, aim: Tensor) -> Tensor:
    """Where `aim` `[out, width]` lies among the levels; at its code where rounding does not say so."""
    gains = segment.zero if segment.zero is not None else segment.scale.new_empty(0)
    levels = column_levels(segment.scale, gains, segment.format.group_size, aim.shape[1])
    values, codes = aim.t().contiguous(), segment.codes.t().float()
    below = (torch.searchsorted(levels, values) - 1).clamp_(0, levels.shape[1] - 2)
    low = levels.gather(1, below)
    place = below + (values - low) / (levels.gather(1, below + 1) - low).clamp_min(_TINY)
    agree = place.round().clamp(0, levels.shape[1] - 1) == codes
    return torch.where(agree, place, codes).t()


class _Nearest(torch.autograd.Function):
    """table[base + clamp(round(place + offset), 0, top)]. The offset's gradient is the slope between the two levels
    around the place, and zero outside of all levels; a level's is what arrives where it was taken."""

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
