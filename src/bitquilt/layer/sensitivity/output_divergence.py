"""The cost of each pairing of low-bit and high-bit groups at the layer's output: `pair_losses`, `[P]`.

SliM-LLM's search objective (arXiv 2405.14917, Eq. 4) for all candidates p = 0 .. P-1 at once, where the p least
salient groups hold one bit less and the p most salient one bit more. Adding one pair changes two groups only:
    Y(p) = Y(p-1) + X_lo (W^(N-1) - W^N)_lo^T + X_hi (W^(N+1) - W^N)_hi^T
so all candidates together cost two matrix products of the layer's size, not one each.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Objective = Literal["kl", "kl_reverse"]
# Tokens handled at once: two fp32 outputs of 11008 features and their differences stay near 70 MB.
_TOKENS_AT_ONCE = 512
_PUBLISHED_CLAMP = 1e-6
_EXP_LIMIT = 80.0  # exp(88.7) overflows fp32


def pair_losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base: Tensor,
    changes: Sequence[tuple[slice, Tensor]],
    objective: Objective = "kl",
) -> Tensor:
    """Mean objective per token after each step, fp64 `[len(changes) // 2 + 1]`.

    x `[T, in]`; `weight` full precision and `base` quantized (p = 0) `[out, in]`; `changes`: two per step, the
    columns of a group and their new values minus their base values `[out, n]`.
    """
    steps = len(changes) // 2
    totals = torch.zeros(steps + 1, dtype=torch.float64, device=x.device)
    base_error = (base - weight).t()
    for start in range(0, len(x), _TOKENS_AT_ONCE):
        chunk = x[start : start + _TOKENS_AT_ONCE]
        loss = _Objective(chunk, weight, bias, objective)
        error = chunk @ base_error
        totals[0] += loss(error)
        for step in range(steps):
            for columns, change in changes[2 * step : 2 * step + 2]:
                error.addmm_(chunk[:, columns], change.t())
            totals[step + 1] += loss(error)
    return totals / len(x)


class _Objective:
    """The objective summed over tokens, as a function of the output's error `[T, out]`; terms of the full-precision
    output alone are computed once."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, kind: Objective) -> None:
        self.kind = kind
        output = torch.nn.functional.linear(x, weight, bias)
        self.p = torch.softmax(output, dim=-1)
        if kind == "kl_reverse":
            # the public implementation adds the bias to the full-precision output only
            self.quantized_base = output if bias is None else output - bias
            self.log_p = self.p.clamp(min=_PUBLISHED_CLAMP).log()

    def __call__(self, error: Tensor) -> Tensor:
        if self.kind == "kl":
            # log sum P exp(d - m) with m = sum P d: exact for small errors, where log-softmaxes would cancel
            mean = torch.einsum("to,to->t", self.p, error)
            growth = (error - mean.unsqueeze(1)).clamp_(max=_EXP_LIMIT).expm1_()
            return torch.einsum("to,to->t", self.p, growth).log1p().sum()
        q = torch.softmax(self.quantized_base + error, dim=-1).clamp_(min=_PUBLISHED_CLAMP)
        return (q * (q.log() - self.log_p)).sum()
