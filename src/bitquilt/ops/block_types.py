"""llama.cpp's block types, the grids of GGUF files: `BLOCK_TYPES` by name, `decode_blocks` and `file_bytes`.

A type cuts rows into blocks of 32 or 256 columns, and these into runs of 16 or 32. The value of a code is
    step * level - low,   step = d * s,   low = dmin * m
with d and dmin in float16 for each block and small integers s and m for each run; blocks of 32 columns have no s and m.
Levels are code - 2^(bits - 1), the codes themselves in types with a low, or a table of 16 integers.

Next to its codes a block holds a head: d, dmin, s and m, packed. We store codes as one bit stream as in any other
segment, and of every block the head's own bytes, unchanged. So our values are llama.cpp's bit for bit, an export only
reorders codes, and a layer takes as many bytes here as in a GGUF file. (Steps in fp32 would be simpler to compute
with and take up to 1.5 bits per weight more; steps in fp16 would not be llama.cpp's.) After `ggml-quants.c`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_NUMBER, _NUMBERS_APART = 10, 4  # behind the mx grids, and never taken for one that rounds its input
_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockType:
    """One type. `name` in config.json; `ggml`: its number in files; `grid`: its number in an op's layout.

    `columns` of a block, `run` of those that share s and m. `scale_bits`: of s and m, 0 for none; `signed`: s is stored
    with 2^(scale_bits - 1) added. `low`: whether there is one; `table`: whether levels are the table's.
    `head`: bytes of d, dmin, s and m, of which `lead` stand before the codes in a file. `planes`: how a file cuts codes
    in bytes, (lowest bit, bits, distance of the codes that share a byte).
    """

    name: str
    ggml: int
    grid: int
    bits: int
    columns: int
    run: int
    head: int
    lead: int
    planes: tuple[tuple[int, int, int], ...]
    scale_bits: int = 0
    signed: bool = False
    low: bool = False
    table: bool = False

    @property
    def runs(self) -> int:
        """Runs of a block."""
        return self.columns // self.run

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in a file."""
        return self.head + self.columns * self.bits // 8

    @property
    def offset(self) -> float:
        """The code of level 0, where levels are equal steps."""
        return 0.0 if self.low else float(2 ** (self.bits - 1))

    def levels(self) -> Tensor:
        """Levels of all codes fp32 `[2^bits]`, ascending."""
        return torch.tensor(_TABLE).float() if self.table else torch.arange(2.0**self.bits) - self.offset


@dataclass(frozen=True, eq=False)
class BlockScales:
    """Scales of all blocks: `d` and `dmin` fp16 `[out, blocks]`, `s` and `m` int16 `[out, runs]`, 1 for types without.

    `dmin` and `m` are None for types without a low; in types of 32 columns `dmin` is the smallest value, -low.
    """

    d: Tensor
    s: Tensor
    dmin: Tensor | None = None
    m: Tensor | None = None

    def steps(self) -> tuple[Tensor, Tensor | None]:
        """Step and low of every run fp32 `[out, runs]`, rounded as llama.cpp does."""
        runs = self.s.shape[1] // max(self.d.shape[1], 1)
        step = self.d.float().repeat_interleave(runs, dim=1) * self.s
        if self.dmin is None:
            return step, None
        low = self.dmin.float().repeat_interleave(runs, dim=1)
        return step, -low if self.m is None else low * self.m


_32, _K = {"columns": 32, "run": 32}, {"columns": 256, "run": 16, "scale_bits": 6}
_SPECS: tuple[tuple[str, int, dict[str, object]], ...] = (
    ("q4_0", 2, {**_32, "bits": 4, "head": 2, "lead": 2, "planes": ((0, 4, 16),)}),
    ("q4_1", 3, {**_32, "bits": 4, "head": 4, "lead": 4, "planes": ((0, 4, 16),), "low": True}),
    ("q5_0", 6, {**_32, "bits": 5, "head": 2, "lead": 2, "planes": ((4, 1, 1), (0, 4, 16))}),
    ("q5_1", 7, {**_32, "bits": 5, "head": 4, "lead": 4, "planes": ((4, 1, 1), (0, 4, 16)), "low": True}),
    ("q8_0", 8, {**_32, "bits": 8, "head": 2, "lead": 2, "planes": ((0, 8, 1),)}),
    ("q2_k", 10, {**_K, "bits": 2, "head": 20, "lead": 16, "planes": ((0, 2, 32),), "scale_bits": 4, "low": True}),
    ("q3_k", 11, {**_K, "bits": 3, "head": 14, "lead": 0, "planes": ((2, 1, 32), (0, 2, 32)), "signed": True}),
    ("q4_k", 12, {**_K, "run": 32, "bits": 4, "head": 16, "lead": 16, "planes": ((0, 4, 32),), "low": True}),
    ("q5_k", 13, {**_K, "run": 32, "bits": 5, "head": 16, "lead": 16, "planes": ((4, 1, 32), (0, 4, 32)), "low": True}),
    ("q6_k", 14, {**_K, "bits": 6, "head": 18, "lead": 0, "planes": ((0, 4, 64), (4, 2, 32)), "scale_bits": 8}),
    ("iq4_nl", 20, {**_32, "bits": 4, "head": 2, "lead": 2, "planes": ((0, 4, 16),), "table": True}),
    (
        "iq4_xs",
        23,
        {**_K, "run": 32, "bits": 4, "head": 8, "lead": 8, "planes": ((0, 4, 16),), "signed": True, "table": True},
    ),
)
BLOCK_TYPES: Mapping[str, BlockType] = {
    name: BlockType(name, ggml, _FIRST_NUMBER + _NUMBERS_APART * i, **fields)  # type: ignore[arg-type]
    for i, (name, ggml, fields) in enumerate(_SPECS)
}
BY_GRID: Mapping[int, BlockType] = {kind.grid: kind for kind in BLOCK_TYPES.values()}


def decode_blocks(codes: Tensor, heads: Tensor, kind: BlockType) -> Tensor:
    """Return fp32 `[out, width]` of codes `[out, width]` and heads uint8 `[out, blocks * kind.head]`."""
    step, low = read_heads(heads, kind).steps()
    width = codes.shape[1]
    levels = kind.levels().to(codes.device)[codes.long()] if kind.table else codes - kind.offset
    values = step.repeat_interleave(kind.run, dim=1)[:, :width] * levels
    return values if low is None else values - low.repeat_interleave(kind.run, dim=1)[:, :width]


def file_bytes(codes: Tensor, heads: Tensor, kind: BlockType) -> Tensor:
    """Return a row of blocks as it stands in a GGUF file, uint8 `[out, blocks * kind.block_bytes]`."""
    rows, blocks = len(codes), codes.shape[1] // kind.columns
    head = heads.view(rows, blocks, kind.head)
    bits = codes.view(rows, blocks, kind.columns)
    if kind.name == "q8_0":
        bits = bits ^ 0x80  # levels in two's complement
    parts = [head[..., : kind.lead]]
    for first, width, apart in kind.planes:
        pieces = ((bits >> first) & (2**width - 1)).view(rows, blocks, -1, 8 // width, apart)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8).view(-1, 1)
        parts.append((pieces << shifts).sum(dim=3, dtype=torch.uint8).flatten(2))
    return torch.cat([*parts, head[..., kind.lead :]], dim=2).flatten(1)


def read_heads(heads: Tensor, kind: BlockType) -> BlockScales:
    """Take the heads uint8 `[out, blocks * kind.head]` apart."""
    rows, (place_d, place_s) = len(heads), _places(kind)
    head = heads.view(rows, -1, kind.head)

    def halves(place: int) -> Tensor:
        return head[..., place : place + 2].contiguous().view(torch.float16).squeeze(-1)

    d, dmin = halves(place_d), halves(place_d + 2) if kind.low else None
    if not kind.scale_bits:
        return BlockScales(d, torch.ones(d.shape, dtype=torch.int16, device=heads.device), dmin)
    packed = head[..., place_s : place_s + kind.head - (4 if kind.low else 2)].to(torch.int16)
    m = None
    if kind.name == "q2_k":
        s, m = packed & 15, packed >> 4
    elif kind.name == "q6_k":
        s = packed - 256 * (packed > 127)
    elif kind.name == "iq4_xs":
        high = packed[..., :1] | packed[..., 1:2] << 8
        low = torch.stack([packed[..., 2:] & 15, packed[..., 2:] >> 4], dim=-1).flatten(2)
        s = low | ((high >> torch.arange(0, 16, 2, device=heads.device)) & 3) << 4
    elif kind.name == "q3_k":
        low = torch.cat([packed[..., :8] & 15, packed[..., :8] >> 4], dim=-1)
        s = low | torch.cat([(packed[..., 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1) << 4
    else:
        first, second, both = packed.split(4, dim=-1)
        s = torch.cat([first & 63, (both & 15) | (first >> 2) & 48], dim=-1)
        m = torch.cat([second & 63, (both >> 4) | (second >> 2) & 48], dim=-1)
    s = s - 2 ** (kind.scale_bits - 1) if kind.signed else s
    return BlockScales(d, s.flatten(1).to(torch.int16), dmin, None if m is None else m.flatten(1))


def write_heads(scales: BlockScales, kind: BlockType) -> Tensor:
    """Invert `read_heads`."""
    rows, blocks = scales.d.shape
    halves = [half.contiguous().unsqueeze(-1).view(torch.uint8) for half in (scales.d, scales.dmin) if half is not None]
    if not kind.scale_bits:
        return torch.cat(halves, dim=2).flatten(1)
    s = scales.s.reshape(rows, blocks, kind.runs) + (2 ** (kind.scale_bits - 1) if kind.signed else 0)
    m = s if scales.m is None else scales.m.reshape(rows, blocks, kind.runs)
    if kind.name == "q2_k":
        packed = [s | m << 4]
    elif kind.name == "q6_k":
        packed = [s & 255]
    elif kind.name == "iq4_xs":
        high = ((s >> 4) << torch.arange(0, 16, 2, device=s.device)).sum(dim=-1, keepdim=True)
        packed = [high & 255, high >> 8, (s[..., ::2] & 15) | (s[..., 1::2] & 15) << 4]
    elif kind.name == "q3_k":
        top = [(s[..., 4 * i : 4 * i + 4] >> 4) << 2 * i for i in range(4)]
        packed = [(s[..., :8] & 15) | (s[..., 8:] & 15) << 4, top[0] | top[1] | top[2] | top[3]]
    else:
        first = (s[..., :4] & 63) | (s[..., 4:] >> 4) << 6
        second = (m[..., :4] & 63) | (m[..., 4:] >> 4) << 6
        packed = [first, second, (s[..., 4:] & 15) | (m[..., 4:] & 15) << 4]
    integers = [part.to(torch.uint8) for part in packed]
    parts = [*halves, *integers] if _places(kind)[0] == 0 else [*integers, *halves]
    return torch.cat(parts, dim=2).flatten(1)


def _places(kind: BlockType) -> tuple[int, int]:
    """Where d begins in a head, and where s does."""
    if kind.name in ("q2_k", "q3_k", "q6_k"):  # behind the integers
        return kind.head - (4 if kind.low else 2), 0
    return 0, 4 if kind.low else 2
