"""Trainable ranges of a stored weight on uniform grids: `Ranges`.

A factor per row and group stretches or clips the range about zero and every level moves with it: codes, zeros, outliers
and the bytes stay. Codes stay because it measured better: rounding them anew as the range moves undoes the sweep
(stories260k, 2 bits, KL: `gptq` with scale search 1.97, with codes that follow 1.94, with codes that stay 1.56).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitquilt.core.types import QuantizedWeight, Segment, group_slices
from bitquilt.ops.reference import expand_permutation
from bitquilt.train.problem import Rule, Values, stored_as
from bitquilt.train.rounding_ops import Groups


@dataclass(frozen=True, eq=False)
class Ranges:
    """A stored weight on uniform grids. Values: the factors of each segment `[out, groups]`, between 1/4 and 4."""

    stored: QuantizedWeight
    rate: float

    def __post_init__(self) -> None:
        if any(segment.format.grid != "uniform" for segment in self.stored.segments):
            raise ValueError("only uniform grids have a range to train; leave clipping at 'solved' for other grids")

    @property
    def start(self) -> Values:
        """The stored weight."""
        return tuple(torch.ones_like(segment.scale, dtype=torch.float32) for segment in self.stored.segments)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """AdamW for all."""
        return tuple(Rule(self.rate, low=0.25, high=4.0) for _ in self.stored.segments)

    def weight(self, values: Values) -> Tensor:
        """The weight `[out, in]` with these values."""
        dense = torch.cat([_decoded(s, v) for s, v in zip(self.stored.segments, values, strict=True)], dim=1)
        permutation, outliers = self.stored.permutation, self.stored.outliers
        if permutation is not None:
            count, order = len(self.stored.segments), permutation.order.to(dense.device)
            channels = expand_permutation(order, permutation.block, count, dense.shape[1])
            dense = dense.index_select(1, channels.argsort())
        if outliers is not None:
            rows = torch.repeat_interleave(torch.arange(len(dense), device=dense.device), outliers.rows.long().diff())
            dense = dense.index_put((rows, outliers.columns.long()), outliers.values.float(), accumulate=True)
        return dense

    def export(self, values: Values) -> QuantizedWeight:
        """Return the trained weight as it is stored."""
        segments = []
        for segment, factor in zip(self.stored.segments, values, strict=True):
            scale, low = _stretched(segment, factor.detach())
            zero = segment.zero if low is None else low.to(segment.scale.dtype)
            segments.append(replace(segment, scale=scale.to(segment.scale.dtype), zero=zero))
        return replace(self.stored, segments=tuple(segments))


def _stretched(segment: Segment, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scale and, for one-bit groups with two free levels, the lower one, fp32 but rounded as they are stored."""
    kind, zero = segment.scale.dtype, segment.zero
    low = stored_as(kind, zero.float() * factor) if segment.format.bits == 1 and zero is not None else None
    return stored_as(kind, segment.scale.float() * factor), low


def _decoded(segment: Segment, factor: Tensor) -> Tensor:
    """The values `[out, width]`, as `ops.reference.decode_uniform` does, differentiable in the factor."""
    groups = Groups.of(group_slices(segment.codes.shape[1], segment.format.group_size))
    codes = groups.split(segment.codes.float())
    scale, low = _stretched(segment, factor)
    if low is not None:
        return groups.join(low.unsqueeze(2) + scale.unsqueeze(2) * codes)
    middle = (2**segment.format.bits - 1) / 2 if segment.zero is None else segment.zero.float().unsqueeze(2)
    return groups.join(scale.unsqueeze(2) * (codes - middle))
