"""Bit maps: the published pairing with its worked examples, budgets, and the exact allocator against brute force."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquilt.allocation.double_pointer import cheapest_within, pair_candidates
from bitquilt.allocation.knapsack import least_error
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


TABLE = [[8, 3, 1, 0.3], [4, 2.5, 2, 1.8], [10, 2, 1.5, 1.2], [3, 1, 0.5, 0.2]]


@pytest.mark.parametrize(
    ("budget", "error"),
    [(4, 25), (5, 17), (6, 12), (7, 10), (8, 8), (9, 6.5), (10, 5.8), (11, 5.3), (12, 4.8), (16, 3.5)],
)
def test_optimum_of_the_worked_table(budget, error):
    bits = least_error(TABLE, (1, 2, 3, 4), (1, 1, 1, 1), budget)
    assert sum(bits) <= budget
    assert sum(row[b - 1] for row, b in zip(TABLE, bits, strict=True)) == pytest.approx(error)


def test_named_optima():
    assert least_error(TABLE, (1, 2, 3, 4), (1,) * 4, 8) == (3, 1, 2, 2)
    assert least_error(TABLE, (1, 2, 3, 4), (1,) * 4, 6) == (2, 1, 2, 1)
    rough = [[8, 7.5, 1, 0.9], [4, 2, 1, 0.5]]
    assert least_error(rough, (1, 2, 3, 4), (1, 1), 3) == (1, 2)
    assert least_error(rough, (1, 2, 3, 4), (1, 1), 4) == (3, 1)


@given(st.data())
def test_exact_against_brute_force(data):
    units = data.draw(st.integers(1, 4))
    table = [[data.draw(st.floats(0, 10)) for _ in range(3)] for _ in range(units)]
    widths = [data.draw(st.sampled_from([4, 8, 12])) for _ in range(units)]
    palette = (2, 3, 4)
    budget = data.draw(st.integers(2 * sum(widths), 4 * sum(widths)))
    found = least_error(table, palette, widths, budget)
    spent = sum(w * b for w, b in zip(widths, found, strict=True))
    assert spent <= budget
    best = min(
        sum(row[palette.index(b)] for row, b in zip(table, choice, strict=True))
        for choice in itertools.product(palette, repeat=units)
        if sum(w * b for w, b in zip(widths, choice, strict=True)) <= budget
    )
    assert sum(row[palette.index(b)] for row, b in zip(table, found, strict=True)) == pytest.approx(best)


def test_impossible_budgets_and_bad_errors_are_named():
    with pytest.raises(ValueError, match="budget 3"):
        least_error(TABLE, (1, 2, 3, 4), (1,) * 4, 3)
    with pytest.raises(ValueError, match="unit 1 at 2 bits"):
        least_error([[1, 2], [3, float("nan")]], (1, 2), (1, 1), 3)
