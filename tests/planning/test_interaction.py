"""From the tables of single layers to a model quantized whole."""

import math

import pytest

from bitquilt.planning.interaction import RANGE, interaction_factors, perplexity_range


def test_few_bits_lose_more_together_and_many_add_up():
    factors = interaction_factors(range(1, 9))
    assert factors == sorted(factors, reverse=True)
    assert len(set(factors[4:])) == 1
    assert 1.0 <= factors[4] < factors[3]


def test_repaired_errors_add_up_to_less_at_every_width_alike():
    shares = {
        round(a / b, 9)
        for a, b in zip(interaction_factors(range(1, 9), True), interaction_factors(range(1, 9)), strict=True)
    }
    assert len(shares) == 1
    assert shares.pop() < 1.0


def test_the_range_holds_the_prediction_and_shrinks_with_it():
    low, high = perplexity_range(0.1, 10.0)
    assert low < 10.0 * math.exp(0.1) < high
    assert (math.log(high / 10.0) / 0.1, math.log(low / 10.0) / 0.1) == pytest.approx((RANGE[1], RANGE[0]))
    assert perplexity_range(0.0, 10.0) == pytest.approx((10.0, 10.0))
    assert all(map(math.isfinite, perplexity_range(1e6, 10.0)))
