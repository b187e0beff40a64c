"""Codes of 3, 5, 6 and 7 bits in an order that a GPU can read: planes of whole words instead of one stream.

Eight codes of b bits are b bytes, a unit. Four, two and one of them, as b = 4 + 2 + 1 has them, from the lowest on, are
words of 32, 16 and 8 bits; a plane holds one such word of every unit, row by row. Three bits, codes a .. h:

    stored   byte 0           byte 1           byte 2            next unit
             c c b b b a a a  f e e e d d d c  h h h g g g f f   ...
    planes   16 bits of every unit: bytes 0, 1, 0, 1, ...        then 8 bits of every unit: bytes 2, 2, ...

The same bytes in another order, so nothing is larger. In a layout's numbers an arranged segment has `ARRANGED` added to
its grid. A checkpoint never holds one.
"""

import torch
from torch import Tensor

ARRANGED = 64
_WIDTHS, _CHUNK = (3, 5, 6, 7), 128


def arrangeable(grid: int, bits: int, group_size: int, width: int) -> bool:
    """Whether a segment may be in planes: where the kernel multiplies codes as they are, 128 columns at a time."""
    whole = width > 0 and width % _CHUNK == 0 and (group_size % _CHUNK == 0 or group_size >= width)
    return grid == 0 and bits in _WIDTHS and whole


def plane_bytes(bits: int) -> list[int]:
    """Bytes of a unit in each plane."""
    return [size for size in (4, 2, 1) if bits & size]


def to_planes(codes: Tensor, bits: int) -> Tensor:
    """A stored stream uint8 `[rows, units * bits]` in planes, of the same shape. Takes twice its bytes meanwhile."""
    units = codes.reshape(-1, bits)
    parts = units.split(plane_bytes(bits), dim=1)
    return torch.cat([part.reshape(-1) for part in parts]).view(codes.shape)


def from_planes(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `to_planes`."""
    sizes = plane_bytes(bits)
    parts = codes.reshape(-1).split([codes.numel() // bits * size for size in sizes])
    return torch.cat([part.view(-1, size) for part, size in zip(parts, sizes, strict=True)], dim=1).view(codes.shape)
