"""Weights as MX numbers: codes and scales decode to the rounded weight; worst errors against a fine grid."""

import pytest
import torch

from bitquilt.layer.grids.mx import element_for, fit_mx
from bitquilt.ops.microscaling import E2M1, E2M3, E3M2, E4M3, decode_blocks, quantize_blocks

ELEMENTS = [E2M1, E3M2, E2M3, E4M3]


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
@pytest.mark.parametrize("rule", ["ceil", "paper", "ocp"])
@pytest.mark.parametrize("width", [1, 32, 45])
def test_codes_and_scales_are_the_rounded_weight(element, rule, width):
    weight = torch.randn(6, width, generator=torch.Generator().manual_seed(width)) * 3
    grid = fit_mx(weight, element, rule)
    codes = grid.encode(weight)
    assert grid.scale.dtype == torch.uint8
    assert grid.scale.shape == (6, -(-width // 32))
    assert int(codes.max()) < 2**element.bits
    assert torch.equal(grid.decode(codes), quantize_blocks(weight, element, rule))
    assert torch.equal(grid.decode(codes), decode_blocks(codes.to(torch.uint8), grid.scale, element))


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
@pytest.mark.parametrize("rule", ["ceil", "paper", "ocp"])
def test_worst_ratios(element, rule):
    """The largest of every block of one value, on a fine grid: reached, and never exceeded."""
    expected = {"e2m1": 1 / 5, "e3m2": 1 / 9, "e2m3": 1 / 17, "e4m3": 1 / 17}[element.name]
    if rule == "ocp":
        expected = {"e2m1": 1 / 4, "e3m2": 1 / 8, "e2m3": 1 / 16, "e4m3": 1 / 8}[element.name]
    sizes = torch.linspace(1, 2, 40001)[:-1].unsqueeze(1)
    ratio = (quantize_blocks(sizes, element, rule) - sizes).abs() / sizes
    assert float(ratio.max()) == pytest.approx(expected, rel=2e-3)
    assert float(ratio.max()) <= expected * (1 + 1e-6)


def test_elements_by_bits():
    assert [element_for(bits).name for bits in (4, 6, 8)] == ["e2m1", "e3m2", "e4m3"]
    assert element_for(6, "e2m3") is E2M3
    with pytest.raises(ValueError, match="an MX element of 5 bits; there are 4, 6 and 8"):
        element_for(5)
