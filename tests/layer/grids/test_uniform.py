"""The group quantizer's laws (SliM-LLM): worked examples, invariances, one-bit rules, weighted calibration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitquilt.layer.grids.uniform import (
    MIN_MAX,
    PUBLISHED_SEARCH,
    RangeSearch,
    fit,
    fit_range,
    fit_two_levels,
    scale_dtype_for,
    zeros_at,
)

FP32 = {"scale_dtype": torch.float32}


def row(*values):
    return torch.tensor([values], dtype=torch.float32)


def test_worked_example_at_tau_1_and_0_9():
    w = row(-0.6, -0.1, 0.3, 0.9)
    grid = fit_range(w, 2, **FP32)
    assert grid.scale.item() == pytest.approx(0.5)
    assert grid.zero.item() == 1
    assert grid.encode(w).tolist() == [[0, 1, 2, 3]]
    assert grid.quantize(w).tolist() == [pytest.approx([-0.5, 0, 0.5, 1.0])]
    assert (w - grid.quantize(w)).square().sum().item() == pytest.approx(0.07)
    tight = fit_range(w, 2, search=RangeSearch(taus=(0.9,)), **FP32)
    assert tight.quantize(w).tolist() == [pytest.approx([-0.45, 0, 0.45, 0.9])]
    assert (w - tight.quantize(w)).square().sum().item() == pytest.approx(0.055)
    assert tight.zero.item() == 1


def test_positive_zero_and_constant_groups():
    w = row(0.2, 0.5, 0.6, 0.8)
    grid = fit_range(w, 2, **FP32)
    assert (grid.scale.item(), grid.zero.item()) == (pytest.approx(0.26667, abs=1e-5), 0)
    assert grid.encode(w).tolist() == [[1, 2, 2, 3]]
    assert torch.equal(fit_range(row(0, 0, 0), 3).quantize(row(0, 0, 0)), row(0, 0, 0))
    torch.testing.assert_close(fit_range(row(0.3, 0.3), 3).quantize(row(0.3, 0.3)), row(0.3, 0.3), rtol=1e-3, atol=0)


@given(seed=st.integers(0, 200), bits=st.integers(2, 8), tau=st.floats(0.4, 1.1))
def test_the_zero_does_not_depend_on_tau_and_is_a_code(seed, bits, tau):
    w = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
    one, other = fit_range(w, bits), fit_range(w, bits, search=RangeSearch(taus=(tau,)))
    assert torch.equal(one.zero, other.zero)
    assert int(one.zero.max()) <= 2**bits - 1
    codes = other.encode(w)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_stored_grid_is_the_solved_grid(bits):
    """Scales are rounded before codes are chosen: no other code of the stored grid is nearer."""
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(bits))
    grid = fit(w, bits, search=RangeSearch())
    assert grid.scale.dtype == torch.float16
    levels = torch.stack([grid.decode(torch.full_like(w, code)) for code in range(2**bits)])
    nearest = (levels - w).abs().amin(dim=0)
    torch.testing.assert_close((grid.quantize(w) - w).abs(), nearest, rtol=0, atol=1e-6)


def test_range_search_never_loses_to_min_max_and_keeps_tau_1_on_ties():
    w = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4):
        plain = (w - fit_range(w, bits, **FP32).quantize(w)).square().sum(1)
        searched = (w - fit_range(w, bits, search=RangeSearch(), **FP32).quantize(w)).square().sum(1)
        assert bool((searched <= plain + 1e-6).all())
        assert float(searched.sum()) < 0.99 * float(plain.sum())
    exact = row(0.0, 1.0, 2.0, 3.0)
    assert fit_range(exact, 2, search=RangeSearch(taus=(1.0, 0.5, 1.0)), **FP32).scale.item() == 1.0


def test_gaussian_optimum_lies_below_0_9_at_two_bits():
    """Mean best tau of Gaussian groups of 128 is about 0.60 / 0.80 / 0.93 at 2 / 3 / 4 bits."""
    w = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0))
    for bits, expected in ((2, 0.60), (3, 0.80), (4, 0.93)):
        full = (w.amax(1) - w.amin(1)) / (2**bits - 1)
        tau = (fit_range(w, bits, search=RangeSearch(), **FP32).scale.squeeze(1) / full).mean()
        assert float(tau) == pytest.approx(expected, abs=0.04)


def test_importance_moves_the_range():
    """w = [-0.5, 0.1, 0.4, 1.0], published grid of tau: 0.966 without weight, 0.912 with weight 4 on the third."""
    w = row(-0.5, 0.1, 0.4, 1.0)
    search = RangeSearch(PUBLISHED_SEARCH.taus, exponent=2.0)
    for importance, tau, loss in ((None, 0.966, 0.01833), (torch.tensor([1.0, 1, 4, 1]), 0.912, 0.03222)):
        grid = fit_range(w, 2, importance, search=search, **FP32)
        assert grid.scale.item() == pytest.approx(0.5 * tau, abs=1e-6)
        mass = torch.ones(4) if importance is None else importance
        assert float((mass * (w - grid.quantize(w)).square()).sum()) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    ("rule", "values", "error"),
    [
        ("code", [0, 0, 1, 1], 0.22),
        ("symmetric", [0.5] * 4, 0.62),
    ],
)
def test_one_bit_rules_on_the_first_example(rule, values, error):
    w = row(0.1, 0.2, 0.6, 1.1)
    grid = fit_two_levels(w, rule=rule, **FP32)
    assert grid.quantize(w).tolist() == [pytest.approx(values, abs=1e-6)]
    assert float((w - grid.quantize(w)).square().sum()) == pytest.approx(error, abs=1e-5)


def test_symmetric_levels_weigh_by_importance_and_store_no_zero():
    w = row(1.0, -3.0)
    grid = fit_two_levels(w, torch.tensor([3.0, 1.0]), rule="symmetric", **FP32)
    assert grid.zero is None
    assert grid.quantize(w).tolist() == [[1.5, -1.5]]
    assert fit_two_levels(w, torch.zeros(2), rule="symmetric").scale.item() > 0


def test_scales_never_store_as_zero_and_out_of_range_layers_use_bfloat16():
    tiny = torch.full((2, 8), 1e-9)
    grid = fit(tiny, 4, search=MIN_MAX)
    assert float(grid.scale.float().min()) > 0
    assert bool(torch.isfinite(grid.quantize(tiny)).all())
    assert scale_dtype_for(torch.randn(4, 4)) == torch.float16
    assert scale_dtype_for(torch.tensor([1e6])) == torch.bfloat16
    assert scale_dtype_for(torch.tensor([1e-6])) == torch.bfloat16
    assert scale_dtype_for(torch.zeros(3)) == torch.float16
    huge = torch.tensor([[1e6, -2e6, 5e5]])
    torch.testing.assert_close(fit(huge, 8, scale_dtype=torch.bfloat16).quantize(huge), huge, rtol=0.02, atol=2e4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_symmetric_grid_is_the_best_of_its_candidates(bits):
    w = torch.randn(16, 32, generator=torch.Generator().manual_seed(bits))
    importance = torch.rand(32, generator=torch.Generator().manual_seed(9)) + 0.1
    search = RangeSearch(taus=tuple(i / 10 for i in range(3, 12)))
    grid = fit_range(w, bits, importance, search=search, symmetric=True)
    assert grid.zero is None
    least = ((w - grid.quantize(w)).square() * importance).sum(1)
    for tau in search.taus:
        other = fit_range(w, bits, search=RangeSearch(taus=(tau,)), symmetric=True)
        assert bool((((w - other.quantize(w)).square() * importance).sum(1) >= least - 1e-6).all())


def test_symmetric_levels_lie_on_both_sides_of_zero_and_a_group_of_zeros_stays_near_it():
    grid = fit_range(row(-0.75, 0.1, 0.3, 0.6), 2, symmetric=True, **FP32)
    assert grid.scale.item() == pytest.approx(0.5)
    assert grid.quantize(row(-0.75, 0.1, 0.3, 0.6)).tolist() == [pytest.approx([-0.75, 0.25, 0.25, 0.75])]
    nothing = row(0, 0, 0)
    zeros = fit_range(nothing, 2, search=RangeSearch(), symmetric=True)
    assert float(zeros.quantize(nothing).abs().max()) < 1e-6


def test_at_two_bits_symmetric_levels_fit_a_gaussian_better_and_at_four_integer_zeros_do():
    w = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
    errors = {
        (bits, symmetric): float(
            (w - fit(w, bits, search=RangeSearch(), symmetric=symmetric).quantize(w)).square().mean()
        )
        for bits in (2, 4)
        for symmetric in (True, False)
    }
    assert errors[2, True] < 0.98 * errors[2, False]
    assert errors[4, True] > errors[4, False]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searching_the_zero_never_loses_and_stays_a_code(bits):
    w = torch.randn(200, 16, generator=torch.Generator().manual_seed(bits)) + 0.5
    plain, searched = (fit(w, bits, search=RangeSearch(zeros=zeros)) for zeros in (False, True))
    errors = [(w - grid.quantize(w)).square().sum(1) for grid in (plain, searched)]
    assert bool((errors[1] <= errors[0]).all())
    assert float(errors[1].sum()) < float(errors[0].sum())
    assert searched.zero.dtype == torch.uint8
    assert int(searched.zero.max()) <= 2**bits - 1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_in_the_middle_is_the_same_in_every_group(bits):
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(bits)) + 0.3
    weight[0] = 0
    searched = fit_range(weight, bits, search=zeros_at(RangeSearch(), "middle"))
    plain = fit_range(weight, bits, search=zeros_at(MIN_MAX, "middle"))
    for grid in (searched, plain):
        assert grid.zero is not None
        assert bool((grid.zero == 2 ** (bits - 1)).all())
        assert bool(grid.quantize(weight)[0].eq(0).all())
    errors = [float((grid.quantize(weight) - weight).square().sum()) for grid in (searched, plain)]
    assert errors[0] <= errors[1]
    free = fit_range(weight, bits, search=RangeSearch())
    assert float((free.quantize(weight) - weight).square().sum()) < errors[0]  # the weights lean to one side
