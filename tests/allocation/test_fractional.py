"""Fractional budgets: exact sums, rankings, named errors."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquilt.allocation.fractional import check_budget, check_palette, spread_bits


def fractional_bits(norms, bits, palette=(1, 2, 3, 4, 5, 6, 7, 8)):
    """A fractional mean as the recipes ask for it: the sum is rounded, not the mean."""
    check_budget(bits, palette)
    return spread_bits(norms, round(bits * len(norms)), palette)


def test_the_known_maps():
    """Law C1."""
    assert fractional_bits([1, 4, 2, 3], 2.5) == (2, 3, 2, 3)
    bits = fractional_bits([5, 1, 3, 2, 4, 9, 7, 8, 6, 10], 2.3)
    assert bits == (2, 2, 2, 2, 2, 3, 2, 3, 2, 3)
    assert sum(bits) / 10 == 2.3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.floats(2, 7))
def test_sums_are_exact_and_bits_follow_the_norms(norms, bits):
    """Law C2."""
    got = fractional_bits(norms, bits)
    assert sum(got) == round(bits * len(norms))
    for i, j in itertools.product(range(len(norms)), repeat=2):
        assert norms[i] <= norms[j] or got[i] >= got[j]


def test_permuted_channels_permute_the_bits():
    norms = [0.3, 2.0, 1.0, 5.0, 0.1, 4.0]
    order = [3, 0, 5, 2, 1, 4]
    got = fractional_bits(norms, 2.6)
    assert fractional_bits([norms[j] for j in order], 2.6) == tuple(got[j] for j in order)


def test_edges():
    assert fractional_bits([1, 2, 3, 4], 2.9999999) == (3, 3, 3, 3)
    assert fractional_bits([0, 0, 0, 0], 2.5) == (3, 3, 2, 2)
    assert fractional_bits([1.0], 2.4) == (2,)
    assert spread_bits([1, 2], 16) == (8, 8)


@pytest.mark.parametrize(
    ("norms", "bits", "options", "message"),
    [
        ([1, 2], 0.5, {}, "bits is 0.5; the palette reaches means from 1 to 8"),
        ([1, 2], 8.5, {}, "bits is 8.5"),
        ([1, 2], 4.5, {"palette": (2, 3, 4)}, "means from 2 to 4"),
        ([1, 2], float("nan"), {}, "bits is nan"),
        ([1, 2], 3, {"palette": (2, 4)}, "has a hole at 3"),
        ([1, 2], 3, {"palette": ()}, r"palette is \[\]"),
        ([1, 2], 3, {"palette": (3, 2)}, "ascending"),
        ([1, float("nan")], 3, {}, "norm of channel 1 is nan"),
    ],
)
def test_bad_budgets_are_named(norms, bits, options, message):
    with pytest.raises(ValueError, match=message):
        fractional_bits(norms, bits, **options)


def test_palettes_outside_the_storable_widths():
    with pytest.raises(ValueError, match="widths from 1 to 8"):
        check_palette((8, 9))
