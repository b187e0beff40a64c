"""Weights as other tools store them: one class per encoding, each of which decodes one matrix.

`ScaledCodes` holds fp8 or int8 numbers and a grid of scales, `GptqWeight` and `AwqWeight` what those tools write,
`PackedIntegers` the packed integers of compressed-tensors, `Mxfp4Blocks` the experts of gpt-oss, `Fp4Pairs` MXFP4
and NVFP4 of other models. `decode` takes the stored tensors by role and returns the matrix, computed in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bitquilt.errors import UserError
from bitquilt.model.tensor_info import TensorInfo
from bitquilt.ops.bits import unpack_bits
from bitquilt.ops.microscaling import E2M1, decode_element

# Column i of a word of eight: AWQ writes columns 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up.
_AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)


class Encoding(Protocol):
    """How one matrix is stored. `label` names the encoding, `bits` are those of a code, `shape` is the matrix's own."""

    @property
    def label(self) -> str: ...

    @property
    def bits(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class EncodedWeight:
    """One matrix of a checkpoint: its encoding, and the names and headers of its stored tensors by role."""

    encoding: Encoding
    names: Mapping[str, str]
    infos: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(info.nbytes for info in self.infos.values())


@dataclass(frozen=True)
class ScaledCodes:
    """Numbers of type `dtype` times scales, each for a block of `extent` rows and columns.

    Parts: `codes`, `scale` and, for integers, perhaps `zero`, which is subtracted first. transformers has the same for
    fp8 (`Fp8Dequantize`), but it refuses blocks that do not divide the matrix, such as DeepSeek-V3's 576 rows in blocks
    of 128, and takes int8 for pairs of fp4.
    """

    dtype: str
    shape: tuple[int, ...]
    extent: tuple[int, int]
    bits: int = 8

    @property
    def label(self) -> str:
        rows, columns = self.shape[-2:]
        kind = "int8" if self.dtype == "I8" else "fp8"
        if self.extent == (rows, columns):
            return f"{kind} with a scale per matrix"
        if self.extent == (1, columns):
            return f"{kind} with a scale per row"
        if self.extent[0] == 1:
            return f"{kind} with a scale per {self.extent[1]} columns of a row"
        return f"{kind} in blocks of {self.extent[0]} x {self.extent[1]}"

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes = parts["codes"].float()
        if "zero" in parts:
            codes -= self._spread(parts["zero"].float())
        return codes.mul_(self._spread(_scale(parts["scale"])))

    def _spread(self, grid: Tensor) -> Tensor:
        """A value per block as a value per weight; blocks at the edge may be smaller."""
        (rows, columns), lead = self.shape[-2:], self.shape[:-2]
        down, right = -(-rows // self.extent[0]), -(-columns // self.extent[1])
        grid = grid.expand(*lead, down, right) if grid.numel() == 1 else grid.reshape(*lead, down, right)
        grid = grid.repeat_interleave(self.extent[0], -2)[..., :rows, :] if down > 1 else grid
        return grid.repeat_interleave(self.extent[1], -1)[..., :columns] if right > 1 else grid


def _scale(stored: Tensor) -> Tensor:
    """Scales as numbers; bytes hold exponents of 2 with a bias of 127."""
    return (stored.float() - 127).exp2() if stored.dtype == torch.uint8 else stored.float()


@dataclass(frozen=True)
class GptqWeight:
    """Integers with a scale and a zero per group of inputs, packed along the inputs.

    Parts: `codes` int32 `[in * bits / 32, out]`, `scale` `[groups, out]`, perhaps `zero` int32
    `[groups, out * bits / 32]`, without which half the range is zero, and perhaps `group` int32 `[in]`, without which
    groups of `group_size` follow each other. `minus_one`: zeros are stored less one (format "gptq", not "gptq_v2").
    """

    bits: int
    shape: tuple[int, ...]
    group_size: int
    minus_one: bool

    @property
    def label(self) -> str:
        return f"GPTQ with {self.bits} bits"

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        rows, columns = self.shape
        scale = parts["scale"].float().t()
        codes = _unpacked(parts["codes"].t(), self.bits, columns)
        if "zero" in parts:
            zero = _unpacked(parts["zero"], self.bits, rows).t()
            # A zero is a code: one that is stored as all ones was 0 before 1 was subtracted.
            zero = (zero + 1) & ((1 << self.bits) - 1) if self.minus_one else zero
        else:
            zero = torch.full((1, 1), 1 << (self.bits - 1)).expand_as(scale)
        group = parts["group"].long() if "group" in parts else torch.arange(columns) // self.group_size
        group = _inside(group, scale.shape[1], "g_idx")
        return (codes - zero.float()[:, group]).mul_(scale[:, group])


@dataclass(frozen=True)
class AwqWeight:
    """Integers of 4 bits with a scale and a zero per group of inputs, packed along the outputs (AWQ's "gemm").

    Parts: `codes` int32 `[in, out / 8]`, `zero` int32 `[groups, out / 8]`, `scale` `[groups, out]`.
    """

    shape: tuple[int, ...]
    group_size: int
    bits: int = 4

    @property
    def label(self) -> str:
        return "AWQ with 4 bits"

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        rows, columns = self.shape
        order = torch.arange(rows).view(-1, 8)[:, list(_AWQ_COLUMNS)].flatten()
        codes, zero = (_unpacked(parts[role], 4, rows)[:, order].float() for role in ("codes", "zero"))
        group = torch.arange(columns) // self.group_size
        return (codes - zero[group]).mul_(parts["scale"].float()[group]).t()


@dataclass(frozen=True)
class PackedIntegers:
    """Signed integers of compressed-tensors, packed along the inputs with half their range added.

    Parts: `codes` int32 `[out, words]`, `scale` `[out, groups]` or one, perhaps `zero` int32, packed along the outputs,
    `shape` int64 of the matrix, and `group` int32 `[in]`. `per_word`: codes in a word that codes never straddle, as
    compressed-tensors before 0.18 wrote them; None for a stream without gaps.
    """

    bits: int
    shape: tuple[int, ...]
    group_size: int
    per_word: int | None

    @property
    def label(self) -> str:
        return f"int{self.bits} of compressed-tensors"

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        rows, columns = self.shape
        if "shape" in parts and tuple(stated := parts["shape"].tolist()) != self.shape:
            raise UserError(f"a packed weight states shape {stated}, its scales and codes make {list(self.shape)}")
        half = 1 << (self.bits - 1)
        codes = self._integers(parts["codes"], columns).float() - half
        scale = parts["scale"].float().expand(rows, -1) if parts["scale"].ndim == 2 else parts["scale"].float()
        group = torch.arange(columns) // self.group_size
        if "group" in parts:
            group = _inside(parts["group"].long(), scale.shape[1], "weight_g_idx")
        if "zero" in parts:
            codes -= (self._integers(parts["zero"].t(), rows).t().float() - half)[:, group]
        return codes.mul_(scale[:, group] if scale.ndim == 2 else scale)

    def _integers(self, words: Tensor, count: int) -> Tensor:
        if self.per_word is None:
            return _unpacked(words, self.bits, count)
        shifts = torch.arange(self.per_word) * self.bits
        return ((words.unsqueeze(-1) >> shifts) & ((1 << self.bits) - 1)).flatten(1)[:, :count]


@dataclass(frozen=True)
class Mxfp4Blocks:
    """The experts of gpt-oss: blocks of 32 numbers of 4 bits with an exponent each, decoded by transformers.

    Parts: `codes` uint8 `[experts, out, blocks, 16]`, `scale` uint8 `[experts, out, blocks]`; the result is transposed.
    """

    shape: tuple[int, ...]
    label: str = "MXFP4"
    bits: int = 4

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # late: imports model code

        decoded = torch.empty(self.shape, dtype=torch.bfloat16)
        for i in range(len(decoded)):  # all experts of gpt-oss-120b at once take three times the memory of the result
            one = slice(i, i + 1)
            decoded[one] = convert_moe_packed_tensors(parts["codes"][one], parts["scale"][one], dtype=torch.bfloat16)
        return decoded


@dataclass(frozen=True)
class Fp4Pairs:
    """Two numbers of 4 bits per byte `[out, in / 2]`, with a scale for each block of a row.

    Parts: `codes`, `scale`, which bytes hold as exponents (MXFP4), and for NVFP4 a number that all scales are
    multiplied by (`factor`, of ModelOpt) or divided by (`divisor`, of compressed-tensors).
    """

    shape: tuple[int, ...]
    label: str = "MXFP4"
    bits: int = 4

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        scale = _scale(parts["scale"])
        if "factor" in parts:
            scale = scale * parts["factor"].float()
        if "divisor" in parts:
            scale = scale / parts["divisor"].float()
        numbers = decode_element(unpack_bits(parts["codes"].view(torch.uint8), 4, self.shape[-1]), E2M1)
        return numbers * scale.repeat_interleave(self.shape[-1] // scale.shape[-1], dim=-1)


def _unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes uint8 `[rows, count]` of a bit stream in the int32 `words` `[rows, n]`."""
    return unpack_bits(words.contiguous().view(torch.uint8), bits, count)


def _inside(group: Tensor, groups: int, name: str) -> Tensor:
    if not (group.numel() and int(group.min()) >= 0 and int(group.max()) < groups):
        raise UserError(f"{name} names groups outside 0 to {groups - 1}: the file is damaged; download it again")
    return group
