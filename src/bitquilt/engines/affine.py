"""`affine` reads a stored weight as codes, scales and biases in the order of its inputs, as other engines hold it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitquilt.core.types import QuantizedWeight, Segment


@dataclass(frozen=True, eq=False)
class Affine:
    """A weight: scale * code + bias. `codes` uint8 `[out, in]`; `scale`, `bias` fp32 `[out, groups]`."""

    codes: Tensor
    scale: Tensor
    bias: Tensor

    def decode(self) -> Tensor:
        """The weight fp32 `[out, in]`."""
        size = self.codes.shape[1] // self.scale.shape[1]
        scale, bias = (part.repeat_interleave(size, dim=1) for part in (self.scale, self.bias))
        return scale * self.codes + bias


def affine(weight: QuantizedWeight, group_size: int) -> Affine:
    """Return the weight with a scale and a bias per `group_size` inputs, a size that `Engine.container` found possible.

    Products of a stored scale and a zero are exact in fp32.
    """
    parts = [_of_segment(segment, group_size) for segment in weight.segments]
    codes, scale, bias = (torch.cat(found, dim=1) for found in zip(*parts, strict=True))
    if weight.permutation is not None:
        order, block = weight.permutation.order.long(), weight.permutation.block
        codes = _in_order(codes, order, block)
        scale, bias = (_in_order(part, order, block // group_size) for part in (scale, bias))
    return Affine(codes, scale, bias)


def _of_segment(segment: Segment, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    form, width = segment.format, segment.codes.shape[1]
    scale = segment.scale.float()
    if segment.zero is None:
        bias = scale * -((2**form.bits - 1) / 2)
    else:
        bias = segment.zero.float() if form.bits == 1 else -scale * segment.zero.float()
    # the engine's groups divide ours: repeat the values of each, as often as the last one, perhaps narrower, needs
    pieces = [min(form.group_size, width - start) // group_size for start in range(0, width, form.group_size)]
    spread = torch.arange(len(pieces)).repeat_interleave(torch.tensor(pieces))
    return segment.codes, scale[:, spread], bias[:, spread]


def _in_order(stored: Tensor, order: Tensor, block: int) -> Tensor:
    """Put blocks of `block` columns back where they belong; the last block may be narrower."""
    width = stored.shape[1]
    columns = (order.unsqueeze(1) * block + torch.arange(block)).flatten()
    return torch.empty_like(stored).index_copy_(1, columns[columns < width], stored)


def integers(weight: Affine) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight as scale * (code - zero): codes int32 `[out, in]`, scale fp32 and zero int32 `[out, groups]`.

    Steps without a level at zero become every second step of half the size.
    """
    zero = -weight.bias / weight.scale
    half = (zero != zero.round()).to(torch.int32) + 1
    size = weight.codes.shape[1] // half.shape[1]
    codes = weight.codes.to(torch.int32) * half.repeat_interleave(size, dim=1)
    return codes, weight.scale / half, (zero * half).round().to(torch.int32)


def centred(weight: Affine, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes uint8 `[out, in]` around a zero of 2^(`bits` - 1) in every group, and scales fp32 `[out, groups]`.

    `Engine.container` chose `bits` so that they fit.
    """
    codes, scale, zero = integers(weight)
    moved = codes - zero.repeat_interleave(codes.shape[1] // zero.shape[1], dim=1) + 2 ** (bits - 1)
    return moved.to(torch.uint8), scale
