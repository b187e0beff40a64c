"""The D-CPT formula over plain arrays: `loss`, its `terms`, `slopes_by_log` and `derivatives`, and the `form` of a fit.

Functions take `theta [9]` and n, d, r of one shape.

    L(N, D, r) = E + A N^-alpha + B r^eta D^-beta + C (r + eps)^-gamma

arXiv 2406.01375, section 3. N in 1e9 parameters, D in 1e9 tokens, r in [0, 1] the share
of the corpus whose loss L (nats per token) is modelled. A term that the data do not show is switched off by
A = 0, B = 0 or C = 0, or by an exponent of 0.
"""

import numpy as np
from numpy.typing import NDArray

from bitquilt.laws.fit import Array, Form

NAMES = ("E", "A", "alpha", "B", "beta", "eta", "C", "eps", "gamma")
# [ours] Wide enough for every published table; E is free up to any sensible loss.
LOWER = dict(zip(NAMES, (1e-3, 1e-5, 0.02, 1e-5, 0.02, 0.02, 1e-5, 1e-5, 0.02), strict=True))
UPPER = dict(zip(NAMES, (30.0, 10.0, 6.0, 10.0, 6.0, 6.0, 10.0, 1.0, 6.0), strict=True))

_NOTHING = 1e-12  # a law with eps = 0 has no finite loss at r = 0: this makes it very large

Terms = tuple[Array, Array, Array, Array]


def terms(theta: Array, n: Array, d: Array, r: Array) -> Terms:
    """The four terms (E, size, tokens, ratio), each of the inputs' shape. r = 0 gives r^eta = 0 unless eta = 0."""
    e, a, alpha, b, beta, eta, c, eps, gamma = theta
    shape = np.broadcast(n, d, r).shape
    size = np.broadcast_to(a * n**-alpha, shape) if a else np.zeros(shape)
    tokens = np.broadcast_to(b * r**eta * d**-beta, shape) if b else np.zeros(shape)
    ratio = np.broadcast_to(c * np.maximum(r + eps, _NOTHING) ** -gamma, shape) if c else np.zeros(shape)
    return np.full(shape, e), size, tokens, ratio


def loss(theta: Array, n: Array, d: Array, r: Array) -> Array:
    """L(N, D, r), of the inputs' shape."""
    return np.asarray(sum(terms(theta, n, d, r)), dtype=np.float64)


def slopes_by_log(theta: Array, n: Array, d: Array, r: Array) -> tuple[Array, Array]:
    """(loss [points], d loss / d log theta [points, 9]) for inputs `[points]`."""
    _, _, alpha, _, beta, eta, _, eps, gamma = theta
    constant, size, tokens, ratio = terms(theta, n, d, r)
    log_r = np.log(np.where(r > 0, r, 1.0))  # eta log r r^eta := 0 at r = 0
    columns = (
        constant,
        size,
        -alpha * np.log(n) * size,
        tokens,
        -beta * np.log(d) * tokens,
        eta * log_r * tokens,
        ratio,
        -gamma * eps / (r + eps) * ratio if ratio.any() else ratio,
        -gamma * np.log(r + eps) * ratio if ratio.any() else ratio,
    )
    return constant + size + tokens + ratio, np.stack(columns, axis=-1)


def derivatives(theta: Array, n: Array, d: Array, r: Array) -> dict[str, Array]:
    """The derivatives whose signs the paper demands: dL/dN, dL/dD, dL/dr and d2L/dDdr, for r > 0."""
    _, _, alpha, _, beta, eta, _, eps, gamma = theta
    _, size, tokens, ratio = terms(theta, n, d, r)
    falling = gamma * ratio / (r + eps) if ratio.any() else ratio
    return {
        "dL/dN": -alpha * size / n,
        "dL/dD": -beta * tokens / d,
        "dL/dr": eta * tokens / r - falling,
        "d2L/dDdr": -beta * eta * tokens / (d * r),
    }


def form(free: tuple[str, ...]) -> Form:
    """The form of the law for the fitter, with only the parameters `free`; the others are 0, which drops their terms.

    `x` has the columns n, d, r, with n and d divided by a typical value of the data: A and B are then the size of
    their terms in the middle of the data, and one set of starts and bounds fits every scale of model.
    """
    places = np.array([NAMES.index(name) for name in free])

    def evaluate(theta: Array, x: Array) -> tuple[Array, NDArray[np.float64]]:
        full = np.zeros(len(NAMES))
        full[places] = theta
        value, by_log = slopes_by_log(full, x[:, 0], x[:, 1], x[:, 2])
        return value, by_log[:, places]

    def draw(generator: np.random.Generator, losses: Array) -> Array:
        """Draw one start, log-uniform or uniform over the ranges of published fits."""
        exponents = generator.uniform(0.1, 2.0, 4)
        a, b, c = 10 ** generator.uniform(-2.0, 0.5, 3)
        e, eps = generator.uniform(0.1, 1.0) * float(losses.min()), 10 ** generator.uniform(-3.0, -0.3)
        start = (e, a, exponents[0], b, exponents[1], exponents[2], c, eps, exponents[3])
        return np.array(start)[places]

    return Form(
        names=free,
        lower=np.array([LOWER[name] for name in free]),
        upper=np.array([UPPER[name] for name in free]),
        draw=draw,
        evaluate=evaluate,
    )


def in_billions(theta: Array, free: tuple[str, ...], scale: tuple[float, ...]) -> Array:
    """All nine parameters for N and D in 1e9, from the `free` ones of a fit in units of `scale`."""
    full = np.zeros(len(NAMES))
    full[[NAMES.index(name) for name in free]] = theta
    full[1] *= scale[0] ** full[2]
    full[3] *= scale[1] ** full[4]
    return full
