"""The formula itself: values, slopes and the signs the publication demands."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquilt.laws.dcpt import DCPTLaw
from bitquilt.laws.formula import NAMES, derivatives, slopes_by_log, terms
from tests.laws.published import TRUE_LAW

EXPONENT = st.floats(0.05, 3.0)
SIZE = st.floats(0.01, 5.0)
THETA = st.tuples(SIZE, SIZE, EXPONENT, SIZE, EXPONENT, EXPONENT, SIZE, st.floats(1e-3, 0.9), EXPONENT).map(np.array)
POINT = st.tuples(st.floats(0.1, 50.0), st.floats(0.1, 50.0), st.floats(0.05, 1.0)).map(
    lambda point: tuple(np.array([value]) for value in point)
)


def test_known_values() -> None:
    values = TRUE_LAW.value(1.8, 10.0, np.array([0.5, 0.0, 1.0]))
    np.testing.assert_allclose(values, [2.506257, 3.091278, 2.416869], atol=1e-6)
    parts = terms(TRUE_LAW.theta, np.array([1.8]), np.array([10.0]), np.array([0.5]))
    np.testing.assert_allclose(np.concatenate(parts), [1.5, 0.335335, 0.057571, 0.613352], atol=1e-6)


@given(THETA, POINT)
def test_slopes_are_finite_differences(theta: np.ndarray, point: tuple[np.ndarray, ...]) -> None:
    step = 1e-5
    slopes = slopes_by_log(theta, *point)[1][0]
    for i, name in enumerate(NAMES):
        up, down = theta.copy(), theta.copy()
        up[i] *= np.exp(step)
        down[i] *= np.exp(-step)
        numeric = (sum(terms(up, *point)) - sum(terms(down, *point)))[0] / (2 * step)
        assert slopes[i] == pytest.approx(numeric, rel=1e-4, abs=1e-6 * sum(terms(theta, *point))[0]), name


def test_slopes_at_ratio_zero_are_finite() -> None:
    value, slopes = slopes_by_log(TRUE_LAW.theta, np.array([1.8]), np.array([10.0]), np.array([0.0]))
    assert value[0] == pytest.approx(3.091278, abs=1e-6)
    assert slopes[0, NAMES.index("eta")] == 0.0
    assert np.isfinite(slopes).all()


@given(THETA, POINT)
def test_positive_parameters_give_the_signs(theta: np.ndarray, point: tuple[np.ndarray, ...]) -> None:
    found = derivatives(theta, *point)
    for name in ("dL/dN", "dL/dD", "d2L/dDdr"):
        assert found[name][0] < 0, name


@given(THETA, POINT)
def test_derivatives_are_finite_differences(theta: np.ndarray, point: tuple[np.ndarray, ...]) -> None:
    found = derivatives(theta, *point)
    scale = sum(terms(theta, *point))[0]
    for i, name in enumerate(("dL/dN", "dL/dD", "dL/dr")):
        step = 1e-5 * point[i]
        up, down = list(point), list(point)
        up[i], down[i] = point[i] + step, point[i] - step
        numeric = ((sum(terms(theta, *up)) - sum(terms(theta, *down))) / (2 * step))[0]
        assert found[name][0] == pytest.approx(numeric, rel=1e-3, abs=1e-6 * scale / point[i][0]), name


@given(POINT, st.floats(0.01, 100.0))
def test_units_do_not_matter(point: tuple[np.ndarray, ...], unit: float) -> None:
    """N times u with A times u^alpha, and D likewise, leave the loss alone."""
    n, d, r = point
    p = TRUE_LAW.parameters
    scaled = DCPTLaw(**{**p, "A": p["A"] * unit ** p["alpha"], "B": p["B"] * unit ** p["beta"]})
    np.testing.assert_allclose(scaled.value(n * unit, d * unit, r), TRUE_LAW.value(n, d, r), rtol=1e-12)


def test_check_holds_for_a_sound_law_and_finds_a_bad_one() -> None:
    sound = {sign.derivative: sign for sign in TRUE_LAW.check()}
    assert all(sound[name].holds for name in ("dL/dN", "dL/dD", "d2L/dDdr"))
    bad = DCPTLaw(**{**TRUE_LAW.parameters, "B": 3.0, "C": 0.01})
    rising = next(sign for sign in bad.check() if sign.derivative == "dL/dr")
    assert not rising.holds
    assert rising.worst > 0
    assert 0 < rising.failing <= 1
    assert derivatives(bad.theta, *(np.array([v]) for v in rising.at))["dL/dr"][0] == pytest.approx(rising.worst)
