"""Shared by all laws: the base `FittedLaw`, `fit_points` with its `FitReport`, `predict_with` for intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from bitquilt.errors import UserError
from bitquilt.laws.bootstrap import bootstrap
from bitquilt.laws.fit import Array, Form, Goodness, at_bounds, goodness, solve


@dataclass(frozen=True, eq=False)
class FitReport:
    """A fit beyond its parameters. `near_best [k, p]` and `bootstrap [draws, p]`: the parameters of the best starts and
    of the refits; `ranges` and `dropped`: the fitted axes (1e9, 1e9, share)."""

    points: int
    goodness: Goodness
    ranges: Mapping[str, tuple[float, float]]
    dropped: Mapping[str, float]
    warnings: tuple[str, ...]
    near_best: Array
    bootstrap: Array
    data_sha256: str
    starts: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class FittedLaw:
    """A law: its parameters are the fields of the subclass, finite and at least 0, in the formula's order.

    `report`: how they were found, None for parameters from elsewhere. Raises UserError for other values."""

    report: FitReport | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, value in self.parameters.items():
            if not math.isfinite(value) or value < 0:
                raise UserError(f"the parameter {name} of a law is {value}, wanted a finite number of at least 0")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(item.name for item in fields(cls) if item.name != "report")

    @property
    def parameters(self) -> dict[str, float]:
        """Name -> value."""
        return {name: float(getattr(self, name)) for name in self.names()}

    @property
    def theta(self) -> Array:
        """The parameters as an array `[p]`."""
        return np.array(list(self.parameters.values()))


@dataclass(frozen=True, eq=False)
class Prediction:
    """Losses `[points]` with the bootstrap interval `low`..`high` at `level` (of the law's value; a single run also
    has its own noise), the `spread` between the best starts, and warnings about the points."""

    loss: Array
    low: Array
    high: Array
    spread: Array
    level: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Points:
    """The points of a fit: inputs `x [points, axes]` in the units of the fit, losses `[points]`, the run of each point
    `[points]` (the bootstrap draws runs), the axes and the hash of the data."""

    x: Array
    loss: Array
    run: NDArray[np.int64]
    ranges: Mapping[str, tuple[float, float]]
    dropped: Mapping[str, float]
    sha256: str


@dataclass(frozen=True)
class FitSettings:
    """`starts` of the fit, bootstrap refits (`draws`), `seed` of both, `delta` of the Huber loss on log residuals."""

    starts: int
    draws: int
    seed: int
    delta: float


def fit_points(
    form: Form,
    points: Points,
    effort: FitSettings,
    *,
    full: Callable[[Array], Array],
    value: Callable[[Array], Array],
    doubts: Sequence[str] = (),
) -> tuple[Array, FitReport]:
    """Fit a law and return its parameters and the report.

    `full`: free parameters in the units of the fit -> all of the law's; `value`: those -> the law's losses `[points]`;
    `doubts`: warnings known before the fit."""
    x, loss = points.x, points.loss
    solution = solve(form, x, loss, starts=effort.starts, seed=effort.seed, delta=effort.delta)
    refits = bootstrap(form, x, loss, solution, points.run, draws=effort.draws, seed=effort.seed, delta=effort.delta)
    theta = full(solution.theta)
    report = FitReport(
        points=len(loss),
        goodness=goodness(loss, value(theta), effort.delta),
        ranges=points.ranges,
        dropped=points.dropped,
        warnings=(*doubts, *at_bounds(form, solution.theta)),
        near_best=np.stack([full(near) for near in solution.near_best]),
        bootstrap=np.array([full(refit) for refit in refits]).reshape(-1, len(theta)),
        data_sha256=points.sha256,
        starts=effort.starts,
        seed=effort.seed,
    )
    return theta, report


def predict_with(
    report: FitReport | None, theta: Array, value: Callable[[Array], Array], level: float, notes: Sequence[str] = ()
) -> Prediction:
    """Predict `value` (parameters -> losses) at `theta`, with the interval at `level` from the refits, or from the best
    starts where there are none. Raises UserError for a level outside 0 to 1."""
    if not 0 < level < 1:
        raise UserError(f"level is {level:g}, wanted a probability between 0 and 1, such as 0.9")
    loss = value(theta)
    if report is None:
        return Prediction(loss, loss, loss, np.zeros_like(loss), level, tuple(notes))
    near = np.stack([value(start) for start in report.near_best])
    low, high = near.min(axis=0), near.max(axis=0)
    spread = high - low
    if len(report.bootstrap):
        refits = np.stack([value(refit) for refit in report.bootstrap])
        low, high = np.quantile(refits, [(1 - level) / 2, (1 + level) / 2], axis=0)
    else:
        notes = [*notes, "no bootstrap: the interval is the spread of the best starts"]
    return Prediction(loss, low, high, spread, level, tuple(notes))
