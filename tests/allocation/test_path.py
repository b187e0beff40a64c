"""Steepest paths and exact choices: budgets kept, more never worse, within 0.3 % of the optimum."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquilt.allocation import exact
from bitquilt.allocation.exact import exact_choices
from bitquilt.allocation.path import fill, steepest, steepest_up_to
from bitquilt.allocation.scopes import order_steps
from bitquilt.core.budget import SCOPES


def total(table, choices):
    return float(table[np.arange(len(table)), choices].sum())


@st.composite
def menus(draw, units=st.integers(1, 7), choices=st.integers(1, 4)):
    count, width = draw(units), draw(choices)
    numbers = st.floats(0, 1e3, allow_nan=False)
    losses = np.array(draw(st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=count, max_size=count)))
    steps = st.lists(st.integers(1, 50), min_size=width, max_size=width)
    costs = np.cumsum(draw(st.lists(steps, min_size=count, max_size=count)), axis=1).astype(float)
    return losses, costs


def brute(losses, costs, budget):
    return min(
        total(losses, np.array(c))
        for c in itertools.product(range(losses.shape[1]), repeat=len(losses))
        if total(costs, np.array(c)) <= budget
    )


@given(menus(), st.floats(0, 1), st.integers(0, 3))
def test_exact_choices_are_optimal_and_within_the_budget(menu, share, shift):
    losses, costs = menu
    losses, costs = losses - 50 * shift, costs // (1 + shift)  # negative losses, equal costs
    budget = costs[:, 0].sum() + share * (costs[:, -1] - costs[:, 0]).sum()
    chosen = exact_choices(losses, costs, budget)
    assert total(costs, chosen) <= budget
    assert total(losses, chosen) == pytest.approx(brute(losses, costs, budget), rel=1e-12, abs=1e-9)


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=6), st.integers(0, 18))
def test_lower_choices_of_later_units_win_a_tie(table, budget):
    losses, costs = np.array(table, dtype=float), np.tile([0.0, 1.0, 3.0], (len(table), 1))
    fitting = [c for c in itertools.product(range(3), repeat=len(table)) if total(costs, np.array(c)) <= budget]
    wanted = min(fitting, key=lambda c: (total(losses, np.array(c)), c[::-1]))
    assert exact_choices(losses, costs, budget).tolist() == list(wanted)


def test_too_many_states_end_in_the_filled_path(monkeypatch):
    losses, costs = realistic(50, 1)
    least = costs[:, 0].sum()
    filled = fill(steepest(losses, costs), least)
    assert total(losses, exact_choices(losses, costs, 2 * least)) < total(losses, filled)
    monkeypatch.setattr(exact, "_MOST_STATES", 100)
    assert exact_choices(losses, costs, 2 * least).tolist() == filled.tolist()


@given(menus(), st.floats(0, 1), st.floats(0, 1))
def test_filling_keeps_budgets_and_more_is_never_worse(menu, one, other):
    losses, costs = menu
    path = steepest(losses, costs)
    room = (costs[:, -1] - costs[:, 0]).sum()
    found = []
    for share in sorted((one, other)):
        chosen = fill(path, share * room)
        assert total(costs, chosen) <= costs[:, 0].sum() + share * room + 1e-9
        found.append(total(losses, chosen))
    assert found[1] <= found[0] * (1 + 1e-5) + 1e-9


@given(menus())
def test_a_path_is_what_it_says(menu):
    losses, costs = menu
    path = steepest(losses, costs)
    for steps in range(len(path) + 1):
        chosen = path.at(steps)
        cost = path.cost[steps - 1] if steps else 0.0
        gain = path.gain[steps - 1] if steps else 0.0
        assert total(costs, chosen) - costs[:, 0].sum() == pytest.approx(cost)
        assert losses[:, 0].sum() - total(losses, chosen) == pytest.approx(gain, rel=1e-4, abs=1e-3)
    slopes = np.diff(path.gain, prepend=0) / np.diff(path.cost, prepend=0)
    assert (np.diff(slopes) <= 1e-5 * np.abs(slopes[:-1]) + 1e-9).all()


def realistic(units, seed=0):
    """Losses as tables have them: lognormal over five orders of magnitude, a factor of about four a bit."""
    g = np.random.default_rng(seed)
    scale = np.exp(g.normal(0, 2, (units, 1)))
    fall = np.cumsum(np.log(g.uniform(2.5, 5, (units, 7))), axis=1)
    rows = g.choice([64, 256, 352], (units, 1))
    costs = rows * 32 * np.arange(1.0, 9.0) + rows * 16
    return scale * np.exp(-np.hstack([np.zeros((units, 1)), fall])), costs


@pytest.mark.parametrize(("seed", "share"), [(0, 0.1), (1, 0.3), (2, 0.6)])
def test_filling_is_within_three_permille_of_the_optimum(seed, share):
    losses, costs = realistic(200, seed)
    least = costs[:, 0].sum()
    budget = least + share * (costs[:, -1].sum() - least)
    optimum = total(losses, exact_choices(losses, costs, budget))
    assert optimum <= total(losses, fill(steepest(losses, costs), budget - least)) <= 1.003 * optimum


def test_many_units_take_seconds_not_hours():
    losses, costs = realistic(200_000)
    path = steepest(losses.astype(np.float32), costs.astype(np.float32))
    budget = 0.3 * path.cost[-1]
    chosen = fill(path, budget)
    assert 0.9999 * budget <= total(costs, chosen) - costs[:, 0].sum() <= budget


@pytest.mark.parametrize("scope", [scope for scope in SCOPES if scope != "layers"])
def test_every_scope_starts_low_ends_high_and_pays_for_each_step(scope):
    losses, costs = realistic(40)
    members = [np.arange(0, 8), np.arange(8, 10), np.arange(10, 40)]
    weights = [float(costs[m, 0].sum()) for m in members]
    path = order_steps(scope, losses, costs, members, weights)
    assert (path.at(0) == 0).all()
    assert (path.at(len(path)) == 7).all()
    for steps in range(0, len(path) + 1, 17):
        chosen = path.at(steps)
        spent = path.cost[steps - 1] if steps else 0.0
        assert total(costs, chosen) - costs[:, 0].sum() == pytest.approx(spent)
        if scope == "uniform":
            assert all(np.ptp(chosen[m]) <= 1 for m in members)
        if scope in ("layer", "uniform"):
            shares = [
                (total(costs[m], chosen[m]) - costs[m, 0].sum()) / w for m, w in zip(members, weights, strict=True)
            ]
            assert max(shares) - min(shares) <= 2.1 * max(32 * costs[m].max() / costs[m, 0].sum() / 32 for m in members)


@pytest.mark.parametrize("widest", [1, 4, 7])
def test_nobody_goes_beyond_a_width_before_all_are_there(widest):
    losses, costs = realistic(20)
    path = steepest_up_to(widest, losses, costs)
    assert (path.at(0) == 0).all()
    assert (path.at(len(path)) == 7).all()
    for steps in range(len(path) + 1):
        chosen = path.at(steps)
        assert chosen.max() <= widest or chosen.min() >= widest
        spent = path.cost[steps - 1] if steps else 0.0
        assert total(costs, chosen) - costs[:, 0].sum() == pytest.approx(spent)
    gain = losses[:, 0].sum() - losses[:, 7].sum()
    assert path.gain[-1] == pytest.approx(gain, rel=1e-5)


def test_bad_tables_are_refused():
    losses, costs = realistic(3)
    losses[1, 2] = np.nan
    with pytest.raises(ValueError, match="loss of unit 1 at choice 2 is nan"):
        steepest(losses, costs)
    with pytest.raises(ValueError, match="below"):
        exact_choices(*realistic(3), 1.0)
