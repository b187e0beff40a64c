"""MX numbers bit for bit against torch's and ml_dtypes' types and the worked examples; scales; ugly values."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitquilt.ops.microscaling import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    block_exponents,
    decode_blocks,
    decode_element,
    decode_scales,
    element_values,
    encode_element,
    encode_exponents,
    quantize_blocks,
    round_to_element,
)

ELEMENTS = [E2M1, E3M2, E2M3, E4M3]
DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
}
RULES = ["ceil", "paper", "ocp"]
TOTAL = {"e2m1": 8, "e3m2": 32, "e2m3": 32, "e4m3": 127}


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_values_and_codes_are_those_of_the_type(element):
    codes = np.arange(2**element.bits, dtype=np.uint8)
    theirs = torch.from_numpy(codes.view(DTYPES[element.name]).astype(np.float32))
    ours = element_values(element)
    finite = theirs.isfinite()
    assert int((~finite).sum()) == (2 if element.name == "e4m3" else 0)  # the codes of NaN are never written
    assert torch.equal(ours[finite], theirs[finite])
    assert len(ours[finite & (ours >= 0) & ~torch.signbit(ours)].unique()) == TOTAL[element.name]
    back = encode_element(ours[finite], element)
    assert torch.equal(back, torch.arange(2**element.bits, dtype=torch.uint8)[finite])
    assert float(ours[finite].max()) == element.largest
    assert {"e2m1": 2, "e3m2": 4, "e2m3": 2, "e4m3": 8}[element.name] == element.ocp_exponent


def test_the_positive_values():
    assert element_values(E2M1)[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert float(element_values(E3M2)[1]) == 0.0625
    assert element_values(E3M2)[28:32].tolist() == [16, 20, 24, 28]
    assert float(element_values(E2M3)[1]) == 0.125
    assert float(element_values(E4M3)[126]) == 448


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_rounding_is_that_of_the_type(element):
    """Random values, ties between neighbours, subnormals, both zeros."""
    values = element_values(element)[: 2 ** (element.bits - 1)]
    values = values[values <= element.largest].unique()
    ties = (values[1:] + values[:-1]) / 2
    g = torch.Generator().manual_seed(0)
    random = torch.randn(4000, generator=g) * element.largest / 3
    tiny = torch.randn(1000, generator=g) * float(values[1])
    every = torch.cat([values, ties, random, tiny, torch.tensor([0.0])]).clamp(-element.largest, element.largest)
    every = torch.cat([every, -every])
    theirs = torch.from_numpy(every.numpy().astype(DTYPES[element.name]).astype(np.float32))
    ours = round_to_element(every, element)
    assert torch.equal(ours, theirs)
    assert torch.equal(torch.signbit(ours), torch.signbit(every))
    assert torch.equal(decode_element(encode_element(ours, element), element), ours)
    if element is E4M3:
        assert torch.equal(ours, every.to(torch.float8_e4m3fn).float())
        assert torch.equal(encode_element(ours, element), every.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_what_is_too_large_saturates(element):
    huge = torch.tensor([1.01, 1.5, 1e30]) * element.largest
    assert round_to_element(torch.cat([huge, -huge]), element).abs().unique().tolist() == [element.largest]


def test_scales_are_e8m0():
    exponents = torch.arange(-127, 128)
    stored = encode_exponents(exponents)
    assert stored.tolist() == list(range(255))
    assert torch.equal(decode_scales(stored), stored.view(torch.float8_e8m0fnu).float())


@pytest.mark.parametrize(
    ("block", "rule", "expected", "error"),
    [
        ([5, -3.3, 0.7, 0.2], "paper", [4, -4 + 1, 1, 0], None),
        ([5, -3.3, 0.7, 0.2], "ceil", [4, -3, 0.5, 0], 1.17),
        ([5, -3.3, 0.7, 0.2], "ocp", [4, -3, 0.5, 0], 1.17),
        ([7, -3.3, 0.7, 0.2], "ceil", [8, -3, 1, 0], 1.22),
        ([7, -3.3, 0.7, 0.2], "ocp", [6, -3, 0.5, 0], 1.17),
    ],
)
def test_worked_blocks(block, rule, expected, error):
    values = torch.tensor([block])
    found = quantize_blocks(values, E2M1, rule)
    if rule == "paper":  # s = 2: -3.3 / 2 = -1.65 is nearest to -1.5, which is -3
        error = 1.22
    assert found.tolist() == [expected]
    assert float((found - values).square().sum()) == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
@pytest.mark.parametrize("rule", RULES)
def test_a_value_of_the_format_is_a_fixed_point_at_every_scale_that_reaches_it(element, rule):
    values = element_values(element)
    values = values[(values.abs() <= element.largest)].unsqueeze(1)
    if rule == "ocp" and element is E4M3:  # 1.875 2^8 is the code of NaN, so such a block saturates
        values = values[torch.frexp(values.abs()).mantissa != 0.9375].unsqueeze(1)
    for power in (-90, -3, 0, 5, 90):
        scaled = torch.ldexp(values, torch.tensor(power))
        found = quantize_blocks(scaled, element, rule)
        assert torch.equal(found, scaled)


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
@pytest.mark.parametrize("rule", RULES)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=70), st.integers(-20, 20))
def test_odd_idempotent_and_as_fine_at_every_scale(element, rule, numbers, power):
    values = torch.tensor([numbers])
    found = quantize_blocks(values, element, rule)
    assert torch.equal(quantize_blocks(-values, element, rule), -found)
    if rule == "ceil":
        assert torch.equal(quantize_blocks(found, element, rule), found)
    wide = values.double().abs() > 1e-20  # the product with the power must stay a normal number
    shifted = torch.ldexp(torch.where(wide, values, 0.0), torch.tensor(power))
    found = quantize_blocks(torch.where(wide, values, 0.0), element, rule)
    assert torch.equal(quantize_blocks(shifted, element, rule), torch.ldexp(found, torch.tensor(power)))


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_ceil_never_saturates_and_wastes_less_than_half(element):
    largest = torch.logspace(-30, 30, 5000, base=2).unsqueeze(1)
    for values in (element.largest * torch.tensor([[1.0], [1 + 2**-20], [1 - 2**-20], [2.0]]), largest):
        scale = 2.0 ** block_exponents(values, element, "ceil")
        assert bool((values / scale <= element.largest).all())
        assert bool((values / scale > element.largest / 2).all())
    paper = values / 2.0 ** block_exponents(values, element, "paper")
    assert bool(((paper >= 2.0**element.paper_exponent) & (paper < 2.0 ** (element.paper_exponent + 1))).all())


@pytest.mark.parametrize(("element", "rule", "expected"), [
    (E2M1, "paper", 0.0208), (E2M1, "ceil", 0.0134), (E2M1, "ocp", 0.0134), (E3M2, "ceil", 0.0028),
    (E3M2, "paper", 0.0028), (E4M3, "ceil", 0.0007), (E4M3, "ocp", 0.00086),
])  # fmt: skip
def test_error_on_gaussian_blocks(element, rule, expected):
    values = torch.randn(4000, 32, generator=torch.Generator().manual_seed(1))
    error = float((quantize_blocks(values, element, rule) - values).square().sum() / values.square().sum())
    assert error == pytest.approx(expected, rel=0.06)


def test_blocks_are_32_neighbours_and_the_last_may_be_narrower():
    values = torch.ones(2, 70)
    values[:, 32:64] = 1000.0
    values[:, 64:] = 1e-3
    assert block_exponents(values, E2M1, "ceil").shape == (2, 3)
    found = quantize_blocks(values, E2M1, "ceil")
    torch.testing.assert_close(found, values, rtol=0.2, atol=0)
    assert quantize_blocks(torch.zeros(3, 0), E2M1, "ceil").shape == (3, 0)


def test_zeros_extremes_and_what_is_not_finite():
    assert not quantize_blocks(torch.zeros(1, 32), E4M3, "ceil").any()
    assert block_exponents(torch.zeros(1, 32), E4M3, "ceil").tolist() == [[0]]
    for size in (1e-38, 1e-45, 3e38):
        values = torch.full((1, 32), size)
        found = quantize_blocks(values, E4M3, "ceil")
        assert bool(found.isfinite().all())
        if size != 1e-45:
            torch.testing.assert_close(found, values, rtol=0.0625, atol=0)
    values = torch.ones(1, 64)
    values[0, 3] = float("inf")
    found = quantize_blocks(values, E4M3, "ceil")
    assert bool(found[0, :32].isnan().all())
    assert found[0, 32:].tolist() == [1.0] * 32


def test_stored_blocks_decode_to_the_rounded_values():
    values = torch.randn(5, 45, generator=torch.Generator().manual_seed(2)) * 7
    for element in ELEMENTS:
        exponents = block_exponents(values, element, "ceil")
        rounded = quantize_blocks(values, element, "ceil")
        steps = (2.0**exponents).repeat_interleave(32, dim=1)[:, :45]
        codes = encode_element(rounded / steps, element)
        assert torch.equal(decode_blocks(codes, encode_exponents(exponents), element), rounded)
