"""The one fitter under every law: `solve` finds the positive parameters that fit the points, `polish` refines them.

A law is a `Form`: names, bounds, starts, and one function giving loss and slope. Residuals are log(predicted / loss),
so an error of one per cent weighs the same at every loss; the objective is their mean Huber loss, which a few bad
runs cannot move far. Following D-CPT (arXiv 2406.01375): L-BFGS from many starts, because the answer
depends on the start. Ours: the logarithms of the parameters are optimised (so they stay positive), with analytic
slopes, and the best few starts are polished by bounded robust least squares, because L-BFGS is slow in the long
flat valleys of such a law.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize

from bitquilt.errors import UserError
from bitquilt.threads import one_thread

Array = NDArray[np.float64]
Evaluate = Callable[[Array, Array], tuple[Array, Array]]
Draw = Callable[[np.random.Generator, Array], Array]

HUBER_DELTA = 1e-3  # of log residuals: a tenth of a per cent, about the noise of a validation loss
POLISHED = 10  # starts polished and kept as the spread


@dataclass(frozen=True)
class Form:
    """A law as the fitter sees it.

    `evaluate(theta [p], x [points, columns])` gives the loss `[points]` and its slope by the LOGARITHM of every
    parameter `[points, p]`. `draw(generator, loss)` gives one start `[p]`. Bounds are on the parameters, above 0.
    """

    names: tuple[str, ...]
    lower: Array
    upper: Array
    draw: Draw
    evaluate: Evaluate


@dataclass(frozen=True)
class BestFit:
    """The best parameters `[p]`, their mean Huber loss, and every polished start as good as the best, `[k, p]`,
    k <= 10: where they disagree, the data do not decide."""

    theta: Array
    objective: float
    near_best: Array


@dataclass(frozen=True)
class Goodness:
    """The fit of predictions to losses: mean Huber loss of log residuals, R2 of the losses, the largest and the root
    mean square error in nats per token."""

    huber: float
    r2: float
    max_error: float
    rmse: float
    points: int


def huber(residual: Array, delta: float = HUBER_DELTA) -> Array:
    """0.5 x^2 within delta, delta (|x| - delta / 2) beyond; elementwise."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def geometric_mean(values: Array) -> float:
    """The typical size of positive values: a unit for the fit."""
    return float(np.exp(np.log(values).mean()))


def goodness(loss: Array, predicted: Array, delta: float = HUBER_DELTA) -> Goodness:
    """Goodness of `predicted [points]` against `loss [points]`. R2 is nan where the losses are all equal."""
    error = predicted - loss
    spread = float(np.sum((loss - loss.mean()) ** 2))
    return Goodness(
        huber=float(np.mean(huber(np.log(predicted / loss), delta))),
        r2=1.0 - float(np.sum(error**2)) / spread if spread > 0 else float("nan"),
        max_error=float(np.max(np.abs(error))),
        rmse=float(np.sqrt(np.mean(error**2))),
        points=len(loss),
    )


@one_thread()
def solve(form: Form, x: Array, loss: Array, *, starts: int = 60, seed: int = 0, delta: float = HUBER_DELTA) -> BestFit:
    """Fit `form` to `loss [points]` at `x [points, columns]`.

    Raises UserError when no start gives a finite loss (inputs far out of scale).
    """
    low, high = np.log(form.lower), np.log(form.upper)
    generator = np.random.default_rng(seed)
    found: list[tuple[float, Array]] = []
    for _ in range(starts):
        start = np.clip(np.log(form.draw(generator, loss)), low, high)
        descended = _descend(form, x, loss, start, (low, high), delta)
        if descended is not None:
            found.append(descended)
    if not found:
        raise UserError(
            f"the fit found no finite start among {starts}: got losses {loss.min():g} to {loss.max():g}, "
            "wanted a scale of nats per token; check the units of the columns"
        )
    found.sort(key=lambda item: item[0])
    # Coarsely first: in a flat valley the last digits of ten starts would take longer than the rest of the fit.
    polished = sorted(
        (polish(form, x, loss, theta, delta, tolerance=1e-7) for _, theta in found[:POLISHED]),
        key=lambda item: item[0],
    )
    polished[0] = polish(form, x, loss, polished[0][1], delta)
    best, theta = polished[0]
    # As good as the best: within half of it, or within what one delta of error everywhere would cost.
    limit = 1.5 * best + 0.5 * delta**2
    near = np.stack([candidate for value, candidate in polished if value <= limit])
    return BestFit(theta, best, near)


def polish(
    form: Form, x: Array, loss: Array, theta: Array, delta: float = HUBER_DELTA, tolerance: float = 1e-13
) -> tuple[float, Array]:
    """(mean Huber loss, parameters) of the minimum next to `theta`, by bounded robust least squares."""
    low, high = np.log(form.lower), np.log(form.upper)
    target = np.log(loss)
    last: tuple[bytes, tuple[Array, Array]] | None = None

    def evaluated(log_theta: Array) -> tuple[Array, Array]:
        """Loss and slope at these parameters; the solver asks for both of a point, one after the other."""
        nonlocal last
        key = log_theta.tobytes()
        if last is None or last[0] != key:
            last = key, form.evaluate(np.exp(log_theta), x)
        return last[1]

    def residual(log_theta: Array) -> Array:
        return np.log(evaluated(log_theta)[0]) - target

    def slope(log_theta: Array) -> Array:
        value, by_log = evaluated(log_theta)
        return by_log / value[:, None]

    inside = np.clip(np.log(theta), low + 1e-9, high - 1e-9)  # the solver wants a start off the bounds
    result = least_squares(
        residual,
        inside,
        jac=slope,
        bounds=(low, high),
        loss="huber",
        f_scale=delta,
        x_scale="jac",
        ftol=tolerance,
        xtol=tolerance,
        gtol=tolerance,
        max_nfev=300 if tolerance < 1e-10 else 40,
    )
    return float(result.cost) / len(loss), np.exp(result.x)


def _descend(
    form: Form, x: Array, loss: Array, start: Array, bounds: tuple[Array, Array], delta: float
) -> tuple[float, Array] | None:
    """L-BFGS-B from one start; None where the law overflows there."""
    target, points = np.log(loss), len(loss)

    def objective(log_theta: Array) -> tuple[float, Array]:
        value, by_log = form.evaluate(np.exp(log_theta), x)
        residual = np.log(value) - target
        # Divided by delta: the solver's stopping rules expect values near one.
        pull = np.clip(residual / delta, -1.0, 1.0) / value
        return float(np.sum(huber(residual, delta))) / (points * delta), by_log.T @ pull / points

    with np.errstate(all="ignore"):
        if not np.isfinite(objective(start)[0]):
            return None
        result = minimize(
            objective,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(*bounds, strict=True)),
            options={"maxiter": 300, "ftol": 1e-9, "gtol": 1e-7},
        )
    if not np.isfinite(result.fun):
        return None
    return float(result.fun) * delta, np.exp(np.clip(result.x, *bounds))


def at_bounds(form: Form, theta: Array) -> list[str]:
    """A warning that names the parameters that ended on a bound, which the data do not identify; or none."""
    stuck = [
        f"{name} at {value:.3g}"
        for name, value, low, high in zip(form.names, theta, form.lower, form.upper, strict=True)
        if value < low * 1.001 or value > high * 0.999
    ]
    if not stuck:
        return []
    return [f"{', '.join(stuck)} (units of the fit): on the bound, so not identified; other parameters compensate"]
