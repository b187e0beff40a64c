"""Trainable rounding of a weight on uniform grids: `Rounding` trains offsets and scales, `Clipping` the ranges.

Rounding: an offset V per weight decides which way it is rounded, and the scales move too (after arXiv 2309.05516).
Clipping: the range of each group as a share of its minimum and maximum (SliM-LLM+, LWC of arXiv 2308.13137).
Rounding to codes has no gradient and is passed straight through. Storage types are rounded to in the same way, so that
a block is trained with the weight that is stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bitquilt.layer.gptq_sweep import Sweep
from bitquilt.layer.grids import Grid, UniformGrid
from bitquilt.layer.grids.uniform import fit_two_levels
from bitquilt.train.problem import Rule, Values, stored_as
from bitquilt.train.rounding_ops import Groups, round_by_offset, round_by_scale, steps_by_offset

_TINY = 1e-8  # a scale's floor as a share of the layer's largest weight: groups of tiny weights keep their grid


@dataclass(frozen=True, eq=False)
class Rounding:
    """A swept weight whose codes may move: code = clamp(round(w / s + V) + z), with w the weight that the sweep rounded
    and s its scale: V = 0 is the sweep. Values: V `[out, K, g]`, the factors of the scales `[out, K, 1]`.

    A scale that moves does not move codes: a code follows V alone. With codes that follow the scale too, as published,
    the least change of a scale rounds weights anew that the sweep had matched to each other: with V held, KL of the
    whole model grew at any rate (stories260k, 2 bits: 0.77 to 0.93 at 3e-4). Zeros stay: moving them by whole steps
    gained nothing (3 bits: KL 0.169 with, 0.166 without).

    `place` = w / s `[out, K, g]` as `groups` splits it; `[out, K, 1]`: `scale` in storage precision, `zero` (top / 2 if
    `symmetric`); `[K, 1]`: `top` the largest code, `symmetric`."""

    place: Tensor
    scale: Tensor
    zero: Tensor
    top: Tensor
    symmetric: Tensor
    groups: Groups
    scale_dtype: torch.dtype
    rules: tuple[Rule, Rule]

    @classmethod
    def of(
        cls,
        swept: Sweep[Grid],
        groups: Sequence[slice],
        scale_dtype: torch.dtype,
        rounding: Rule,
        scaling: Rule,
    ) -> "Rounding":
        """Start from a sweep's result.

        Raises ValueError for grids that are not uniform, and for a one-bit group with two free levels: its lower level
        is not zero.
        """
        grids = [grid for grid in swept.grids if isinstance(grid, UniformGrid)]
        if len(grids) < len(swept.grids):
            raise ValueError("only the rounding of uniform grids can be trained")
        if any(grid.bits == 1 and grid.zero is not None for grid in grids):
            raise ValueError("one-bit groups with an offset cannot be trained; wanted symmetric ones")
        device, split = swept.codes.device, Groups.of(groups)
        tops = [float(2**grid.bits - 1) for grid in grids]
        zeros = [
            torch.full_like(grid.scale, top / 2, dtype=torch.float32) if grid.zero is None else grid.zero.float()
            for grid, top in zip(grids, tops, strict=True)
        ]
        scale = torch.cat([grid.scale.float() for grid in grids], dim=1).unsqueeze(2)
        return cls(
            place=split.split(swept.aim) / scale,
            scale=scale,
            zero=torch.cat(zeros, dim=1).unsqueeze(2),
            top=torch.tensor(tops, device=device).unsqueeze(1),
            symmetric=torch.tensor([[grid.zero is None] for grid in grids], device=device),
            groups=split,
            scale_dtype=scale_dtype,
            rules=(rounding, scaling),
        )

    @property
    def start(self) -> Values:
        """The sweep's weight."""
        return torch.zeros_like(self.place), torch.ones_like(self.scale)

    def weight(self, values: Values) -> Tensor:
        """The weight `[out, in]` with these values."""
        scale = self._scale(values)
        return self.groups.join(round_by_offset(self.place, values[0], scale, self.zero, self.top, self.symmetric))

    def export(self, values: Values) -> Sweep[UniformGrid]:
        """Return the trained weight as a sweep's result, its `loss` NaN."""
        with torch.no_grad():
            scale = self._scale(values)
            steps, _ = steps_by_offset(self.place, values[0], self.zero, self.top, self.symmetric)
            grids = tuple(
                UniformGrid(
                    int(self.top[k]).bit_length(),
                    scale[:, k].to(self.scale_dtype),
                    None if bool(self.symmetric[k]) else self.zero[:, k].to(torch.uint8),
                )
                for k in range(self.groups.count)
            )
            codes = self.groups.join(steps + self.zero).to(torch.uint8)
            aim = self.groups.join((self.place + values[0]) * scale)
            return Sweep(codes, self.groups.join(steps * scale), grids, float("nan"), None, aim)

    def _scale(self, values: Values) -> Tensor:
        return stored_as(self.scale_dtype, self.scale * values[1])


@dataclass(frozen=True, eq=False)
class Clipping:
    """SliM-LLM+ (arXiv 2405.14917): the range of each group is sigmoid(u) times its maximum and sigmoid(l) times its
    minimum, codes follow by rounding. Values: u, l `[out, K]`. One-bit groups: two levels around their middle, apart by
    (sigmoid(u) + 1/2) times the distance of `fit_two_levels`; their u starts at 0, so that this factor is 1.

    No gradient passes a zero, or the sign of a one-bit group. `original` fp32 `[out, in]`, with a column range and a
    width per group; `initial`: the first logit of both.
    """

    original: Tensor
    groups: Sequence[slice]
    bits: Sequence[int]
    initial: float = 4.0
    rate: float = 1e-2
    scale_dtype: torch.dtype = torch.float16

    @cached_property
    def aim(self) -> Tensor:
        """The weight `[out, K, g]`."""
        return Groups.of(self.groups).split(self.original)

    @cached_property
    def top(self) -> Tensor:
        """The largest code of each group `[K, 1]`."""
        return self.original.new_tensor([[float(2**width - 1)] for width in self.bits])

    @cached_property
    def levels(self) -> dict[int, UniformGrid]:
        """The grids of the one-bit groups, by group."""
        return {
            k: fit_two_levels(self.original[:, self.groups[k]], rule="code", scale_dtype=self.scale_dtype)
            for k, width in enumerate(self.bits)
            if width == 1
        }

    @property
    def start(self) -> Values:
        """Factors sigmoid(initial), 1 for one-bit groups."""
        logit = self.original.new_full((len(self.original), len(self.groups)), self.initial)
        logit[:, sorted(self.levels)] = 0.0
        return logit, logit.clone()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """AdamW for both."""
        return Rule(self.rate), Rule(self.rate)

    def weight(self, values: Values) -> Tensor:
        """The weight `[out, in]` with these values."""
        scale, zero = self._range(values)
        weight = round_by_scale(self.aim, scale, zero, self.top)
        for k, grid in self.levels.items():
            step, low = self._levels(k, values)
            place = torch.tensor([k], device=weight.device)
            weight = weight.index_copy(1, place, (low + step * grid.encode(self.aim[:, k])).unsqueeze(1))
        return Groups.of(self.groups).join(weight)

    def export(self, values: Values) -> Sweep[UniformGrid]:
        """Return the trained weight as a sweep's result, its `loss` NaN."""
        with torch.no_grad():
            scale, zero = self._range(values)
            grids = []
            for k, bits in enumerate(self.bits):
                step, offset = scale[:, k], zero[:, k].to(torch.uint8)
                if k in self.levels:
                    step, low = self._levels(k, values)
                    offset = low.to(self.scale_dtype)
                grids.append(UniformGrid(bits, step.to(self.scale_dtype), offset))
            codes = [g.encode(self.original[:, group]) for g, group in zip(grids, self.groups, strict=True)]
            weight = torch.cat([g.decode(c) for g, c in zip(grids, codes, strict=True)], dim=1)
            return Sweep(torch.cat(codes, dim=1).to(torch.uint8), weight, tuple(grids), float("nan"))

    def factors(self, values: Values) -> Tensor:
        """The learned factors of both ends of every group of two and more bits, flat."""
        wide = [k for k in range(len(self.groups)) if k not in self.levels]
        return torch.sigmoid(torch.stack(values)[:, :, wide]).flatten()

    def _range(self, values: Values) -> tuple[Tensor, Tensor]:
        """Scale and zero `[out, K, 1]`; those of one-bit groups are not used."""
        high = torch.sigmoid(values[0]).unsqueeze(2) * self.aim.amax(dim=2, keepdim=True).clamp_min(0)
        low = torch.sigmoid(values[1]).unsqueeze(2) * self.aim.amin(dim=2, keepdim=True).clamp_max(0)
        floor = max(_TINY * float(self.original.abs().max()), torch.finfo(self.scale_dtype).tiny)
        scale = stored_as(self.scale_dtype, ((high - low) / self.top).clamp_min(floor))
        return scale, torch.minimum(torch.round(-low / scale).clamp_min(0), self.top).detach()

    def _levels(self, k: int, values: Values) -> tuple[Tensor, Tensor]:
        """The distance of a one-bit group's levels and the lower one `[out, 1]`, as they are stored."""
        grid = self.levels[k]
        spread = torch.sigmoid(values[0][:, k : k + 1]) + 0.5
        step = stored_as(self.scale_dtype, grid.scale.float() * spread)
        assert grid.zero is not None
        middle = grid.zero.float() + 0.5 * grid.scale.float()
        return step, stored_as(self.scale_dtype, middle - 0.5 * step)
