"""Microscaling grids: `fit_mx` scales a weight to an element, `MXGrid` rounds to it, `mx_format` says how it is stored.

The number formats themselves are in `ops.microscaling`. MicroMix (arXiv 2508.02343) stores channels as E2M1, E3M2 (or
E2M3) and E4M3, 32 columns of a row to a scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitquilt.core.types import Activation, Format, Segment
from bitquilt.layer.grids.grid import Grid
from bitquilt.ops import microscaling as mx
from bitquilt.ops.microscaling import BLOCK, E2M1, E2M3, E3M2, E4M3, Element, ScaleRule


@dataclass(frozen=True, eq=False)
class MXGrid(Grid):
    """`element` values times 2^k for every 32 columns of a row; `scale` E8M0, uint8 `[out, ceil(n / 32)]`.

    `activation`: the rule by which the layer's input is rounded to the same elements, or "none".
    """

    element: Element
    scale: Tensor
    activation: Activation = "none"

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes of `[out, n]` as float."""
        rounded = mx.round_to_element(mx.scale_values(weight.float(), mx.decode_exponents(self.scale)), self.element)
        return mx.encode_element(rounded, self.element).float()

    def decode(self, codes: Tensor) -> Tensor:
        """fp32 values of float codes `[out, n]`."""
        return mx.decode_blocks(codes.to(torch.uint8), self.scale, self.element)

    @classmethod
    def segment(cls, grids: Sequence["MXGrid"], codes: Tensor, group_size: int = BLOCK) -> Segment:
        """Neighbouring groups of whole blocks as they are stored; the format's own groups are always 32 columns."""
        scale = torch.cat([grid.scale for grid in grids], dim=1)
        return Segment(mx_format(grids[0].element, grids[0].activation), codes, scale)

    @classmethod
    def of_segment(cls, segment: Segment, columns: slice) -> "MXGrid":
        """The grid of some whole blocks of a segment."""
        form = segment.format
        element = element_for(form.bits, "e2m3" if form.grid == "mx_e2m3" else "e3m2")
        return cls(element, segment.scale[:, columns.start // BLOCK : -(-columns.stop // BLOCK)], form.activation)


def element_for(bits: int, six: str = "e3m2") -> Element:
    """The element of 4, 6 or 8 bits; `six` names the one of 6 bits. Raises ValueError for other widths."""
    known = {4: E2M1, 6: E2M3 if six == "e2m3" else E3M2, 8: E4M3}
    if bits not in known:
        raise ValueError(f"an MX element of {bits} bits; there are 4, 6 and 8")
    return known[bits]


def mx_format(element: Element, activation: Activation = "none") -> Format:
    """The storage format of weights in `element`."""
    return Format(
        element.bits,
        BLOCK,
        "mx_e2m3" if element == E2M3 else "mx",
        torch.uint8,
        symmetric=True,
        activation=activation,
    )


def fit_mx(weight: Tensor, element: Element, rule: ScaleRule = "ceil", activation: Activation = "none") -> MXGrid:
    """The grid of `weight` fp32 `[out, n]`: one power of two for every 32 columns of a row, by `rule`."""
    return MXGrid(element, mx.encode_exponents(mx.block_exponents(weight, element, rule)), activation)
