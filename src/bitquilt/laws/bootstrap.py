"""The uncertainty of a fit: `bootstrap` refits a law to noisy copies of its own predictions.

A parametric bootstrap: noise like the fit's residuals is added to its predictions, the law is refitted, and the spread
of the refitted laws is the uncertainty. The noise has two parts, because the evaluations of one training run share its
luck: one draw per run and one per point, in the proportion of the residuals. Multiplying the residuals themselves (a
wild bootstrap) gives intervals that are too narrow: a robust fit passes exactly through about as many points as it has
parameters, and those residuals are zero. [ours: the paper gives none]
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitquilt.laws.fit import HUBER_DELTA, Array, BestFit, Form, polish
from bitquilt.threads import one_thread

OUTLIER = 4.0  # residuals are cut at this many robust deviations, beyond which the fit ignores them too


@dataclass(frozen=True)
class Noise:
    """Standard deviations of the log residuals: one shared by a `run`, one per `point`; `freedom` of the estimate."""

    run: float
    point: float
    freedom: int


def estimate_noise(residual: Array, runs: NDArray[np.int64], free: int) -> Noise:
    """Estimate the noise from `residual [points]` after a fit of `free` parameters; `runs` numbers the points' runs.

    Needs more points than parameters. With one point per run, or fewer runs than parameters, the two parts cannot be
    told apart and all noise counts as point noise.
    """
    points, groups = len(residual), int(runs.max()) + 1
    largest = np.sort(np.abs(residual))[free:]  # the others are nearly zero: the fit passes through them
    limit = OUTLIER * 1.4826 * float(np.median(largest))
    residual = np.clip(residual, -limit, limit)
    if groups <= free or points <= 2 * groups:
        return Noise(0.0, float(np.sqrt(np.sum(residual**2) / (points - free))), points - free)
    count = np.bincount(runs, minlength=groups)
    mean = np.bincount(runs, residual, minlength=groups) / count
    # Degrees of freedom: size and ratio parameters (about p - 2) bend to the runs' means, the other two to the rest.
    within = float(np.sum((residual - mean[runs]) ** 2)) / (points - groups - 2)
    between = float(np.sum(count * mean**2)) / (groups - free + 2)
    shared = max(between - within, 0.0) / float(count.mean())
    return Noise(float(np.sqrt(shared)), float(np.sqrt(within)), groups - free + 2)


@one_thread()
def bootstrap(
    form: Form,
    x: Array,
    loss: Array,
    solution: BestFit,
    runs: NDArray[np.int64],
    *,
    draws: int = 100,
    seed: int = 0,
    delta: float = HUBER_DELTA,
) -> Array:
    """Return refitted parameters `[draws, p]`; `runs [points]` numbers the training run of each point.

    Empty `[0, p]` when there are no more points than parameters: residuals then say nothing about the noise.
    """
    points, free = x.shape[0], len(form.names)
    if points <= free or draws == 0:
        return np.empty((0, free))
    predicted = form.evaluate(solution.theta, x)[0]
    noise = estimate_noise(np.log(loss / predicted), runs, free)
    generator = np.random.default_rng(seed)
    refitted = []
    for _ in range(draws):
        # The noise scale is itself uncertain: this makes the draws Student's t instead of normal.
        wider = np.sqrt(noise.freedom / generator.chisquare(noise.freedom))
        shared = noise.run * generator.standard_normal(runs.max() + 1)
        luck = wider * (shared[runs] + noise.point * generator.standard_normal(points))
        _, theta = polish(form, x, predicted * np.exp(luck), solution.theta, delta, tolerance=1e-9)
        refitted.append(theta)
    return np.stack(refitted)
