"""Loss against bits, on the same fitter."""

import numpy as np
import pytest

from bitquilt.errors import UserError
from bitquilt.laws import BpwLaw

TRUE = BpwLaw(E=2.2, A=9.0, k=1.8)
BITS = np.array([2.1, 2.5, 3.1, 3.6, 4.1, 5.0, 6.0, 8.0])


def test_recovers_exact_and_noisy_losses() -> None:
    exact = BpwLaw.fit(BITS, TRUE.predict(BITS), draws=0)
    np.testing.assert_allclose([exact.E, exact.A, exact.k], [2.2, 9.0, 1.8], rtol=1e-5)
    noisy = TRUE.predict(BITS) * np.exp(0.001 * np.random.default_rng(0).standard_normal(len(BITS)))
    answer = BpwLaw.fit(BITS, noisy, draws=60).interval([2.3, 4.5])
    np.testing.assert_allclose(answer.loss, TRUE.predict([2.3, 4.5]), atol=0.01)
    assert (answer.low < answer.loss).all()
    assert (answer.loss < answer.high).all()


def test_the_inverse_gives_the_bits_back() -> None:
    assert TRUE.bpw_for(float(TRUE.predict(3.3))) == pytest.approx(3.3)
    with pytest.raises(UserError, match=r"tends to 2.2000 at many bits"):
        TRUE.bpw_for(2.2)


def test_two_points_suffice_beside_the_full_precision_loss() -> None:
    law = BpwLaw.fit([2.5, 4.0], TRUE.predict([2.5, 4.0]), full_precision_loss=2.2, draws=0)
    assert float(law.predict(3.0)) == pytest.approx(float(TRUE.predict(3.0)), abs=1e-6)
    unsure = BpwLaw.fit([2.5, 4.0], TRUE.predict([2.5, 4.0]), draws=0)
    assert unsure.report is not None
    assert any("2 different bpw for 3 parameters" in note for note in unsure.report.warnings)


@pytest.mark.parametrize(
    ("bpw", "loss", "message"),
    [
        ([2, 3], [2.0], "equally long"),
        ([2, 40], [2.0, 2.0], "row 2: bpw is 40"),
        ([2, 3], [2.0, -1.0], "row 2: loss is -1"),
        ([3, 3], [2.0, 2.1], "one bpw"),
    ],
)
def test_bad_points(bpw: list[float], loss: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BpwLaw.fit(bpw, loss)
