"""Fits: published points within the published tolerances, synthetic data recovered, doubts named."""

import warnings

import numpy as np
import pytest

from bitquilt.errors import UserError
from bitquilt.laws import DCPTLaw, LawWarning, Runs, cross_validate, goodness
from bitquilt.laws.axes import identify
from tests.laws.published import (
    REPLAY_NEW,
    REPLAY_OLD,
    TRUE_LAW,
    chemistry_domain,
    chemistry_general,
    cmr,
    replay,
    synthetic,
)


def errors(law: DCPTLaw, runs: Runs) -> float:
    return goodness(runs.loss, law.value(runs.n, runs.d, runs.ratio)).max_error


@pytest.mark.parametrize(
    ("runs", "tolerance"),
    [
        pytest.param(chemistry_general(), 5.5e-3, id="chemistry-general"),
        pytest.param(chemistry_domain(), 2e-3, id="chemistry-domain"),
        pytest.param(cmr(), 1e-2, id="cmr"),
        pytest.param(replay(REPLAY_OLD, old=True), 5e-3, id="replay-old"),
        pytest.param(replay(REPLAY_NEW, old=False), 1e-2, id="replay-new"),
    ],
)
def test_published_points_are_fitted(runs: Runs, tolerance: float) -> None:
    assert errors(DCPTLaw.fit(runs, starts=15, draws=0), runs) <= tolerance


def test_published_ratio_held_out() -> None:
    runs = cmr()
    held = runs.ratio == 0.25
    law, tested = DCPTLaw.fit(runs.where(~held), starts=20, draws=0), runs.where(held)
    found = goodness(tested.loss, law.value(tested.n, tested.d, tested.ratio))
    assert found.max_error <= 1.5e-2
    assert found.r2 >= 0.99


def test_published_size_held_out() -> None:
    runs = cmr()
    held = runs.n == 3.1
    assert errors(DCPTLaw.fit(runs.where(~held), starts=20, draws=0), runs.where(held)) <= 3.5e-2


def test_synthetic_data_are_recovered_also_far_outside() -> None:
    runs = synthetic()
    law = DCPTLaw.fit(runs, starts=20, draws=0)
    assert errors(law, runs) < 1e-6
    with pytest.warns(LawWarning, match=r"extrapolates in D .*asked 59, fitted on 1 to 26"):
        far = law.predict(7.0, 59.0, 0.5)
    assert float(far) == pytest.approx(float(TRUE_LAW.value(7.0, 59.0, 0.5)), abs=1e-6)


def test_units_and_order_of_the_points_do_not_matter() -> None:
    runs = synthetic(tokens=(1.0, 3.0, 9.0), ratios=(0.0, 0.2, 0.5, 0.8, 1.0), noise=0.003)
    law = DCPTLaw.fit(runs, starts=10, draws=0)
    shuffled = DCPTLaw.fit(runs.where(np.random.default_rng(1).permutation(len(runs))), starts=10, draws=0)
    tiny = Runs.of(runs.n * 1e-5, runs.d * 1e-4, runs.ratio, runs.loss)
    small = DCPTLaw.fit(tiny, starts=10, draws=0)
    expected = law.value(runs.n, runs.d, runs.ratio)
    np.testing.assert_allclose(shuffled.value(runs.n, runs.d, runs.ratio), expected, atol=1e-4)
    np.testing.assert_allclose(small.value(tiny.n, tiny.d, tiny.ratio), expected, atol=1e-4)


def test_one_ratio_is_chinchilla_exactly() -> None:
    runs = synthetic(sizes=(0.5, 1.0, 1.8, 4.0), ratios=(0.5,))
    law = DCPTLaw.fit(runs, starts=20, draws=0)
    assert errors(law, runs) < 1e-6
    assert (law.C, law.eta) == (0.0, 0.0)
    with pytest.raises(UserError, match=r"one ratio only: got 0.6, wanted 0.5"):
        law.predict(1.0, 2.0, 0.6)


def test_an_outlier_does_not_move_the_fit() -> None:
    runs = synthetic(tokens=(1.0, 3.0, 9.0), ratios=(0.0, 0.2, 0.5, 0.8, 1.0))
    loss = runs.loss.copy()
    loss[7] *= 1.5
    law = DCPTLaw.fit(Runs.of(runs.n, runs.d, runs.ratio, loss), starts=20, draws=0)
    clean = np.delete(np.arange(len(runs)), 7)
    assert errors(law, runs.where(clean)) < 2e-3


def test_a_diverging_start_is_skipped() -> None:
    """Losses a thousand times too large lie outside every bound; the fit still ends, badly, and says so."""
    runs = synthetic(sizes=(1.0,), tokens=(1.0,))
    law = DCPTLaw.fit(Runs.of(runs.n, runs.d, runs.ratio, runs.loss * 1e3), starts=5, draws=0)
    assert law.report is not None
    assert any("on the bound" in note for note in law.report.warnings)


@pytest.mark.parametrize(
    ("sizes", "tokens", "ratios", "named"),
    [
        ((1.0, 2.0), (1.0, 2.0, 4.0), (0.0, 0.2, 0.5, 1.0), "2 model sizes, wanted at least 3: alpha"),
        ((1.0,), (1.0, 2.0, 4.0), (0.0, 0.2, 0.5, 1.0), "A and alpha cannot be identified"),
        ((1.0, 2.0, 4.0), (1.0, 2.0), (0.0, 0.2, 0.5, 1.0), "2 token counts, wanted at least 3: beta"),
        ((1.0, 2.0, 4.0), (2.0,), (0.0, 0.2, 0.5, 1.0), "beta cannot be identified"),
        ((1.0, 2.0, 4.0), (1.0, 2.0, 4.0), (0.5,), "eta, C, eps and gamma cannot be identified"),
        ((1.0, 2.0, 4.0), (1.0, 2.0, 4.0), (0.2, 0.5, 1.0), "3 ratios, wanted at least 4: eta, C, eps"),
        ((1.0, 2.0), (1.0, 2.0), (0.0, 1.0), "8 points for 9 free parameters"),
    ],
)
def test_what_data_cannot_identify_is_named(
    sizes: tuple[float, ...], tokens: tuple[float, ...], ratios: tuple[float, ...], named: str
) -> None:
    assert any(named in doubt for doubt in identify(synthetic(sizes, ratios, tokens)).warnings)


def test_good_data_raise_no_doubt() -> None:
    assert identify(synthetic()).warnings == ()


def test_predictions_along_a_dropped_axis_are_refused() -> None:
    law = DCPTLaw.fit(chemistry_general(), starts=10, draws=0)
    assert float(law.predict(1.8, 10.0, 0.076)) == pytest.approx(2.9445, abs=5e-3)
    with pytest.raises(UserError, match=r"one N .* only: got 4, wanted 1.8"):
        law.predict(4.0, 10.0, 0.076)
    with pytest.raises(UserError, match=r"one D .* only: got 20, wanted 10"):
        law.predict(1.8, 20.0, 0.076)


def test_inside_the_data_nothing_warns() -> None:
    law = DCPTLaw.fit(synthetic(tokens=(1.0, 4.0, 16.0)), starts=10, draws=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        law.predict(8.0, 32.0, np.linspace(0, 1, 5))  # twice the largest is still inside
        with pytest.raises(LawWarning, match="extrapolates in N"):
            law.predict(8.1, 4.0, 0.5)


def test_fewer_points_than_parameters_give_the_spread_of_the_starts() -> None:
    runs = synthetic((1.0, 2.0), (0.0, 1.0), (1.0, 2.0), noise=0.01)
    answer = DCPTLaw.fit(runs, starts=40).interval(1.5, 1.5, 0.5)
    assert "the spread of the best starts" in " ".join(answer.warnings)
    assert answer.low <= answer.loss <= answer.high
    assert answer.high - answer.low == pytest.approx(answer.spread)
    assert answer.spread > 1e-3


@pytest.mark.parametrize(
    ("n", "d", "r", "message"),
    [
        (1.0, 1.0, 1.2, "ratio is 1.2, wanted a share between 0 and 1"),
        (0.0, 1.0, 0.5, "N is 0, wanted a number above 0"),
        (1.0, float("nan"), 0.5, "D is nan"),
    ],
)
def test_impossible_points_are_refused(n: float, d: float, r: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TRUE_LAW.predict(n, d, r)


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(UserError, match=r"parameter beta .* is -0\.1"):
        DCPTLaw(**{**TRUE_LAW.parameters, "beta": -0.1})


def test_several_domains_or_constant_data_are_refused() -> None:
    with pytest.raises(UserError, match="got a, b; fit each"):
        DCPTLaw.fit(Runs.of([1, 2], [1, 2], [0, 1], [2, 3], ["a", "b"]))
    with pytest.raises(UserError, match="nothing varies in the 4 points"):
        DCPTLaw.fit(Runs.of([1] * 4, [1] * 4, [0.5] * 4, [2.0] * 4))


def test_cross_validation_splits_as_published_and_notices_a_law_that_does_not_hold() -> None:
    runs = synthetic((0.5, 1.8, 4.0), (0.1, 0.3, 0.5, 0.7, 1.0), (1.0, 3.0, 9.0))
    assert cross_validate(runs, "d", starts=3).max_error < 0.05
    ratios = cross_validate(runs, "ratio", starts=3)
    assert [split.held_out for split in ratios.splits] == [(0.1,), (0.3,), (0.5,), (0.7,), (1.0,)]
    # Only the ratio below all others is an extrapolation; between them the law is known.
    assert all(split.goodness.max_error < 1e-3 for split in ratios.splits[1:])
    odd = Runs.of(runs.n, runs.d, runs.ratio, runs.loss + 0.3 * np.sin(20 * runs.ratio))
    assert cross_validate(odd, "ratio", starts=3).max_error > 0.1
    with pytest.raises(UserError, match="over n leaves values out: got 2"):
        cross_validate(runs.where(runs.n < 4), "n")


def test_nine_ratios_give_36_splits() -> None:
    from bitquilt.laws.validate import _parts

    assert len(_parts("ratio", np.linspace(0, 1, 9))) == 36
