"""Differentiable rounding: `round_by_scale` lets codes follow the scale, `round_by_offset` an offset per weight.

All column groups of a layer at once, `[out, K, g]`, the last group padded; `scale`, `zero` `[out, K, 1]`, `top`
`[K, 1]` the largest code. One pass forward and one backward over the weights, by hand: autograd over the same formulas
keeps ten tensors of this size, these keep two. The gradient treats rounding as a constant that is added.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Groups:
    """Column groups of equal width but for the last: how `[out, in]` becomes `[out, K, g]` and back."""

    width: int
    count: int
    columns: int

    @classmethod
    def of(cls, groups: Sequence[slice]) -> "Groups":
        """Describe consecutive column ranges."""
        return cls(groups[0].stop - groups[0].start, len(groups), groups[-1].stop)

    def split(self, weight: Tensor) -> Tensor:
        """Split `[out, in]` into `[out, K, g]`, zeros behind the last column."""
        missing = self.width * self.count - self.columns
        padded = torch.nn.functional.pad(weight, (0, missing)) if missing else weight
        return padded.reshape(len(weight), self.count, self.width)

    def join(self, weight: Tensor) -> Tensor:
        """Undo `split`."""
        return weight.reshape(len(weight), -1)[:, : self.columns]


def round_by_scale(aim: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> Tensor:
    """scale * (clamp(round(aim / scale) + zero, 0, top) - zero), differentiable in the scale, which codes follow."""
    result: Tensor = _ByScale.apply(aim, scale, zero, top)
    return result


def round_by_offset(place: Tensor, offset: Tensor, scale: Tensor, zero: Tensor, top: Tensor, even: Tensor) -> Tensor:
    """scale * (clamp(round(place + offset) + zero, 0, top) - zero), differentiable in scale and offset.

    Codes follow the offset alone. `even` bool `[K, 1]`: groups with levels halfway between integers (`zero` = top / 2).
    """
    result: Tensor = _ByOffset.apply(place, offset, scale, zero, top, even)
    return result


def steps_by_offset(place: Tensor, offset: Tensor, zero: Tensor, top: Tensor, even: Tensor) -> tuple[Tensor, Tensor]:
    """(code - zero, the same without the limits of the range)."""
    moved = place + offset
    if bool(even.all()):
        free = moved.floor_().add_(0.5)
    elif bool(even.any()):
        free = torch.where(even, torch.floor(moved) + 0.5, torch.round(moved))
    else:
        free = moved.round_()
    return torch.clamp(free, -zero, top - zero), free


class _ByScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, aim: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> Tensor:
        free = (aim / scale).round_()
        steps = torch.clamp(free, -zero, top - zero)
        ctx.save_for_backward(aim, scale, steps, steps == free)
        return steps * scale

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor | None, ...]:
        aim, scale, steps, inside = ctx.saved_tensors
        # d/ds = code - zero, less aim / s where the code follows aim / s
        direct = (arriving * steps).sum(-1, keepdim=True)
        return None, direct - (arriving * inside).mul_(aim).sum(-1, keepdim=True) / scale, None, None


class _ByOffset(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, place: Tensor, offset: Tensor, scale: Tensor, zero: Tensor, top: Tensor, even: Tensor
    ) -> Tensor:
        steps, free = steps_by_offset(place, offset, zero, top, even)
        ctx.save_for_backward(scale, steps, steps == free)
        return steps * scale

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor | None, ...]:
        scale, steps, inside = ctx.saved_tensors
        _, wants_offset, wants_scale, _, _, _ = ctx.needs_input_grad
        by_scale = (arriving * steps).sum(-1, keepdim=True) if wants_scale else None
        by_offset = (arriving * inside).mul_(scale) if wants_offset else None
        return None, by_offset, by_scale, None, None, None
