"""Which MX numbers hold a weight? fit_mx(weight, bits) -> codes and scales; the formats themselves are `ops.mx`.

MicroMix (arXiv 2508.02343) stores channels as E2M1, E3M2 (or E2M3) and E4M3, 32 columns of a row to a scale.
"""

from torch import Tensor

from bitquilt.ops.microscaling import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    Element,
    ScaleRule,
    block_exponents,
    encode_element,
    encode_exponents,
    round_to_element,
    scale_values,
)


def element_for(bits: int, six: str = "e3m2") -> Element:
    """The element of 4, 6 or 8 bits; `six`: which of the two of 6 bits. Raises ValueError for other widths."""
    known = {4: E2M1, 6: E2M3 if six == "e2m3" else E3M2, 8: E4M3}
    if bits not in known:
        raise ValueError(f"an MX element of {bits} bits; there are 4, 6 and 8")
    return known[bits]


def fit_mx(weight: Tensor, element: Element, rule: ScaleRule = "ceil") -> tuple[Tensor, Tensor]:
    """`weight` fp32 `[out, n]` -> codes uint8 `[out, n]` and E8M0 scales uint8 `[out, ceil(n / 32)]`, by rounding."""
    exponents = block_exponents(weight, element, rule)
    rounded = round_to_element(scale_values(weight.float(), exponents), element)
    return encode_element(rounded, element), encode_exponents(exponents)


def worst_ratio(element: Element, rule: ScaleRule) -> float:
    """The largest rounding error in a block as a share of the block's largest magnitude.

    Half a step just above a power of two, or, where a scale saturates (ocp), all above qmax, up to 2^(emax + 1).
    """
    if rule == "ocp":
        return 1 - element.largest / 2.0 ** (element.ocp_exponent + 1)
    half_step = 2.0 ** (element.ocp_exponent - element.mantissa) / 2
    return half_step / (2.0**element.ocp_exponent + half_step)
