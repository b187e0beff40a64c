"""Two widths by trace, and the exact map over any palette: the worked example, budgets, ties."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquilt.allocation.by_trace import by_trace, by_weighted_error

SIZES = {"v": 1, "o": 1, "down": 3, "q": 1, "k": 1, "gate": 3, "up": 3}
TRACES = {name: 10.0 - i for i, name in enumerate(SIZES)}


def codes(sizes, palette=(2, 4)):
    return {name: {b: b * size for b in palette} for name, size in sizes.items()}


def budget(target, sizes):
    return target * sum(sizes.values())


def mean(bits, sizes):
    return sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())


def test_the_worked_example():
    bits = by_trace(TRACES, codes(SIZES), budget(3.0, SIZES))
    assert {name for name, b in bits.items() if b == 4} == {"v", "o", "down", "q"}
    assert mean(bits, SIZES) == pytest.approx(2.923, abs=5e-4)


def test_the_first_that_does_not_fit_ends_the_walk():
    sizes = {"a": 2, "b": 5, "c": 1}
    assert by_trace({"a": 3.0, "b": 2.0, "c": 1.0}, codes(sizes), budget(3.0, sizes)) == {"a": 4, "b": 2, "c": 2}


@pytest.mark.parametrize(("target", "share"), [(2.5, 0.25), (3.0, 0.5), (3.5, 0.75), (3.8, 0.9), (2, 0), (4, 1)])
def test_the_share_of_four_bits(target, share):
    sizes = {f"{i:03d}": 1 for i in range(100)}
    bits = by_trace(dict.fromkeys(sizes, 1.0), codes(sizes), budget(target, sizes))
    assert sum(b == 4 for b in bits.values()) == round(100 * share)
    assert [name for name, b in bits.items() if b == 4] == sorted(sizes)[: round(100 * share)]  # ties by name


@given(st.lists(st.tuples(st.floats(0, 1e9), st.integers(1, 50)), min_size=1, max_size=12), st.floats(2, 4))
def test_never_above_the_target_and_the_exact_map_is_never_worse(layers, target):
    sizes = {f"{i}": size for i, (_, size) in enumerate(layers)}
    traces = {f"{i}": value for i, (value, _) in enumerate(layers)}
    walked = by_trace(traces, codes(sizes), budget(target, sizes))
    assert mean(walked, sizes) <= target + 1e-9
    errors = {name: {2: traces[name], 4: traces[name] / 16} for name in sizes}
    exact = by_weighted_error(errors, codes(sizes), budget(target, sizes))
    assert mean(exact, sizes) <= target + 1e-9

    def objective(bits):
        return sum(errors[name][b] for name, b in bits.items())

    assert objective(exact) <= objective(walked) * (1 + 1e-9) + 1e-9


def test_wider_palettes_use_what_is_left():
    errors = {name: {b: TRACES[name] * 4.0**-b for b in (2, 3, 4)} for name in SIZES}
    bits = by_weighted_error(errors, codes(SIZES, (2, 3, 4)), budget(3.0, SIZES))
    assert mean(bits, SIZES) == 3.0


def test_costs_need_not_be_proportional_to_the_bits():
    """Scales and zeros: a layer of few columns pays more for its first bit."""
    costs = {name: {b: (b + 1) * size + 2 * i for b in (2, 3, 4)} for i, (name, size) in enumerate(SIZES.items())}
    errors = {name: {b: TRACES[name] * 4.0**-b for b in (2, 3, 4)} for name in SIZES}
    least = sum(cost[2] for cost in costs.values())
    losses = []
    for extra in (0, 3, 7, 12, 26):
        bits = by_weighted_error(errors, costs, least + extra)
        assert sum(costs[name][b] for name, b in bits.items()) <= least + extra
        losses.append(sum(errors[name][b] for name, b in bits.items()))
    assert losses == sorted(losses, reverse=True)
    best = min(
        sum(errors[n][b] for n, b in zip(SIZES, chosen, strict=True))
        for chosen in product((2, 3, 4), repeat=len(SIZES))
        if sum(costs[n][b] for n, b in zip(SIZES, chosen, strict=True)) <= least + 12
    )
    assert losses[3] == pytest.approx(best, rel=1e-4)


def test_many_layers_are_planned_without_the_mixed_integer_program():
    sizes = {f"{i:04d}": 1 + i % 7 for i in range(2000)}
    costs = {name: {b: b * size + size % 3 for b in (2, 3, 4)} for name, size in sizes.items()}
    errors = {name: {b: (int(name) % 13) * 4.0**-b for b in (2, 3, 4)} for name in sizes}
    bits = by_weighted_error(errors, costs, budget(3.1, sizes))
    assert sum(costs[name][b] for name, b in bits.items()) <= budget(3.1, sizes)
    assert set(bits.values()) == {2, 3, 4}


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"budget of 19.5 bits is below 26"):
        by_trace(TRACES, codes(SIZES), budget(1.5, SIZES))
    with pytest.raises(ValueError, match="the sensitivity of q is nan"):
        by_trace({**TRACES, "q": float("nan")}, codes(SIZES), budget(3, SIZES))
    with pytest.raises(ValueError, match="the sensitivity of o is inf"):
        by_weighted_error(
            {**{n: {2: 1.0, 4: 0.5} for n in SIZES}, "o": {2: float("inf"), 4: 1}}, codes(SIZES), budget(3, SIZES)
        )
