"""Do the intervals cover? Counted over seeds, with limits that a wrong scale fails on either side."""

import numpy as np
import pytest

from bitquilt.laws import DCPTLaw, Prediction, Runs
from bitquilt.laws.bootstrap import estimate_noise
from tests.laws.published import TRUE_LAW, synthetic

SEEDS = 12
ASKED = np.array([(1.8, 2.0, 0.15), (1.8, 5.0, 0.4), (1.8, 12.0, 0.6), (1.8, 20.0, 0.9)])


@pytest.fixture(scope="module")
def answers() -> list[Prediction]:
    """90 % intervals of fits to fresh noise, one for each seed."""
    found = []
    for seed in range(SEEDS):
        runs = synthetic((1.8,), (0.0, 0.1, 0.25, 0.5, 0.75, 1.0), (1.0, 2.0, 4.0, 8.0, 24.0), 0.004, seed)
        found.append(DCPTLaw.fit(runs, starts=2, draws=40, seed=seed).interval(*ASKED.T, level=0.9))
    return found


def coverage(answers: list[Prediction], widen: float = 1.0) -> float:
    """Share of the true values inside the intervals, made `widen` times as wide, over seeds and points."""
    truth = TRUE_LAW.value(*ASKED.T)
    inside = [
        (answer.loss + widen * (answer.low - answer.loss) <= truth)
        & (truth <= answer.loss + widen * (answer.high - answer.loss))
        for answer in answers
    ]
    return float(np.mean(inside))


def test_intervals_cover_at_their_rate(answers: list[Prediction]) -> None:
    """48 answers, about 24 of them independent: 0.9 +- 0.12 is two standard deviations."""
    assert 0.78 <= coverage(answers) <= 0.99


def test_the_count_notices_intervals_of_half_or_twice_the_width(answers: list[Prediction]) -> None:
    assert coverage(answers, widen=0.5) < 0.8
    assert coverage(answers, widen=2.0) > 0.99


def test_noise_is_split_between_runs_and_points() -> None:
    generator = np.random.default_rng(0)
    runs = np.repeat(np.arange(200), 10)
    residual = 0.004 * generator.standard_normal(200)[runs] + 0.002 * generator.standard_normal(2000)
    noise = estimate_noise(residual, runs, free=9)
    assert noise.run == pytest.approx(0.004, rel=0.15)
    assert noise.point == pytest.approx(0.002, rel=0.1)
    alone = estimate_noise(residual, np.arange(2000), free=9)
    assert alone.run == 0.0
    assert alone.point == pytest.approx(np.hypot(0.004, 0.002), rel=0.1)


def test_an_outlier_does_not_blow_the_noise_up() -> None:
    residual = 0.002 * np.random.default_rng(0).standard_normal(100)
    residual[3] = 1.0
    assert estimate_noise(residual, np.arange(100), free=9).point < 0.004


def test_same_seed_same_intervals() -> None:
    runs = synthetic((1.8,), (0.0, 0.25, 0.5, 1.0), (1.0, 4.0, 16.0), 0.004)
    first, again, other = (DCPTLaw.fit(runs, starts=4, draws=5, seed=s).report for s in (1, 1, 2))
    assert first is not None
    assert again is not None
    assert other is not None
    np.testing.assert_array_equal(first.bootstrap, again.bootstrap)
    assert (first.bootstrap != other.bootstrap).any()


def test_a_bootstrap_refit_is_a_law_of_its_own_data() -> None:
    runs = Runs.of([1.8] * 6, [10.0] * 6, np.linspace(0, 1, 6), TRUE_LAW.value(1.8, 10.0, np.linspace(0, 1, 6)))
    report = DCPTLaw.fit(runs, starts=4).report
    assert report is not None
    assert report.bootstrap.shape == (0, 9)  # six points, six parameters: no residuals to speak of
