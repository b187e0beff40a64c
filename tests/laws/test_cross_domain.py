"""One law over several domains predicts another from its first steps."""

import numpy as np
import pytest

from bitquilt.errors import UserError
from bitquilt.laws import CrossDomainLaw, Runs, early_signals
from bitquilt.laws.cross_domain import NAMES, _form
from bitquilt.laws.formula import NAMES as BASE_NAMES

TRUE = CrossDomainLaw(
    E=0.6, A=0.3, alpha=0.3, B=0.2, beta=0.3, eta=0.8, C=0.3, eps=0.1, gamma=0.4, F=0.4, mu=0.9, w1=1.5, w2=0.6
)
SIGNALS = {"code": (1.8, 0.9), "law": (2.4, 0.7), "music": (2.9, 1.4), "maths": (2.1, 0.3), "medicine": (2.6, 1.0)}
UNSEEN = {"chemistry": (2.3, 0.8), "history": (2.7, 0.6)}


def runs(noise: float = 0.0) -> Runs:
    generator = np.random.default_rng(0)
    rows = [
        (n, d, r, name, *signals)
        for name, signals in SIGNALS.items()
        for n in (0.5, 1.8, 4.0)
        for d in (1.0, 4.0, 16.0)
        for r in (0.0, 0.3, 0.6, 1.0)
    ]
    n, d, r, names, k1, k2 = zip(*rows, strict=True)
    loss = TRUE.predict(n, d, r, k1, k2) * np.exp(noise * generator.standard_normal(len(n)))
    return Runs.of(n, d, r, loss, names, k1, k2)


def test_an_unseen_domain_is_predicted_from_its_first_steps() -> None:
    law = CrossDomainLaw.fit(runs(noise=0.002), starts=15, draws=0)
    for k1, k2 in UNSEEN.values():
        found = law.predict(1.8, 8.0, np.array([0.1, 0.5, 0.9]), k1, k2)
        np.testing.assert_allclose(found, TRUE.predict(1.8, 8.0, np.array([0.1, 0.5, 0.9]), k1, k2), atol=0.02)
    # The check above could pass by ignoring K: the domains differ by far more than its tolerance.
    losses = [float(TRUE.predict(1.8, 8.0, 0.5, *signals)[0]) for signals in SIGNALS.values()]
    assert max(losses) - min(losses) > 0.1


def test_easier_domains_have_larger_k_and_lower_loss() -> None:
    assert TRUE.learnability(1.8, 0.9) > TRUE.learnability(2.4, 0.9)
    assert TRUE.learnability(2.0, 0.9) > TRUE.learnability(2.0, 0.5)
    assert TRUE.predict(1.0, 1.0, 0.5, 1.8, 0.9) < TRUE.predict(1.0, 1.0, 0.5, 2.4, 0.5)


def test_slopes_are_finite_differences() -> None:
    form = _form(BASE_NAMES)
    x = np.array([[1.8, 10.0, 0.5, 2.0, 0.7], [0.5, 1.0, 0.0, 2.5, 0.0]])
    slopes = form.evaluate(TRUE.theta, x)[1]
    for i, name in enumerate(NAMES):
        step = np.zeros(len(NAMES))
        step[i] = 1e-6
        up, down = (form.evaluate(TRUE.theta * np.exp(sign * step), x)[0] for sign in (1, -1))
        np.testing.assert_allclose(slopes[:, i], (up - down) / 2e-6, atol=1e-7, err_msg=name)


def test_early_signals() -> None:
    k1, k2 = early_signals([0.0, 0.25, 1.0], [3.0, 2.6, 2.2], total=10.0)  # 5 % is 0.5, between the two
    assert k1 == 3.0
    assert k2 == pytest.approx((3.0 - (2.6 - 0.4 / 3)) / 0.5)
    with pytest.raises(UserError, match=r"evaluations from 0 to 0.5e9 tokens"):
        early_signals([0.1, 1.0], [3.0, 2.0], total=10.0)
    with pytest.raises(UserError, match="evaluations from 0"):
        early_signals([0.0, 0.2], [3.0, 2.0], total=10.0)


def test_what_it_cannot_be_fitted_on() -> None:
    with pytest.raises(UserError, match="needs the columns k1 and k2"):
        CrossDomainLaw.fit(Runs.of([1, 2], [1, 2], [0, 1], [2, 3]))
    with pytest.raises(UserError, match="nothing tells the domains apart"):
        CrossDomainLaw.fit(Runs.of([1, 2], [1, 2], [0, 1], [2, 3], "a", [2, 2], [1, 1]))
    with pytest.raises(UserError, match="k2 not below 0"):
        TRUE.predict(1.0, 1.0, 0.5, 2.0, -1.0)
