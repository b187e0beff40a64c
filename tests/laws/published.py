"""Published losses that a mixture law has to reproduce, and the law the synthetic tests draw from."""

import numpy as np

from bitquilt.laws import DCPTLaw, Runs

# D-CPT Law (arXiv 2406.01375): Qwen1.5-1.8B, chemistry, 10e9 tokens; the publication chose r_d = 0.924 at 3 %.
CHEMISTRY_SHARE = (0.90, 0.91, 0.92, 0.924, 0.93, 0.94, 1.0)
CHEMISTRY_GENERAL = (2.9052, 2.9193, 2.9376, 2.9445, 2.9644, 2.9848, 3.4667)
CHEMISTRY_DOMAIN = (1.7321, 1.7312, 1.7311, 1.7291, 1.7279, 1.7265, 1.7220)
CHEMISTRY_GENERAL_BEFORE = 2.8602

# CMR law (arXiv 2407.17467): domain loss by model size (1e9) and share.
CMR_SHARE = (1.0, 0.75, 0.50, 0.33, 0.25)
CMR_LOSS = {
    0.46: (1.4628, 1.4844, 1.5122, 1.5387, 1.5561),
    0.94: (1.3723, 1.3910, 1.4155, 1.4385, 1.4538),
    1.6: (1.3242, 1.3416, 1.3643, 1.3854, 1.3994),
    3.1: (1.2585, 1.2750, 1.2965, 1.3170, 1.3305),
}

# Ibrahim et al. 2024: 0.405e9 parameters, English to German; share of replayed old text -> (old loss, new loss).
REPLAY_SHARE = (0.0, 0.01, 0.05, 0.10, 0.25, 0.50)
REPLAY_OLD = (3.56, 2.83, 2.57, 2.46, 2.33, 2.24)
REPLAY_NEW = (1.11, 1.12, 1.12, 1.13, 1.16, 1.22)

TRUE_LAW = DCPTLaw(E=1.5, A=0.4, alpha=0.3, B=0.2, beta=0.3, eta=0.8, C=0.5, eps=0.1, gamma=0.4)
NINE_RATIOS = (0.0, 0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1.0)


def chemistry_general() -> Runs:
    return Runs.of([1.8] * 7, [10.0] * 7, 1 - np.array(CHEMISTRY_SHARE), CHEMISTRY_GENERAL)


def chemistry_domain() -> Runs:
    return Runs.of([1.8] * 7, [10.0] * 7, CHEMISTRY_SHARE, CHEMISTRY_DOMAIN)


def cmr() -> Runs:
    rows = [(n, r, loss) for n, losses in CMR_LOSS.items() for r, loss in zip(CMR_SHARE, losses, strict=True)]
    n, ratio, loss = zip(*rows, strict=True)
    return Runs.of(n, [20.0] * len(n), ratio, loss)


def replay(losses: tuple[float, ...], *, old: bool) -> Runs:
    share = np.array(REPLAY_SHARE)
    return Runs.of([0.405] * 6, [200.0] * 6, share if old else 1 - share, losses)


def synthetic(
    sizes: tuple[float, ...] = (0.5, 1.8, 4.0),
    ratios: tuple[float, ...] = NINE_RATIOS,
    tokens: tuple[float, ...] = tuple(np.geomspace(1.0, 26.0, 9).tolist()),
    noise: float = 0.0,
    seed: int = 0,
) -> Runs:
    """Losses of TRUE_LAW on a grid, times exp(noise x normal)."""
    n, d, r = (axis.ravel() for axis in np.meshgrid(sizes, tokens, ratios, indexing="ij"))
    luck = np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return Runs.of(n, d, r, TRUE_LAW.value(n, d, r) * luck)
