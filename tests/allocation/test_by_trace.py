"""Two widths by trace, and the exact map over any palette: the worked example, budgets, ties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquilt.allocation.by_trace import by_trace, by_weighted_error

SIZES = {"v": 1, "o": 1, "down": 3, "q": 1, "k": 1, "gate": 3, "up": 3}
TRACES = {name: 10.0 - i for i, name in enumerate(SIZES)}


def mean(bits, sizes):
    return sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())


def test_the_worked_example():
    bits = by_trace(TRACES, SIZES, 3.0, 2, 4)
    assert {name for name, b in bits.items() if b == 4} == {"v", "o", "down", "q"}
    assert mean(bits, SIZES) == pytest.approx(2.923, abs=5e-4)


def test_the_first_that_does_not_fit_ends_the_walk():
    sizes = {"a": 2, "b": 5, "c": 1}
    assert by_trace({"a": 3.0, "b": 2.0, "c": 1.0}, sizes, 3.0, 2, 4) == {"a": 4, "b": 2, "c": 2}


@pytest.mark.parametrize(("target", "share"), [(2.5, 0.25), (3.0, 0.5), (3.5, 0.75), (3.8, 0.9), (2, 0), (4, 1)])
def test_the_share_of_four_bits(target, share):
    sizes = {f"{i:03d}": 1 for i in range(100)}
    bits = by_trace(dict.fromkeys(sizes, 1.0), sizes, target, 2, 4)
    assert sum(b == 4 for b in bits.values()) == round(100 * share)
    assert [name for name, b in bits.items() if b == 4] == sorted(sizes)[: round(100 * share)]  # ties by name


@given(st.lists(st.tuples(st.floats(0, 1e9), st.integers(1, 50)), min_size=1, max_size=12), st.floats(2, 4))
def test_never_above_the_target_and_the_exact_map_is_never_worse(layers, target):
    sizes = {f"{i}": size for i, (_, size) in enumerate(layers)}
    traces = {f"{i}": value for i, (value, _) in enumerate(layers)}
    walked = by_trace(traces, sizes, target, 2, 4)
    assert mean(walked, sizes) <= target + 1e-9
    errors = {name: {2: traces[name], 4: traces[name] / 16} for name in sizes}
    exact = by_weighted_error(errors, sizes, target, (2, 4))
    assert mean(exact, sizes) <= target + 1e-9

    def objective(bits):
        return sum(errors[name][b] for name, b in bits.items())

    assert objective(exact) <= objective(walked) * (1 + 1e-9) + 1e-9


def test_wider_palettes_use_what_is_left():
    errors = {name: {b: TRACES[name] * 4.0**-b for b in (2, 3, 4)} for name in SIZES}
    bits = by_weighted_error(errors, SIZES, 3.0, (2, 3, 4))
    assert mean(bits, SIZES) == 3.0


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"bits is 1\.5; widths of 2 to 4"):
        by_trace(TRACES, SIZES, 1.5, 2, 4)
    with pytest.raises(ValueError, match="the sensitivity of q is nan"):
        by_trace({**TRACES, "q": float("nan")}, SIZES, 3, 2, 4)
    with pytest.raises(ValueError, match="the sensitivity of o is inf"):
        by_weighted_error({**{n: {2: 1.0, 4: 0.5} for n in SIZES}, "o": {2: float("inf"), 4: 1}}, SIZES, 3, (2, 4))
