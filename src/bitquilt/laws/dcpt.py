"""The D-CPT Law (arXiv 2406.01375): `DCPTLaw.fit(runs).predict(N, D, r)` is the loss of a mixture.

    L(N, D, r) = E + A N^-alpha + B r^eta D^-beta + C (r + eps)^-gamma      (section 3 of the paper)

N in 1e9 parameters, D in 1e9 tokens, L in nats per token; r in [0, 1] is the share of the corpus whose loss is
modelled: the domain's share for its own loss, one minus that for the general loss. One law is one fit of one
corpus' loss under one tokeniser.

Deviations: Huber on log residuals with delta 1e-3, starts, bounds and the scaling of N and D by their geometric
means are ours (the paper gives L-BFGS, Huber and many starts only); uncertainty by bootstrap is ours.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bitquilt.errors import UserError
from bitquilt.laws import formula
from bitquilt.laws.axes import LawWarning, identify, notes_on
from bitquilt.laws.data import Runs
from bitquilt.laws.fit import HUBER_DELTA, Array, geometric_mean
from bitquilt.laws.summary import FitSettings, FittedLaw, Points, Prediction, fit_points, predict_with


@dataclass(frozen=True)
class Sign:
    """One demand of section 3: the derivative is negative on the whole fitted range. `worst` is its largest value,
    reached `at` (N, D, r); a dropped term makes it 0 everywhere, which counts as holding."""

    derivative: str
    holds: bool
    failing: float
    worst: float
    at: tuple[float, float, float]


@dataclass(frozen=True)
class DCPTLaw(FittedLaw):
    """The nine parameters, for N and D in 1e9. A, B or C = 0 (or an exponent 0) switches a term off."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    eta: float
    C: float
    eps: float
    gamma: float

    @staticmethod
    def fit(runs: Runs, *, starts: int = 60, seed: int = 0, delta: float = HUBER_DELTA, draws: int = 100) -> "DCPTLaw":
        """Fit the runs of ONE domain. `starts`: 60 for few points, 300 for noisy ones; `draws`: bootstrap refits.

        Raises UserError for several domains at once and for data in which nothing varies.
        """
        if len(runs.domains) > 1:
            raise UserError(
                f"one law models the loss of one corpus: got {', '.join(runs.domains)}; fit each with "
                "runs.of_domain(name), or all with CrossDomainLaw"
            )
        axes = identify(runs)
        scale = unit_scale(runs)
        theta, report = fit_points(
            formula.form(axes.free),
            Points(runs.x / np.array([*scale, 1.0]), runs.loss, runs.run, axes.ranges, axes.dropped, runs.sha256),
            FitSettings(starts, draws, seed, delta),
            full=lambda free: formula.in_billions(free, axes.free, scale),
            value=lambda theta: formula.loss(theta, *runs.x.T),
            doubts=axes.warnings,
        )
        return DCPTLaw(*theta.tolist(), report=report)

    def value(self, n: ArrayLike, d: ArrayLike, r: ArrayLike) -> Array:
        """The formula alone, without checks or warnings. Shapes broadcast."""
        return formula.loss(self.theta, *_arrays(n, d, r))

    def predict(self, n: ArrayLike, d: ArrayLike, r: ArrayLike) -> Array:
        """Predict the loss at N (1e9 parameters), D (1e9 tokens), r (share), broadcast together.

        Raises UserError for impossible inputs and for points along an axis the fit had to drop; warns with
        `LawWarning` beyond twice the fitted range.
        """
        for note in self._notes(*_arrays(n, d, r)):
            warnings.warn(note, LawWarning, stacklevel=2)
        return self.value(n, d, r)

    def interval(self, n: ArrayLike, d: ArrayLike, r: ArrayLike, level: float = 0.9) -> Prediction:
        """Predict with the uncertainty at `level`; the warnings are part of the result."""
        point = _arrays(n, d, r)
        notes = self._notes(*point)
        return predict_with(self.report, self.theta, lambda theta: formula.loss(theta, *point), level, notes)

    def check(self, steps: int = 25) -> tuple[Sign, ...]:
        """Check the signs that the paper demands (section 3): dL/dN, dL/dD, dL/dr and d2L/dDdr are negative.

        On a grid of `steps` values per axis over the fitted range (N, D 0.1 to 100 and all ratios for a law without a
        report). Positive parameters guarantee all but dL/dr."""
        ranges = self.report.ranges if self.report else {"n": (0.1, 100.0), "d": (0.1, 100.0), "ratio": (0.0, 1.0)}
        low_r, high_r = ranges["ratio"]
        ratios = np.linspace(max(low_r, min(1e-3, high_r or 1e-3)), high_r or 1e-3, steps)
        n, d, r = np.meshgrid(
            np.geomspace(*ranges["n"], steps), np.geomspace(*ranges["d"], steps), ratios, indexing="ij"
        )
        signs = []
        for name, slope in formula.derivatives(self.theta, n, d, r).items():
            worst = int(slope.argmax())
            at = (float(n.flat[worst]), float(d.flat[worst]), float(r.flat[worst]))
            failing = float(np.mean(slope > 0))
            signs.append(Sign(name, failing == 0, failing, float(slope.flat[worst]), at))
        return tuple(signs)

    def _notes(self, n: Array, d: Array, r: Array) -> list[str]:
        check_points(n, d, r)
        return notes_on(self.report, n=np.atleast_1d(n), d=np.atleast_1d(d), ratio=np.atleast_1d(r))


def unit_scale(runs: Runs) -> tuple[float, float]:
    """The geometric means of N and D: the units of the fit."""
    return geometric_mean(runs.n), geometric_mean(runs.d)


def check_points(n: Array, d: Array, r: Array) -> None:
    """Raise UserError for inputs that are impossible: N or D not above 0, a ratio outside 0 to 1."""
    for name, column in (("N", n), ("D", d)):
        if not (np.isfinite(column) & (column > 0)).all():
            raise UserError(f"{name} is {np.min(column):g}, wanted a number above 0, in units of 1e9")
    outside = ~((r >= 0) & (r <= 1))
    if outside.any():
        raise UserError(
            f"ratio is {np.atleast_1d(r)[np.atleast_1d(outside)][0]:g}, wanted a share between 0 and 1; "
            "divide a percentage by 100"
        )


def _arrays(n: ArrayLike, d: ArrayLike, r: ArrayLike) -> tuple[Array, Array, Array]:
    first, second, third = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in (n, d, r)))
    return first, second, third
