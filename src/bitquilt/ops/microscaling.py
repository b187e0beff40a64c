"""Microscaling (MX) formats (OCP MX 1.0): 32 neighbours share one power of two.

`quantize_blocks` rounds values to a format; `encode_element`, `decode_element` and `decode_blocks` turn values into
codes and back. An element has a sign, `exponent` bits and `mantissa` bits, and no infinity; codes are uint8 with the
sign on top. E4M3 gives its largest code to NaN. A scale is E8M0: byte e stands for 2^(e - 127), and 255 is NaN. NaN is
never written.

    E2M1 (4 bits)  s e e m        0 .5 1 1.5 2 3 4 6
    E3M2 (6 bits)  s e e e m m    0 .0625 .. 28
    E2M3 (6 bits)  s e e m m m    0 .125 .. 7.5
    E4M3 (8 bits)  s e e e e m m m    0 2^-9 .. 448
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ScaleRule = Literal["ceil", "paper", "ocp"]
BLOCK = 32
_BIAS, _LARGEST = 127, 127  # of E8M0


@dataclass(frozen=True)
class Element:
    """One MX element format. `largest`: finite value; `paper_exponent`: c of MicroMix's scale 2^(floor(log2 m) - c)."""

    name: str
    exponent: int
    mantissa: int
    largest: float
    paper_exponent: int

    @property
    def bits(self) -> int:
        """Bits of a code, sign included."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """Bias of the exponent."""
        return 2 ** (self.exponent - 1) - 1

    @property
    def ocp_exponent(self) -> int:
        """emax, the exponent of the largest value."""
        return int(torch.frexp(torch.tensor(self.largest)).exponent) - 1


E2M1 = Element("e2m1", 2, 1, 6.0, 1)
E3M2 = Element("e3m2", 3, 2, 28.0, 3)
E2M3 = Element("e2m3", 2, 3, 7.5, 1)
E4M3 = Element("e4m3", 4, 3, 448.0, 7)


@functools.cache
def _values(element: Element) -> tuple[float, ...]:
    found = []
    for code in range(2 ** (element.bits - 1)):
        field, fraction = divmod(code, 2**element.mantissa)
        steps = fraction if field == 0 else fraction + 2**element.mantissa
        found.append(steps * 2.0 ** (max(field, 1) - element.bias - element.mantissa))
    return (*found, *(-value for value in found))


def element_values(element: Element, device: torch.device | None = None) -> Tensor:
    """The value of every code, fp32 `[2^bits]`."""
    return torch.tensor(_values(element), dtype=torch.float32, device=device)


def round_to_element(values: Tensor, element: Element) -> Tensor:
    """Round fp32 `values`, already divided by their scale, to the nearest element: ties to even codes, saturating."""
    size = values.abs()
    # frexp: size = f 2^e with f in [.5, 1), so floor(log2 size) = e - 1; below the smallest normal the step stays
    exponent = (torch.frexp(size).exponent - 1).clamp_min(1 - element.bias)
    step = torch.ldexp(torch.ones_like(size), exponent - element.mantissa)
    rounded = (torch.round(size / step) * step).clamp_max(element.largest)
    return torch.copysign(rounded, values)


def encode_element(values: Tensor, element: Element) -> Tensor:
    """Return uint8 codes of values that `round_to_element` returned."""
    size = values.abs()
    lowest = 1 - element.bias
    exponent = (torch.frexp(size).exponent - 1).clamp_min(lowest).masked_fill(size == 0, lowest)
    steps = torch.ldexp(size, element.mantissa - exponent)
    # a normal number's steps begin at 2^mantissa, which is one too many in the exponent's field
    code = (exponent - lowest) * 2**element.mantissa + steps.to(torch.int32)
    sign = torch.signbit(values).to(torch.int32) << (element.bits - 1)
    return (code | sign).to(torch.uint8)


def decode_element(codes: Tensor, element: Element) -> Tensor:
    """Return fp32 values of uint8 codes, not yet scaled."""
    return element_values(element, codes.device)[codes.to(torch.int64)]


def block_exponents(values: Tensor, element: Element, rule: ScaleRule) -> Tensor:
    """Exponent k of the scale 2^k of each block of `values` `[..., n]`, int32 `[..., ceil(n / 32)]`.

    ceil: the least k with m <= largest 2^k, so that nothing saturates.  paper (MicroMix): floor(log2 m) - c.
    ocp: floor(log2 m) - emax, saturating.  m: the block's largest magnitude; a block of zeros has k = 0.
    k comes from the float's bits, never from a rounded logarithm, and is clamped to -127 .. 127.
    """
    largest = _blocks(values).abs().amax(dim=-1)
    fraction, exponent = torch.frexp(largest)
    if rule == "ceil":
        top_fraction, top_exponent = torch.frexp(torch.tensor(element.largest, device=values.device))
        exponent = exponent - top_exponent + (fraction > top_fraction)
    else:
        offset = element.paper_exponent if rule == "paper" else element.ocp_exponent
        exponent = exponent - 1 - offset
    return exponent.to(torch.int32).masked_fill(largest == 0, 0).clamp(-_LARGEST, _LARGEST)


def quantize_blocks(values: Tensor, element: Element, rule: ScaleRule) -> Tensor:
    """Round `values` `[..., n]` to MX numbers, fp32, in blocks along the last dimension; the last may be narrower.

    A block that holds NaN or Inf becomes NaN.
    """
    exponents = _spread(block_exponents(values, element, rule), values.shape[-1])
    wide = values.float()
    rounded = _scaled(round_to_element(_scaled(wide, -exponents), element), exponents)
    finite = _blocks(wide).isfinite().all(dim=-1)
    return torch.where(_spread(finite, values.shape[-1]), rounded, torch.nan)


def encode_exponents(exponents: Tensor) -> Tensor:
    """Return k as E8M0 bytes, uint8."""
    return (exponents + _BIAS).to(torch.uint8)


def decode_exponents(scale: Tensor) -> Tensor:
    """Return k, int32, of E8M0 bytes."""
    return scale.to(torch.int32) - _BIAS


def decode_scales(scale: Tensor) -> Tensor:
    """Return 2^(byte - 127) fp32 of E8M0 bytes."""
    return torch.ldexp(torch.ones(scale.shape, device=scale.device), decode_exponents(scale))


def decode_blocks(codes: Tensor, scale: Tensor, element: Element, block: int = BLOCK) -> Tensor:
    """Decode codes uint8 `[out, width]` with E8M0 scales uint8 `[out, ceil(width / block)]`: fp32 `[out, width]`."""
    steps = decode_scales(scale).repeat_interleave(block, dim=1)[:, : codes.shape[1]]
    return decode_element(codes, element) * steps


def scale_values(values: Tensor, exponents: Tensor) -> Tensor:
    """Divide fp32 `values` `[..., n]` by the scales 2^k of their blocks, as `round_to_element` expects."""
    return _scaled(values, -_spread(exponents, values.shape[-1]))


def _scaled(values: Tensor, exponents: Tensor) -> Tensor:
    """values * 2^exponents in two halves: 2^-k of the smallest scale overflows where the product does not."""
    half = torch.div(exponents, 2, rounding_mode="floor")
    return torch.ldexp(torch.ldexp(values, half), exponents - half)


def _blocks(values: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(values.float(), (0, -values.shape[-1] % BLOCK))
    return padded.unflatten(-1, (-1, BLOCK))


def _spread(per_block: Tensor, width: int) -> Tensor:
    return per_block.repeat_interleave(BLOCK, dim=-1)[..., :width]
