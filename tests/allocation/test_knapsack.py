"""Exact program, steepest path and repair on one layer's table, against worked examples and brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquilt.allocation.knapsack import (
    best_bits,
    greedy_bits,
    non_increasing,
    repair,
    spend_all,
    table_error,
)
from bitquilt.allocation.path import steepest

SOLVERS = [best_bits, greedy_bits]
PALETTE = (1, 2, 3, 4)
TABLE = [[8, 3, 1, 0.3], [4, 2.5, 2, 1.8], [10, 2, 1.5, 1.2], [3, 1, 0.5, 0.2]]
HOLLOW = [[8, 7.5, 1, 0.9], [4, 2, 1, 0.5]]  # not convex


def brute(table, widths, budget):
    maps = itertools.product(PALETTE, repeat=len(table))
    return min(
        table_error(table, PALETTE, bits)
        for bits in maps
        if sum(w * b for w, b in zip(widths, bits, strict=True)) <= budget
    )


@pytest.mark.parametrize(
    ("budget", "error", "bits"),
    [
        (4, 25.0, (1, 1, 1, 1)),
        (5, 17.0, None),
        (6, 12.0, (2, 1, 2, 1)),
        (7, 10.0, None),
        (8, 8.0, (3, 1, 2, 2)),
        (9, 6.5, (3, 2, 2, 2)),
        (10, 5.8, (4, 2, 2, 2)),
        (11, 5.3, None),
        (12, 4.8, None),
        (16, 3.5, (4, 4, 4, 4)),
    ],
)
@pytest.mark.parametrize("solve", SOLVERS)
def test_the_worked_table(budget, error, bits, solve):
    found = solve(TABLE, PALETTE, [1] * 4, budget)
    assert table_error(TABLE, PALETTE, found) == pytest.approx(error)
    assert bits is None or found == bits
    assert sum(found) <= budget


def test_the_path_misses_three_bits_of_a_hollow_table_but_repair_does_not():
    path = steepest(np.array(HOLLOW), np.tile([1.0, 2.0, 3.0, 4.0], (2, 1)))
    assert path.at(path.within(1)).tolist() == [0, 0]
    assert repair((1, 1), HOLLOW, PALETTE, [1, 1], 3) == (1, 2)
    for budget, bits in ((2, (1, 1)), (3, (1, 2)), (4, (3, 1)), (5, (3, 2)), (6, (3, 3))):
        assert best_bits(HOLLOW, PALETTE, [1, 1], budget) == bits
        assert greedy_bits(HOLLOW, PALETTE, [1, 1], budget) == bits


def test_repair_brings_a_map_within_the_budget_by_the_cheapest_steps():
    assert repair((4, 4, 4, 4), TABLE, PALETTE, [1] * 4, 9) == (3, 2, 2, 2)
    assert repair((1, 1, 1, 1), TABLE, PALETTE, [1] * 4, 4) == (1, 1, 1, 1)
    assert repair((1, 4, 1, 1), TABLE, PALETTE, [1] * 4, 7, exchange=False) == (1, 4, 1, 1)
    assert repair((1, 4, 1, 1), TABLE, PALETTE, [1] * 4, 7) == best_bits(TABLE, PALETTE, [1] * 4, 7)
    assert sum(repair((3, 3, 3, 3), TABLE, PALETTE, [1] * 4, 5)) <= 5


rows = st.lists(st.floats(0, 100), min_size=4, max_size=4)


@given(st.lists(rows, min_size=1, max_size=5), st.data())
def test_against_brute_force(table, data):
    widths = data.draw(st.lists(st.sampled_from([8, 16, 24]), min_size=len(table), max_size=len(table)))
    budget = data.draw(st.integers(sum(widths), 4 * sum(widths)))
    monotone = non_increasing(table, PALETTE).tolist()
    optimum = brute(monotone, widths, budget)
    for solve in SOLVERS:
        bits = solve(table, PALETTE, widths, budget)
        assert sum(w * b for w, b in zip(widths, bits, strict=True)) <= budget
        error = table_error(monotone, PALETTE, bits)
        assert error >= optimum - 1e-9
        if solve is best_bits:
            assert error <= optimum + 1e-9
    path = steepest(np.array(monotone), np.outer(widths, PALETTE).astype(float))
    steps = path.within(budget - sum(widths))
    gap = table_error(monotone, PALETTE, [PALETTE[i] for i in path.at(steps)]) - optimum
    assert gap <= (path.gains[steps] if steps < len(path) else 0.0) * (1 + 1e-9) + 1e-9


@given(st.lists(rows, min_size=2, max_size=6), st.floats(0.01, 100), st.data())
def test_scale_constants_and_order_of_the_units(table, factor, data):
    budget = data.draw(st.integers(len(table), 4 * len(table)))
    widths = [1] * len(table)
    error = table_error(table, PALETTE, best_bits(table, PALETTE, widths, budget))
    scaled = [[factor * e for e in row] for row in table]
    moved = [[e + 3 for e in row] for row in table]
    for other, back in ((scaled, lambda e: e / factor), (moved, lambda e: e - 3 * len(table))):
        bits = best_bits(other, PALETTE, widths, budget)
        assert back(table_error(other, PALETTE, bits)) == pytest.approx(error, rel=1e-6, abs=1e-6)
    order = data.draw(st.permutations(range(len(table))))
    bits = best_bits([table[i] for i in order], PALETTE, widths, budget)
    assert table_error([table[i] for i in order], PALETTE, bits) == pytest.approx(error, rel=1e-9, abs=1e-9)


def test_more_budget_never_costs_and_no_uniform_map_that_fits_is_better():
    errors = [table_error(TABLE, PALETTE, greedy_bits(TABLE, PALETTE, [1] * 4, b)) for b in range(4, 17)]
    assert errors == sorted(errors, reverse=True)
    for bits in PALETTE:
        assert errors[4 * bits - 4] <= table_error(TABLE, PALETTE, (bits,) * 4)


def test_equal_units_get_the_rest_of_the_budget_in_index_order():
    table = [[8.0, 4.0, 2.0, 1.0]] * 5
    for solve in SOLVERS:
        assert solve(table, PALETTE, [8] * 5, 8 * 12) == (3, 3, 2, 2, 2)


def test_more_bits_that_hurt_are_left_unspent():
    assert non_increasing([[1, 5, 0.5]], (1, 2, 3)).tolist() == [[1, 1, 0.5]]
    for solve in SOLVERS:
        assert solve([[1, 5, 7]], (1, 2, 3), [8], 24) == (1,)
    assert best_bits([[1, 5, 7], [4, 2, 3]], (1, 2, 3), (1, 1), 6) == (1, 2)


def test_dead_units_take_the_fewest_bits():
    assert greedy_bits([[0.0] * 4, TABLE[0]], PALETTE, [1, 1], 5) == (1, 4)


@pytest.mark.parametrize("solve", SOLVERS)
def test_what_cannot_be_met_is_named(solve):
    with pytest.raises(ValueError, match="budget 3 is below 1 bits for each of 4 columns"):
        solve(TABLE, PALETTE, [1] * 4, 3)
    with pytest.raises(ValueError, match="error of unit 1 at 3 bits is nan"):
        solve([TABLE[0], [1, 1, float("nan"), 1]], PALETTE, [1, 1], 4)
    with pytest.raises(ValueError, match="wanted ascending bits"):
        solve(TABLE, (2, 1, 3, 4), [1] * 4, 8)


def test_many_units_are_spread_greedily():
    generator = np.random.default_rng(0)
    table = np.sort(generator.random((3000, 4)), axis=1)[:, ::-1].tolist()
    bits = greedy_bits(table, PALETTE, [1] * 3000, 6900)
    assert sum(bits) == 6900
    exact = table_error(table, PALETTE, best_bits(table, PALETTE, [1] * 3000, 6900))
    assert exact <= table_error(table, PALETTE, bits) <= 1.001 * exact


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=8), st.integers(0, 8))
def test_spend_all_spends_all_and_is_near_the_optimum(table, extra):
    table = [sorted(row, reverse=True) for row in table]
    units, palette = len(table), (2, 3, 4)
    budget = min(2 * units + extra, 4 * units)
    chosen = spend_all(table, palette, budget)
    assert sum(palette[i] for i in chosen) == budget
    best = best_bits(table, palette, [1] * units, budget)
    loss = sum(row[i] for row, i in zip(table, chosen, strict=True))
    optimum = sum(row[palette.index(b)] for row, b in zip(table, best, strict=True))
    assert optimum - 1e-9 <= loss <= optimum + max(row[0] - row[-1] for row in table) + 1e-9


def test_errors_of_spend_all_are_named():
    with pytest.raises(ValueError, match="unit 1 at choice 0 is inf"):
        spend_all([[1, 0], [float("inf"), 0]], (2, 3), 5)
    with pytest.raises(ValueError, match="below 2 for each of 2"):
        spend_all([[1, 0], [1, 0]], (2, 3), 3)
    assert spend_all([[1], [1]], (2,), 5) == (0, 0)
