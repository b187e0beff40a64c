"""Perplexity of a text: `plan_windows` cuts it, `nll` scores tokens, `from_mean` turns a cross-entropy into perplexity.

The standard protocol (GPTQ, https://arxiv.org/abs/2210.17323, section 4) cuts the stream into disjoint windows of
seq_len tokens. Each window predicts its last seq_len - 1 tokens, and a partial window at the end is dropped. Perplexity
is exp of the mean over all predicted tokens.

In the strided protocol windows start every `stride` tokens, and each scores only tokens that no earlier window scored.
So a token is predicted from at least seq_len - stride tokens. A partial window at the end counts from
two tokens on. The two protocols give different figures for the same model.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from bitquilt.errors import UserError


@dataclass(frozen=True)
class Window:
    """The tokens [start, end) of the stream; tokens from `first_target` on are scored."""

    start: int
    end: int
    first_target: int


def plan_windows(tokens: int, seq_len: int, stride: int | None = None) -> list[Window]:
    """Return the windows of a stream of `tokens` tokens; stride=None is the standard protocol.

    Raises UserError for seq_len below 2, a stride outside [1, seq_len], and a stream too short for one window."""
    if seq_len < 2:
        raise UserError(f"seq_len is {seq_len}; wanted at least 2, one token to see and one to predict")
    if stride is None:
        if tokens < seq_len:
            raise UserError(
                f"the text has {tokens} tokens, and one window needs {seq_len}; give more text or a smaller seq_len"
            )
        starts = range(0, tokens - seq_len + 1, seq_len)
        return [Window(start, start + seq_len, start + 1) for start in starts]
    if not 1 <= stride <= seq_len:
        raise UserError(f"stride is {stride}; wanted 1 to seq_len, which is {seq_len}")
    if tokens < 2:
        raise UserError(f"the text has {tokens} token; a prediction needs 2; give more text")
    planned: list[Window] = []
    scored = 1  # token 0 has no past, so it is never predicted
    for start in range(0, tokens - 1, stride):
        window = Window(start, min(start + seq_len, tokens), max(scored, start + 1))
        planned.append(window)
        scored = window.end
        if scored == tokens:
            break
    return planned


def nll(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood in nats [tokens] of `targets` [tokens] under `log_probs` [tokens, vocab]."""
    return -log_probs.gather(-1, targets[:, None]).squeeze(-1)


def from_mean(cross_entropy: float) -> float:
    """Return the perplexity of a mean cross-entropy in nats per token; inf where exp overflows."""
    return math.exp(cross_entropy) if cross_entropy < 709.0 else math.inf  # exp(709.8) is the largest double
