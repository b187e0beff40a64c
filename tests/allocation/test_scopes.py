"""The published pairing as a constraint: means untouched, never more expensive, never worse by the tables."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bitquilt.allocation.scopes import paired


def total(table, choices):
    return float(table[np.arange(len(table)), choices].sum())


def test_the_least_sensitive_groups_pay_for_the_most_sensitive():
    # widths 1, 2, 3: ranked by what they lose at 2 bits, group 1 < 3 < 0 < 2
    losses = np.array([[9.0, 3.0, 2.0], [1.0, 0.5, 0.4], [40.0, 10.0, 2.0], [5.0, 2.0, 1.0]])
    costs = np.tile([1.0, 2.0, 3.0], (4, 1))
    middle = np.ones(4, np.int8)
    # one pair gains 8 for 0.5; a second would gain 1 for 3
    assert paired(middle, losses, costs, [np.arange(4)]).tolist() == [1, 0, 2, 1]
    # in two layers of two groups each, only the first pair of the second layer pays: 8 for 3
    assert paired(middle, losses, costs, [np.array([0, 1]), np.array([2, 3])]).tolist() == [2, 0, 2, 0]


def test_no_pair_where_there_is_no_width_below_or_above_or_it_would_cost_more():
    losses = np.array([[4.0, 1.0, 0.5], [40.0, 30.0, 1.0]])
    costs = np.tile([1.0, 2.0, 3.0], (2, 1))
    both = [np.arange(2)]
    assert paired(np.zeros(2, np.int8), losses, costs, both).tolist() == [0, 0]
    assert paired(np.full(2, 2, np.int8), losses, costs, both).tolist() == [2, 2]
    assert paired(np.ones(2, np.int8), losses, costs, both).tolist() == [0, 2]
    costs[0] *= 0.5  # the least sensitive group is a narrow last one: it pays too little
    assert paired(np.ones(2, np.int8), losses, costs, both).tolist() == [1, 1]


@given(st.data())
def test_means_cost_and_loss(data):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    count = sum(sizes)
    numbers = st.lists(st.floats(0, 100), min_size=4, max_size=4)
    losses = np.sort(np.array(data.draw(st.lists(numbers, min_size=count, max_size=count))), axis=1)[:, ::-1]
    widths = np.array(data.draw(st.lists(st.sampled_from([8.0, 16.0]), min_size=count, max_size=count)))
    costs = widths[:, None] * np.arange(1.0, 5.0)
    base = np.array(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)), dtype=np.int8)
    ends = np.cumsum([0, *sizes])
    members = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
    found = paired(base, losses, costs, members)
    assert (np.abs(found.astype(int) - base) <= 1).all()
    for units in members:
        assert found[units].sum() == base[units].sum()
        assert total(costs[units], found[units]) <= total(costs[units], base[units])
    assert total(losses, found) <= total(losses, base) + 1e-9
