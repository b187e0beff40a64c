"""Bit maps: the published pairing with its worked examples, and the budget of narrow last groups."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquilt.allocation.double_pointer import cheapest_within, pair_candidates, raised_map
from bitquilt.core.types import Cost, LayerPlan


def test_pairing_examples():
    maps = pair_candidates([5, 1, 3, 9, 0.5, 4], 2)
    assert maps == [(2, 2, 2, 2, 2, 2), (2, 2, 2, 3, 1, 2), (3, 1, 2, 3, 1, 2), (3, 1, 1, 3, 1, 3)]
    assert pair_candidates([1.0] * 6, 2)[1] == (1, 2, 2, 2, 2, 3)
    assert pair_candidates([2, 1, 3], 3) == [(3, 3, 3), (3, 2, 4)]
    assert pair_candidates([1, 2], 3) == [(3, 3), (2, 4)]
    assert pair_candidates([7], 3) == [(3,)]


def test_palette_ends_leave_uniform_bits_only():
    assert pair_candidates([1, 2, 3, 4], 8) == [(8, 8, 8, 8)]
    assert pair_candidates([1, 2], 1) == [(1, 1)]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.integers(2, 7))
def test_every_map_keeps_the_mean_and_ranks_by_salience(salience, bits):
    for bit_map in pair_candidates(salience, bits):
        assert sum(bit_map) == bits * len(salience)
        lows = [s for s, b in zip(salience, bit_map, strict=True) if b < bits]
        highs = [s for s, b in zip(salience, bit_map, strict=True) if b > bits]
        assert not lows or max(lows) <= min(highs)


def test_raised_maps():
    assert raised_map([5, 1, 3, 9], 2, 1) == (2, 2, 2, 3)
    assert raised_map([1.0, 1.0, 1.0], 3, 2) == (4, 4, 3)
    assert raised_map([1, 2], 3, 0) == (3, 3)


def plans(*maps, group_size=128):
    return tuple(LayerPlan(tuple(m), group_size) for m in maps)


def test_width_weighted_budget():
    """Widths 128, 128, 44 at 3 bits: high on a wide group with low on the narrow one is 3.28 and refused."""
    over, under, uniform = plans((4, 3, 2), (2, 3, 4), (3, 3, 3))
    assert cheapest_within(Cost((uniform, over), (2.0, 1.0)), 300, 3) == uniform
    assert cheapest_within(Cost((uniform, under), (2.0, 1.0)), 300, 3) == under
    with pytest.raises(ValueError, match="no candidate fits"):
        cheapest_within(Cost((over,), (1.0,)), 300, 3)


def test_ties_go_to_the_earliest_and_bad_losses_are_errors():
    one, other = plans((2, 2), (1, 3))
    assert cheapest_within(Cost((one, other), (1.0, 1.0)), 256, 2) == one
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="objective"):
            cheapest_within(Cost((one, other), (1.0, bad)), 256, 2)
