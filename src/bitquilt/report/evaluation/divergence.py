"""Divergence of a model from its reference: `kl_divergence` and `same_top1` per token, `summarize` over all tokens.

Arguments are log-probabilities [tokens, vocab] in float32 at the same positions of the same windows.
KL(reference || model) is zero where the two agree and weighs a token by its probability under the reference.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) over all scored tokens in nats per token, and the share of tokens where both models
    have the same likeliest next token."""

    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float


def kl_divergence(reference: Tensor, model: Tensor) -> Tensor:
    """Return KL(reference || model) [tokens] in nats, from log-probabilities [tokens, vocab]."""
    # Exactly zero for equal inputs; the clamp removes negative sums of roundings (about -1e-7).
    return (reference.exp() * (reference - model)).sum(-1).clamp_min(0.0)


def same_top1(reference: Tensor, model: Tensor) -> Tensor:
    """Return whether the likeliest token is the same, bool [tokens], from log-probabilities [tokens, vocab]."""
    return reference.argmax(-1) == model.argmax(-1)


def summarize(kl: Tensor, agree: Tensor) -> Divergence:
    """Summarize `kl` [tokens] in nats and `agree` bool [tokens]; quantiles are interpolated linearly."""
    # torch.quantile refuses more than 16 million elements.
    values = kl.to(torch.float64).numpy()
    median, p99 = np.quantile(values, [0.5, 0.99]).tolist()
    return Divergence(
        kl_mean=float(values.mean()),
        kl_median=median,
        kl_p99=p99,
        kl_max=float(values.max()),
        top1_agreement=agree.to(torch.float64).mean().item(),
    )
