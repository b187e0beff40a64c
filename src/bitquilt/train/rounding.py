"""What can be trained in a quantized weight? Parts for `blockwise.train`, each with its export to grids and codes.

Rounding: an offset V per weight decides which way it is rounded, with the scales beside (after arXiv 2309.05516).
Clipping: the range of each group as a share of its minimum and maximum (SliM-LLM+, LWC of arXiv 2308.13137).
Rounding has no gradient: straight through, as if it were not there. Storage types are rounded to in the same way, so
that the weight a block is trained with is the weight that is stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitquilt.layer.gptq_sweep import Sweep
from bitquilt.layer.grids import Grid
from bitquilt.layer.grids.uniform import OneBitRule, UniformGrid, fit_two_levels
from bitquilt.train.problem import Rule, Values, straight_through
from bitquilt.train.rounding_ops import Groups, round_by_offset, round_by_scale, steps_by_offset

_TINY = 1e-8  # a scale's floor as a share of the layer's largest weight: groups of tiny weights keep their grid


@dataclass(frozen=True, eq=False)
class Rounding:
    """A swept weight whose codes may move: code = clamp(round(w / s + V) + z), w what the sweep rounded and s its
    scale, so that V = 0 is the sweep. Values: V `[out, K, g]`, the factors of the scales `[out, K, 1]`.

    A scale that moves does not move codes: a code follows V alone. Where codes followed the scale too, as they do in
    the publication, the least change of a scale rounded weights anew that the sweep had matched to each other: with V
    held, KL of the whole model grew at any rate (stories260k, 2 bits: 0.77 to 0.93 at 3e-4). Zeros stay: moved by
    whole steps they never paid (3 bits: KL 0.169 with, 0.166 without).

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
        """Around a sweep's result.

        Raises ValueError for other grids than uniform ones, and for a one-bit group with two free levels: its lower
        level is no zero.
        """
        grids = [grid for grid in swept.grids if isinstance(grid, UniformGrid)]
        if len(grids) < len(swept.grids):
            raise ValueError("only the rounding of uniform grids can be trained")
        if any(grid.bits == 1 and grid.zero is not None for grid in grids):
            raise ValueError("one-bit groups with an offset cannot be trained; wanted symmetric ones")
        device = swept.codes.device
        zeros = [g.zero.float() if g.zero is not None else torch.full_like(g.scale.float(), (2**g.bits - 1) / 2)
                 for g in grids]  # fmt: skip
        split = Groups.of(groups)
        scale = torch.cat([grid.scale.float() for grid in grids], dim=1).unsqueeze(2)
        return cls(
            split.split(swept.aim) / scale,
            scale,
            torch.cat(zeros, dim=1).unsqueeze(2),
            torch.tensor([[float(2**grid.bits - 1)] for grid in grids], device=device),
            torch.tensor([[grid.zero is None] for grid in grids], device=device),
            split,
            scale_dtype,
            (rounding, scaling),
        )

    @property
    def start(self) -> Values:
        """The sweep's weight."""
        return torch.zeros_like(self.place), torch.ones_like(self.scale)

    def weight(self, values: Values) -> Tensor:
        """`[out, in]`."""
        scale = self._scale(values)
        return self.groups.join(round_by_offset(self.place, values[0], scale, self.zero, self.top, self.symmetric))

    def export(self, values: Values) -> Sweep[UniformGrid]:
        """The trained weight as a sweep's result; `loss` is not known and NaN."""
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
        scale = self.scale * values[1]
        return straight_through(scale, scale.to(self.scale_dtype).float())


@dataclass(frozen=True, eq=False)
class Clipping:
    """SliM-LLM+ (arXiv 2405.14917): the range of each group is sigmoid(u) times its maximum and sigmoid(l) times its
    minimum, codes follow by rounding. Values: u, l `[out, K]`. One-bit groups: two levels around their middle, apart by
    (sigmoid(u) + 1/2) times what `fit_two_levels` gives; their u starts at 0, so that this is 1.

    No gradient passes a zero, or the sign of a one-bit group. `initial`: where the logits start, a number or u and l.
    """

    original: Tensor
    aim: Tensor
    groups: tuple[slice, ...]
    bits: tuple[int, ...]
    levels: dict[int, UniformGrid]
    initial: float | tuple[Tensor, Tensor]
    rate: float
    scale_dtype: torch.dtype

    @classmethod
    def of(
        cls,
        weight: Tensor,
        groups: Sequence[slice],
        bits: Sequence[int],
        *,
        initial: float | tuple[Tensor, Tensor] = 4.0,
        rate: float = 1e-2,
        one_bit: OneBitRule = "two_level",
        scale_dtype: torch.dtype = torch.float16,
    ) -> "Clipping":
        """`weight` fp32 `[out, in]`, a column range and a width per group."""
        levels = {
            k: fit_two_levels(weight[:, groups[k]], rule=one_bit, scale_dtype=scale_dtype)
            for k, width in enumerate(bits)
            if width == 1
        }
        aim = Groups.of(groups).split(weight)
        return cls(weight, aim, tuple(groups), tuple(bits), levels, initial, rate, scale_dtype)

    @property
    def start(self) -> Values:
        """Factors sigmoid(initial), 1 for one-bit groups."""
        shape = (self.original.shape[0], len(self.groups))
        both = (
            self.initial
            if isinstance(self.initial, tuple)
            else (self.original.new_full(shape, float(self.initial)),) * 2
        )
        logits = tuple(logit.clone() for logit in both)
        for logit in logits:
            logit[:, sorted(self.levels)] = 0.0
        return logits

    @property
    def rules(self) -> tuple[Rule, ...]:
        """AdamW for both."""
        return Rule(self.rate), Rule(self.rate)

    def weight(self, values: Values) -> Tensor:
        """`[out, in]`."""
        scale, zero = self._range(values)
        weight = round_by_scale(self.aim, scale, zero, self._top())
        for k, grid in self.levels.items():
            weight = weight.index_copy(
                1, torch.tensor([k], device=weight.device), self._two_levels(k, grid, values).unsqueeze(1)
            )
        return Groups.of(self.groups).join(weight)

    def export(self, values: Values) -> Sweep[UniformGrid]:
        """The trained weight as a sweep's result; `loss` is not known and NaN."""
        with torch.no_grad():
            scale, zero = self._range(values)
            grids = tuple(
                self._stored_levels(k, values)
                if k in self.levels
                else UniformGrid(self.bits[k], scale[:, k].to(self.scale_dtype), zero[:, k].to(torch.uint8))
                for k in range(len(self.groups))
            )
            codes = [g.encode(self.original[:, group]) for g, group in zip(grids, self.groups, strict=True)]
            weight = torch.cat([g.decode(c) for g, c in zip(grids, codes, strict=True)], dim=1)
            return Sweep(torch.cat(codes, dim=1).to(torch.uint8), weight, grids, float("nan"))

    def factors(self, values: Values) -> Tensor:
        """What was learned: the factors of both ends of every group of two and more bits, flat."""
        wide = [k for k in range(len(self.groups)) if k not in self.levels]
        return torch.sigmoid(torch.stack(values)[:, :, wide]).flatten()

    def _top(self) -> Tensor:
        return self.original.new_tensor([[float(2**bits - 1)] for bits in self.bits])

    def _range(self, values: Values) -> tuple[Tensor, Tensor]:
        """Scale and zero `[out, K, 1]`; those of one-bit groups are not used."""
        top = self._top()
        high = torch.sigmoid(values[0]).unsqueeze(2) * self.aim.amax(dim=2, keepdim=True).clamp_min(0)
        low = torch.sigmoid(values[1]).unsqueeze(2) * self.aim.amin(dim=2, keepdim=True).clamp_max(0)
        floor = max(_TINY * float(self.original.abs().max()), torch.finfo(self.scale_dtype).tiny)
        scale = self._stored_type(((high - low) / top).clamp_min(floor))
        return scale, torch.minimum(torch.round(-low / scale).clamp_min(0), top).detach()

    def _two_levels(self, k: int, grid: UniformGrid, values: Values) -> Tensor:
        code = torch.nn.functional.pad(grid.encode(self.original[:, self.groups[k]]), (0, self._missing(k)))
        width, low = self._levels(k, grid, values)
        return low + width * code

    def _levels(self, k: int, grid: UniformGrid, values: Values) -> tuple[Tensor, Tensor]:
        """Distance of the levels and the lower one `[out, 1]`, as they are stored."""
        spread = torch.sigmoid(values[0][:, k : k + 1]) + 0.5
        width = self._stored_type(grid.scale.float() * spread)
        if grid.zero is None:
            return width, -0.5 * width
        middle = grid.zero.float() + 0.5 * grid.scale.float()
        return width, self._stored_type(middle - 0.5 * width)

    def _stored_levels(self, k: int, values: Values) -> UniformGrid:
        grid = self.levels[k]
        width, low = (value.to(self.scale_dtype) for value in self._levels(k, grid, values))
        return UniformGrid(1, width, None if grid.zero is None else low)

    def _missing(self, k: int) -> int:
        return self.aim.shape[2] - (self.groups[k].stop - self.groups[k].start)

    def _stored_type(self, value: Tensor) -> Tensor:
        return straight_through(value, value.to(self.scale_dtype).to(value.dtype))
