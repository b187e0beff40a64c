"""Loss against bits per weight: `BpwLaw.fit(bpw, loss).predict(bpw)`, on the same fitter as the other laws.

    L(b) = E + A 2^(-k b)

Why this form [ours]: the error of a uniform grid has a variance proportional to 2^(-2b), and a small error of the
weights near a minimum costs loss in proportion to that variance, so k = 2 is what theory expects at many bits. At 2
to 3 bits the error is no longer small and the loss grows faster, so k is fitted instead of fixed. A power of b has no
theory behind it and does not tend to E fast enough. E is the loss without quantization; pass it when it was measured,
because two or three points above it cannot identify it.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bitquilt.errors import UserError
from bitquilt.laws.fit import HUBER_DELTA, Array, Form
from bitquilt.laws.summary import FitSettings, FittedLaw, Points, Prediction, fit_points, predict_with

NAMES = ("E", "A", "k")
_CENTRE = 3.0  # bits: A is fitted as the excess loss there, so that one set of starts serves


@dataclass(frozen=True)
class BpwLaw(FittedLaw):
    """E in nats per token, A the excess extrapolated to 0 bits, k in powers of two per bit."""

    E: float
    A: float
    k: float

    @staticmethod
    def fit(
        bpw: ArrayLike,
        loss: ArrayLike,
        *,
        full_precision_loss: float | None = None,
        starts: int = 30,
        seed: int = 0,
        delta: float = HUBER_DELTA,
        draws: int = 100,
    ) -> "BpwLaw":
        """Fit losses `[points]` at bits per weight `[points]`; a `full_precision_loss` fixes E.

        Raises UserError for unequal lengths, impossible values, or fewer than two different bpw.
        """
        b, y = np.asarray(bpw, dtype=np.float64), np.asarray(loss, dtype=np.float64)
        _check(b, y, full_precision_loss)
        law_form = _form(full_precision_loss)
        distinct, free = len(np.unique(b)), len(law_form.names)
        doubt = f"{distinct} different bpw for {free} parameters: E, A and k are not identified"
        sha256 = hashlib.sha256(repr(sorted(zip(b.tolist(), y.tolist(), strict=True))).encode()).hexdigest()
        ranges = {"bpw": (float(b.min()), float(b.max()))}
        theta, report = fit_points(
            law_form,
            Points(b[:, None], y, np.arange(len(b)), ranges, {}, sha256),
            FitSettings(starts, draws, seed, delta),
            full=lambda free: _full(free, full_precision_loss),
            value=lambda theta: _value(theta, b),
            doubts=[doubt] if distinct < free else [],
        )
        return BpwLaw(*theta.tolist(), report=report)

    def predict(self, bpw: ArrayLike) -> Array:
        """Predict the loss at `bpw` bits per weight, of any shape."""
        return _value(self.theta, np.asarray(bpw, dtype=np.float64))

    def interval(self, bpw: ArrayLike, level: float = 0.9) -> Prediction:
        """Predict with the uncertainty at `level`, and a warning outside the fitted range."""
        b = np.atleast_1d(np.asarray(bpw, dtype=np.float64))
        notes = []
        if self.report is not None:
            lowest, highest = self.report.ranges["bpw"]
            if not ((b >= lowest) & (b <= highest)).all():
                notes.append(f"fitted on {lowest:g} to {highest:g} bpw only")
        return predict_with(self.report, self.theta, lambda theta: _value(theta, b), level, notes)

    def bpw_for(self, loss: float) -> float:
        """The fewest bits per weight that reach `loss`. Raises UserError for a loss the law never reaches."""
        if loss <= self.E:
            raise UserError(f"the law tends to {self.E:.4f} at many bits: got {loss:g}, wanted a higher loss")
        return max(0.0, math.log2(self.A / (loss - self.E)) / self.k)


def _form(fixed: float | None) -> Form:
    """The form for the fitter, with E free unless it is `fixed`."""
    free = NAMES if fixed is None else NAMES[1:]

    def evaluate(theta: Array, x: Array) -> tuple[Array, Array]:
        e, a, k = theta if fixed is None else (fixed, *theta)
        away = math.log(2.0) * (x[:, 0] - _CENTRE)
        excess = a * np.exp(-k * away)
        columns = [excess, -k * away * excess]
        if fixed is None:
            columns.insert(0, np.full_like(excess, e))
        return e + excess, np.column_stack(columns)

    def draw(generator: np.random.Generator, loss: Array) -> Array:
        start = [generator.uniform(0.3, 1.0) * float(loss.min())] if fixed is None else []
        return np.array([*start, 10 ** generator.uniform(-3.0, 0.5), generator.uniform(0.5, 4.0)])

    low, high = np.array([1e-3, 1e-7, 0.02]), np.array([30.0, 30.0, 12.0])
    return Form(free, low[-len(free) :], high[-len(free) :], draw, evaluate)


def _full(theta: Array, fixed: float | None) -> Array:
    """(E, A at 0 bits, k) from the parameters of the fit."""
    e, a, k = theta if fixed is None else (fixed, *theta)
    return np.array([e, a * 2.0 ** (k * _CENTRE), k])


def _value(theta: Array, b: Array) -> Array:
    return np.asarray(theta[0] + theta[1] * 2.0 ** (-theta[2] * b), dtype=np.float64)


def _check(b: Array, y: Array, fixed: float | None) -> None:
    """Raise UserError for the first point that is impossible, for a single bpw, or for an impossible `fixed` loss."""
    if b.shape != y.shape or b.ndim != 1:
        raise UserError(f"bpw and loss must be equally long lists: got {b.shape} and {y.shape}")
    for i, (bits, loss) in enumerate(zip(b.tolist(), y.tolist(), strict=True), start=1):
        if not 0 < bits <= 32:
            raise UserError(f"row {i}: bpw is {bits:g}, wanted bits per weight between 0 and 32")
        if not (loss > 0 and math.isfinite(loss)):
            raise UserError(f"row {i}: loss is {loss:g}, wanted a finite loss above 0 in nats per token")
    if len(np.unique(b)) < 2:
        raise UserError(f"{len(b)} points with one bpw: wanted at least 2 different ones, better 4; measure more")
    if fixed is not None and not 0 < fixed < float(y.max()):
        raise UserError(f"the full-precision loss is {fixed:g}, wanted above 0 and below the worst point ({y.max():g})")
