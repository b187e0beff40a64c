"""What can be trained in a quantized weight? Parts for `blockwise.train`, each with its export to grids and codes.

Rounding: an offset V per weight decides which way it is rounded, with scales and zeros beside (after arXiv 2309.05516).
Clipping: the range of each group as a share of its minimum and maximum (SliM-LLM+, LWC of arXiv 2308.13137).
Rounding has no gradient: straight through, as if it were not there. Storage types are rounded to in the same way, so
that the weight a block is trained with is the weight that is stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitquilt.grids.uniform import OneBitRule, UniformGrid, fit_two_levels
from bitquilt.solvers.blockwise import Rule, Values
from bitquilt.solvers.gptq import Sweep

_TINY = 1e-8  # a scale's floor as a share of the layer's largest weight: groups of tiny weights keep their grid


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value`."""
    return value + (rounded - value).detach()


@dataclass(frozen=True, eq=False)
class Rounding:
    """A swept weight whose codes may move: code = clamp(round(w / s + V) + z), w what the sweep rounded, so that V = 0
    is the sweep. Values: V `[out, in]` in -1/2 .. 1/2, the scales' factors `[out, K]`, what is added to the zeros.

    Per group `[K]`: `top` the largest code; `[out, K]`: `scale` in storage precision, `zero` (top / 2 if `symmetric`);
    `group_of` int64 `[in]`."""

    aim: Tensor
    scale: Tensor
    zero: Tensor
    top: Tensor
    symmetric: Tensor
    group_of: Tensor
    scale_dtype: torch.dtype
    rates: tuple[float, float, float]

    @classmethod
    def of(
        cls,
        swept: Sweep[UniformGrid],
        groups: Sequence[slice],
        scale_dtype: torch.dtype,
        rates: tuple[float, float, float],
    ) -> "Rounding":
        """Around a sweep's result; `rates` of V (by sign), scales and zeros (AdamW).

        Raises ValueError for a one-bit group with two free levels: its lower level is no zero that could be trained.
        """
        if any(grid.bits == 1 and grid.zero is not None for grid in swept.grids):
            raise ValueError("one-bit groups with an offset cannot be trained; wanted symmetric ones")
        device = swept.codes.device
        widths = torch.tensor([group.stop - group.start for group in groups], device=device)
        top = torch.tensor([float(2**grid.bits - 1) for grid in swept.grids], device=device)
        zeros = [g.zero.float() if g.zero is not None else torch.full_like(g.scale.float(), (2**g.bits - 1) / 2)
                 for g in swept.grids]  # fmt: skip
        return cls(
            swept.compensated if swept.compensated is not None else swept.weight,
            torch.cat([grid.scale.float() for grid in swept.grids], dim=1),
            torch.cat(zeros, dim=1),
            top,
            torch.tensor([grid.zero is None for grid in swept.grids], device=device),
            torch.repeat_interleave(torch.arange(len(groups), device=device), widths),
            scale_dtype,
            rates,
        )

    @property
    def start(self) -> Values:
        """The sweep's weight."""
        return torch.zeros_like(self.aim), torch.ones_like(self.scale), torch.zeros_like(self.zero)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """V by the sign of its gradient, scales and zeros by AdamW."""
        rounding, scale, zero = self.rates
        return Rule(rounding, "sign", -0.5, 0.5), Rule(scale, "adam", 0.5, 2.0), Rule(zero)

    def weight(self, values: Values) -> Tensor:
        """`[out, in]`."""
        scale, zero = (part[:, self.group_of] for part in self._grid(values))
        return scale * (self._codes(values[0], scale, zero) - zero)

    def export(self, values: Values, groups: Sequence[slice]) -> Sweep[UniformGrid]:
        """The trained weight as a sweep's result; `loss` is not known and NaN."""
        with torch.no_grad():
            scale, zero = self._grid(values)
            codes = self._codes(values[0], scale[:, self.group_of], zero[:, self.group_of])
            grids = tuple(
                UniformGrid(
                    int(self.top[k]).bit_length(),
                    scale[:, k : k + 1].to(self.scale_dtype),
                    None if bool(self.symmetric[k]) else zero[:, k : k + 1].to(torch.uint8),
                )
                for k in range(len(groups))
            )
            return Sweep(codes.to(torch.uint8), self.weight(values), grids, float("nan"))

    def _grid(self, values: Values) -> tuple[Tensor, Tensor]:
        _, factor, offset = values
        scale = self.scale * factor
        scale = straight_through(scale, scale.to(self.scale_dtype).float())
        moved = self.zero + offset
        limited = torch.minimum(torch.round(moved).clamp_min(0), self.top)
        return scale, torch.where(self.symmetric, self.zero, straight_through(moved, limited))

    def _codes(self, offset: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        place = self.aim / scale + offset
        even = self.symmetric[self.group_of]  # levels between the integers: the nearest is found by floor
        nearest = torch.where(even, torch.floor(place) + 0.5, torch.round(place))
        code = straight_through(place, nearest) + zero
        top = self.top[self.group_of]
        return torch.clamp(code, torch.zeros_like(top), top)  # at the ends the gradient still passes


@dataclass(frozen=True, eq=False)
class Clipping:
    """SliM-LLM+ (arXiv 2405.14917): the range of each group is sigmoid(u) times its maximum and sigmoid(l) times its
    minimum, codes follow by rounding. Values: u, l `[out, K]`. One-bit groups: two levels around their middle, apart by
    (sigmoid(u) + 1/2) times what `fit_two_levels` gives; their u starts at 0, so that this is 1.

    No gradient passes a zero, or the sign of a one-bit group.
    """

    original: Tensor
    groups: tuple[slice, ...]
    bits: tuple[int, ...]
    levels: dict[int, UniformGrid]
    initial: float
    rate: float
    scale_dtype: torch.dtype

    @classmethod
    def of(
        cls,
        weight: Tensor,
        groups: Sequence[slice],
        bits: Sequence[int],
        *,
        initial: float = 4.0,
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
        return cls(weight, tuple(groups), tuple(bits), levels, initial, rate, scale_dtype)

    @property
    def start(self) -> Values:
        """Factors sigmoid(initial), 1 for one-bit groups."""
        logits = self.original.new_full((self.original.shape[0], len(self.groups)), self.initial)
        logits[:, sorted(self.levels)] = 0.0
        return logits, logits.clone()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """AdamW for both."""
        return Rule(self.rate), Rule(self.rate)

    def weight(self, values: Values) -> Tensor:
        """`[out, in]`."""
        return torch.cat([self._decode(k, values) for k in range(len(self.groups))], dim=1)

    def export(self, values: Values) -> Sweep[UniformGrid]:
        """The trained weight as a sweep's result; `loss` is not known and NaN."""
        with torch.no_grad():
            grids = tuple(self._stored(k, values) for k in range(len(self.groups)))
            codes = [g.encode(self.original[:, group]) for g, group in zip(grids, self.groups, strict=True)]
            weight = torch.cat([g.decode(c) for g, c in zip(grids, codes, strict=True)], dim=1)
            return Sweep(torch.cat(codes, dim=1).to(torch.uint8), weight, grids, float("nan"))

    def factors(self, values: Values) -> Tensor:
        """sigmoid of both, `[2, out, K]`: what was learned."""
        return torch.sigmoid(torch.stack(values))

    def _decode(self, k: int, values: Values) -> Tensor:
        weight = self.original[:, self.groups[k]]
        if k in self.levels:
            grid = self.levels[k]
            code = grid.encode(weight)
            width = self._stored_type(grid.scale.float() * self._spread(k, values))
            if grid.zero is None:
                return width * (code - 0.5)
            middle = grid.zero.float() + 0.5 * grid.scale.float()
            return self._stored_type(middle - 0.5 * width) + width * code
        top = 2 ** self.bits[k] - 1
        scale, zero = self._range(k, values)
        place = weight / scale
        code = (straight_through(place, torch.round(place)) + zero).clamp(0, top)
        return scale * (code - zero)

    def _range(self, k: int, values: Values) -> tuple[Tensor, Tensor]:
        weight, top = self.original[:, self.groups[k]], 2 ** self.bits[k] - 1
        high = torch.sigmoid(values[0][:, k : k + 1]) * weight.amax(dim=1, keepdim=True).clamp_min(0)
        low = torch.sigmoid(values[1][:, k : k + 1]) * weight.amin(dim=1, keepdim=True).clamp_max(0)
        floor = max(_TINY * float(self.original.abs().max()), torch.finfo(self.scale_dtype).tiny)
        scale = self._stored_type(((high - low) / top).clamp_min(floor))
        return scale, torch.round(-low / scale).clamp(0, top).detach()

    def _spread(self, k: int, values: Values) -> Tensor:
        return torch.sigmoid(values[0][:, k : k + 1]) + 0.5

    def _stored(self, k: int, values: Values) -> UniformGrid:
        if k not in self.levels:
            scale, zero = self._range(k, values)
            return UniformGrid(self.bits[k], scale.to(self.scale_dtype), zero.to(torch.uint8))
        grid = self.levels[k]
        width = self._stored_type(grid.scale.float() * self._spread(k, values))
        if grid.zero is None:
            return UniformGrid(1, width.to(self.scale_dtype), None)
        middle = grid.zero.float() + 0.5 * grid.scale.float()
        return UniformGrid(1, width.to(self.scale_dtype), (middle - 0.5 * width).to(self.scale_dtype))

    def _stored_type(self, value: Tensor) -> Tensor:
        return straight_through(value, value.to(self.scale_dtype).to(value.dtype))
