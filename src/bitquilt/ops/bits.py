"""b-bit codes as bytes: `pack_bits` and `unpack_bits`. A row of codes is a little-endian bit stream of whole bytes.

Eight codes of b bits fill exactly b bytes, so every column group whose width is a multiple of 8 starts on a
byte. Three bits, codes a..h, least significant bit on the right:

    byte 0      byte 1      byte 2
    c c b b b a a a    f e e e d d d c    h h h g g g f f
"""

import torch
from torch import Tensor

_ROWS = 4096  # packed at once: codes take 8 bytes on the way, 226 MB for the embedding of SmolLM2
CODES_PER_UNIT = 8  # the smallest count of codes that fills whole bytes at every width


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of one stream of `count` codes of `bits` bits."""
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes `[rows, n]`, each below 2^bits, into a uint8 stream `[rows, ceil(n * bits / 8)]`."""
    if bits == 8:
        return codes.contiguous()
    return torch.cat([_pack_rows(part, bits) for part in codes.split(_ROWS)])


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    rows, count = codes.shape
    padding = -count % CODES_PER_UNIT
    units = torch.nn.functional.pad(codes, (0, padding)).view(rows, -1, CODES_PER_UNIT).to(torch.int64)
    word = torch.zeros(units.shape[:2], dtype=torch.int64, device=codes.device)
    for position in range(CODES_PER_UNIT):
        word |= units[..., position] << (bits * position)
    shifts = torch.arange(0, 8 * bits, 8, device=codes.device)
    stream = ((word.unsqueeze(-1) >> shifts) & 0xFF).to(torch.uint8).view(rows, -1)
    return stream[:, : packed_bytes(count, bits)].contiguous()


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """Unpack a uint8 stream `[rows, ceil(count * bits / 8)]` into uint8 codes `[rows, count]`."""
    if bits == 8:
        return stream
    rows = stream.shape[0]
    mask = (1 << bits) - 1
    if 8 % bits == 0:  # codes never straddle bytes: stay in 8-bit arithmetic, 8x less traffic
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=stream.device)
        codes = (stream.unsqueeze(-1) >> shifts) & mask
        return codes.view(rows, -1)[:, :count]
    padding = -stream.shape[1] % bits
    units = torch.nn.functional.pad(stream, (0, padding)).view(rows, -1, bits).to(torch.int64)
    word = torch.zeros(units.shape[:2], dtype=torch.int64, device=stream.device)
    for position in range(bits):
        word |= units[..., position] << (8 * position)
    shifts = torch.arange(0, CODES_PER_UNIT * bits, bits, device=stream.device)
    codes = ((word.unsqueeze(-1) >> shifts) & mask).to(torch.uint8)
    return codes.view(rows, -1)[:, :count]
