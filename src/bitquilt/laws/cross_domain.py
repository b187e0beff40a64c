"""The Cross-Domain D-CPT Law (arXiv 2406.01375, section 3): `CrossDomainLaw` predicts a NEW domain from a short run.

    L = E + A N^-alpha + B r^eta D^-beta + C (r + eps)^-gamma + F K^-mu,      K = w1 / k1 + w2 k2

K is the learnability of a domain: k1 its early validation loss (nats per token), k2 its early rate of decrease
(nats per 1e9 tokens). Fitted over several domains, it predicts another from k1 and k2 alone, which cost 5 % of one
run. A domain that starts lower or falls faster has the larger K and the lower loss.

Deviations: the windows of k1 and k2 are ours (`early_signals`); w1 and w2 are returned scaled so that K has the
geometric mean 1 over the fitted points, as F absorbs any common factor.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bitquilt.errors import UserError
from bitquilt.laws import formula
from bitquilt.laws.axes import LawWarning, identify, notes_on
from bitquilt.laws.data import Runs
from bitquilt.laws.dcpt import check_points, unit_scale
from bitquilt.laws.fit import HUBER_DELTA, Array, Form, geometric_mean
from bitquilt.laws.summary import FitSettings, FittedLaw, Points, Prediction, fit_points, predict_with

_BASE = len(formula.NAMES)
NAMES = (*formula.NAMES, "F", "mu", "w1", "w2")
EARLY = 0.05  # of the run: the window of k2
_EXTRA_LOWER = (1e-5, 0.02, 1e-4, 1e-4)
_EXTRA_UPPER = (10.0, 6.0, 10.0, 10.0)


def early_signals(tokens: ArrayLike, losses: ArrayLike, total: float) -> tuple[float, float]:
    """Return (k1, k2) of a domain from the first validation losses of a run of `total` tokens (both in 1e9).

    k1 is the loss before training (`tokens[0]` = 0), k2 = (k1 - loss at 5 % of the run) / (0.05 total), with losses
    interpolated between evaluations. Raises UserError when the evaluations do not reach that far.
    """
    at, loss = np.asarray(tokens, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(at) < 2 or at[0] != 0 or at[-1] < EARLY * total:
        raise UserError(
            f"the early signals need evaluations from 0 to {EARLY * total:g}e9 tokens: got {at.tolist()}; evaluate "
            "before training and once at 5 % of the run"
        )
    k1 = float(loss[0])
    return k1, (k1 - float(np.interp(EARLY * total, at, loss))) / (EARLY * total)


@dataclass(frozen=True)
class CrossDomainLaw(FittedLaw):
    """The thirteen parameters, for N and D in 1e9, k1 in nats per token, k2 in nats per 1e9 tokens."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    eta: float
    C: float
    eps: float
    gamma: float
    F: float
    mu: float
    w1: float
    w2: float

    @staticmethod
    def fit(
        runs: Runs, *, starts: int = 60, seed: int = 0, delta: float = HUBER_DELTA, draws: int = 50
    ) -> "CrossDomainLaw":
        """Fit the runs of several domains at once; every point needs k1 and k2.

        Raises UserError when they are missing, negative, or the same in every domain.
        """
        k1, k2 = _signals(runs)
        axes = identify(runs)
        kinds = len(set(zip(k1.tolist(), k2.tolist(), strict=True)))
        if kinds < 2:
            raise UserError(
                "every point has the same k1 and k2: nothing tells the domains apart; fit several domains (the paper: "
                "4), or one with DCPTLaw"
            )
        doubts = list(axes.warnings)
        if kinds < 4:
            doubts.append(f"{kinds} different (k1, k2), wanted at least 4: F, mu, w1 and w2 cannot be told apart")
        units = (geometric_mean(k1), float(k2.mean()) or 1.0)
        scale = (*unit_scale(runs), 1.0, *units)
        x = np.column_stack([runs.x, k1, k2]) / np.array(scale)
        theta, report = fit_points(
            _form(axes.free),
            Points(x, runs.loss, runs.run, axes.ranges, axes.dropped, runs.sha256),
            FitSettings(starts, draws, seed, delta),
            full=lambda free: _to_units(free, axes.free, scale, k1, k2),
            value=lambda theta: _value(theta, runs.n, runs.d, runs.ratio, k1, k2),
            doubts=doubts,
        )
        return CrossDomainLaw(*theta.tolist(), report=report)

    def learnability(self, k1: ArrayLike, k2: ArrayLike) -> Array:
        """K of a domain; a larger K means a lower loss."""
        return np.asarray(self.w1 / np.asarray(k1, dtype=np.float64) + self.w2 * np.asarray(k2, dtype=np.float64))

    def predict(self, n: ArrayLike, d: ArrayLike, r: ArrayLike, k1: ArrayLike, k2: ArrayLike) -> Array:
        """Predict the loss at N, D (1e9) and ratio r of a domain with the early signals k1, k2, broadcast together.

        Raises UserError like `DCPTLaw.predict`, and for k1 <= 0 or k2 < 0; warns with `LawWarning` far outside.
        """
        inputs = _inputs(n, d, r, k1, k2)
        for note in notes_on(self.report, n=inputs[0], d=inputs[1], ratio=inputs[2]):
            warnings.warn(note, LawWarning, stacklevel=2)
        return _value(self.theta, *inputs)

    def interval(
        self, n: ArrayLike, d: ArrayLike, r: ArrayLike, k1: ArrayLike, k2: ArrayLike, level: float = 0.9
    ) -> Prediction:
        """Predict with the uncertainty at `level`; the warnings are part of the result."""
        inputs = _inputs(n, d, r, k1, k2)
        notes = notes_on(self.report, n=inputs[0], d=inputs[1], ratio=inputs[2])
        return predict_with(self.report, self.theta, lambda theta: _value(theta, *inputs), level, notes)


def _inputs(*columns: ArrayLike) -> tuple[Array, ...]:
    """N, D, r, k1, k2 as arrays of one shape, at least 1-D. Raises UserError for impossible values."""
    inputs = np.broadcast_arrays(*(np.atleast_1d(np.asarray(column, dtype=np.float64)) for column in columns))
    check_points(*inputs[:3])
    _check_signals(inputs[3], inputs[4])
    return tuple(inputs)


def _form(free: tuple[str, ...]) -> Form:
    """The form for the fitter: the free parameters of the D-CPT form, then F, mu, w1, w2; x has k1 and k2 as well."""
    base = formula.form(free)
    count = len(free)

    def evaluate(theta: Array, x: Array) -> tuple[Array, Array]:
        value, by_log = base.evaluate(theta[:count], x[:, :3])
        f, mu, w1, w2 = theta[count:]
        from_start, from_fall = w1 / x[:, 3], w2 * x[:, 4]
        k = from_start + from_fall
        term = f * k**-mu
        extra = (term, -mu * np.log(k) * term, -mu * from_start / k * term, -mu * from_fall / k * term)
        return value + term, np.column_stack([by_log, *extra])

    def draw(generator: np.random.Generator, loss: Array) -> Array:
        f, w1, w2 = 10 ** generator.uniform((-2.0, -2.0, -2.0), (0.5, 0.0, 0.0))
        return np.concatenate([base.draw(generator, loss), [f, generator.uniform(0.1, 2.0), w1, w2]])

    return Form(
        names=(*free, "F", "mu", "w1", "w2"),
        lower=np.concatenate([base.lower, _EXTRA_LOWER]),
        upper=np.concatenate([base.upper, _EXTRA_UPPER]),
        draw=draw,
        evaluate=evaluate,
    )


def _value(theta: Array, n: Array, d: Array, r: Array, k1: Array, k2: Array) -> Array:
    f, mu, w1, w2 = theta[_BASE:]
    base = formula.loss(theta[:_BASE], n, d, r)
    return np.asarray(base + f * (w1 / k1 + w2 * k2) ** -mu, dtype=np.float64)


def _to_units(theta: Array, free: tuple[str, ...], scale: tuple[float, ...], k1: Array, k2: Array) -> Array:
    """All thirteen parameters in 1e9 and nats, K of geometric mean 1, from the free ones in the units of the fit."""
    f, mu, w1, w2 = theta[len(free) :]
    w1, w2 = w1 * scale[3], w2 / scale[4]
    typical = geometric_mean(w1 / k1 + w2 * k2)
    extra = [f * typical**-mu, mu, w1 / typical, w2 / typical]
    return np.concatenate([formula.in_billions(theta[: len(free)], free, scale), extra])


def _signals(runs: Runs) -> tuple[Array, Array]:
    if runs.k1 is None or runs.k2 is None:
        raise UserError(
            "the cross-domain law needs the columns k1 and k2 (early loss and early rate of decrease of the domain); "
            "see early_signals, or fit one law per domain"
        )
    _check_signals(runs.k1, runs.k2)
    return runs.k1, runs.k2


def _check_signals(k1: Array, k2: Array) -> None:
    if not (k1 > 0).all() or not (k2 >= 0).all():
        raise UserError(
            f"k1 must be above 0 and k2 not below 0: got k1 from {k1.min():g}, k2 from {k2.min():g}; a domain whose "
            "loss rises at the start has no learnability"
        )
