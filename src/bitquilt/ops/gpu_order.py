"""Codes in the order that a GPU reads fastest: `arrange` makes it when a layer moves there, `restore` undoes it.

A checkpoint never holds arranged codes. In a layout's numbers `ARRANGED` is added to the grid of such a segment.

PLANES serve uniform grids of 3, 5, 6 and 7 bits with whole chunks of 128 columns and one scale to a chunk. Eight codes
of b bits are b bytes, a unit. From the lowest byte on, a unit is split into words of 4, 2 and 1 bytes, those that add
up to b; a plane holds one such word of every unit, row by row. The bytes are the same, in another order. Codes a .. h:

    stored   byte 0           byte 1           byte 2            next unit
             c c b b b a a a  f e e e d d d c  h h h g g g f f   ...
    planes   16 bits of every unit: bytes 0, 1, 0, 1, ...        then 8 bits of every unit: bytes 2, 2, ...

QUADS serve codebooks of 2, 3 and 4 bits. A byte permutation looks up four codes of ONE column at a time if they are in
the four nibbles of half a word. So the codes of four rows in eight columns are b words, each in a plane of its own,
`[b, quads of rows, units]`. The code of row r in column c is in

    2 bits   word c / 4, half c % 2, nibble r, bits 2 (c / 2 % 2) and above
    3 bits   word c / 2, half c % 2, nibble r, bits 0 to 2; bit i of columns 6 and 7 is in bit 3 of word i
    4 bits   word c / 2, half c % 2, nibble r

Rows are padded to four and each row to four units, at most 31 columns and 3 rows more than are stored. 64 bytes follow,
because a chunk is read whole.
"""

import torch
from torch import Tensor

from bitquilt.ops.bits import pack_bits, unpack_bits

ARRANGED = 64
TAIL = 64  # bytes of a chunk's units in one plane
_UNIFORM, _CODEBOOK = 0, 1  # `ops.reference`'s grids
_ROWS_AT_ONCE = 512  # while codes are 64-bit numbers


def arrangeable(grid: int, bits: int, group_size: int, width: int) -> bool:
    """Whether a segment has such an order."""
    if grid == _CODEBOOK:
        return bits in (2, 3, 4) and width > 0
    whole = width > 0 and width % 128 == 0 and (group_size % 128 == 0 or group_size >= width)
    return grid == _UNIFORM and bits in (3, 5, 6, 7) and whole


def arrange(codes: Tensor, grid: int, bits: int, width: int) -> Tensor:
    """Arrange a stored stream uint8 `[rows, bytes]`; takes its bytes twice meanwhile."""
    return _to_planes(codes, bits) if grid == _UNIFORM else _to_quads(codes, bits, width)


def restore(codes: Tensor, grid: int, bits: int, rows: int, width: int) -> Tensor:
    """Undo `arrange`: the stored stream uint8 `[rows, bytes]`."""
    return _from_planes(codes, bits) if grid == _UNIFORM else _from_quads(codes, bits, rows, width)


def plane_bytes(bits: int) -> list[int]:
    """Bytes of a unit in each plane."""
    return [size for size in (4, 2, 1) if bits & size]


def quad_units(width: int) -> int:
    """Units of a row in quads."""
    return -(-width // 32) * 4


def quad_bytes(bits: int, rows: int, width: int) -> int:
    """Bytes of a segment in quads."""
    return 4 * bits * -(-rows // 4) * quad_units(width) + TAIL


def _to_planes(codes: Tensor, bits: int) -> Tensor:
    parts = codes.reshape(-1, bits).split(plane_bytes(bits), dim=1)
    return torch.cat([part.reshape(-1) for part in parts]).view(codes.shape)


def _from_planes(codes: Tensor, bits: int) -> Tensor:
    sizes = plane_bytes(bits)
    parts = codes.reshape(-1).split([codes.numel() // bits * size for size in sizes])
    return torch.cat([part.view(-1, size) for part, size in zip(parts, sizes, strict=True)], dim=1).view(codes.shape)


def _to_quads(codes: Tensor, bits: int, width: int) -> Tensor:
    rows, units = codes.shape[0], quad_units(width)
    out = torch.zeros(quad_bytes(bits, rows, width), dtype=torch.uint8, device=codes.device)
    planes = out[:-TAIL].view(torch.int32).view(bits, -(-rows // 4), units)
    nibbles = torch.arange(0, 16, 4, device=codes.device).view(1, 4, 1, 1)
    for first in range(0, rows, _ROWS_AT_ONCE):
        part = unpack_bits(codes[first : first + _ROWS_AT_ONCE], bits, width)
        part = torch.nn.functional.pad(part, (0, 8 * units - width, 0, -part.shape[0] % 4))
        found = (part.view(-1, 4, units, 8).to(torch.int64) << nibbles).sum(1)  # [quads, units, 8]: half words
        halves = found[..., ::2] | found[..., 1::2] << 16  # [quads, units, 4]: columns 2i and 2i + 1
        for i in range(bits):
            if bits == 2:
                word = halves[..., 2 * i] | halves[..., 2 * i + 1] << 2
            elif bits == 3:
                word = halves[..., i] | ((halves[..., 3] >> i) & 0x11111111) << 3
            else:
                word = halves[..., i]
            planes[i, first // 4 : first // 4 + len(word)] = word.to(torch.int32)  # keeps the low 32 bits
    return out


def _from_quads(codes: Tensor, bits: int, rows: int, width: int) -> Tensor:
    units = quad_units(width)
    planes = codes[:-TAIL].view(torch.int32).view(bits, -(-rows // 4), units)
    nibbles = torch.arange(0, 16, 4, device=codes.device).view(1, 4, 1, 1)
    parts = []
    for first in range(0, planes.shape[1], _ROWS_AT_ONCE):
        words = planes[:, first : first + _ROWS_AT_ONCE].to(torch.int64)
        if bits == 2:
            halves = [(words[i] >> shift) & 0x33333333 for i in (0, 1) for shift in (0, 2)]
        elif bits == 3:
            spread = [((words[i] >> 3) & 0x11111111) << i for i in range(3)]
            halves = [*(words & 0x77777777), spread[0] | spread[1] | spread[2]]
        else:
            halves = list(words)
        columns = torch.stack([half >> shift for half in halves for shift in (0, 16)], dim=-1)  # [quads, units, 8]
        each = (columns.unsqueeze(1) >> nibbles) & ((1 << bits) - 1)
        parts.append(pack_bits(each.to(torch.uint8).view(-1, 8 * units)[:, :width].contiguous(), bits))
    return torch.cat(parts)[:rows]
