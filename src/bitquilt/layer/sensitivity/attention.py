"""Sensitivity of a layer at its sub-block's output, softmax included: `sequence_gradients` and `gradient_sums`.

APTQ (arXiv 2402.14866) measures attention projections at the attention output with a Gauss-Newton Hessian
H = 2 sum_t J_t^T J_t, J_t = d y_t / d vec(W). Its closed forms were not reachable; ours (in the tests, for O, V, Q and
K) are not needed, because one backward pass with random signs r (`probe_signs`) gives all of them: with
G = d/dW sum_t r_t . y_t,
    E[2 |G|^2] = tr H    and    E[2 G^T G] = B, the sum of the diagonal row blocks of H.
This holds with rotary positions, grouped heads, biases, query and key norms: y may be any function.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class GradientSums:
    """Sums over sequences and probes, so that `a + b` merges shards: `squares`, the sum of 2 |G|^2, fp64; `products`,
    the sum of 2 G^T G, fp32 `[in, in]`, or None; `passes`, the number of gradients."""

    squares: float
    products: Tensor | None
    passes: int

    def __add__(self, other: "GradientSums") -> "GradientSums":
        both = None
        if self.products is not None and other.products is not None:
            both = self.products + other.products
        return GradientSums(self.squares + other.squares, both, self.passes + other.passes)


def gradient_sums(gradients: Tensor, products: bool) -> GradientSums:
    """Add up one gradient per sequence, `[n, out, in]`."""
    squares = 2 * float(gradients.double().square().sum())
    flat = gradients.reshape(-1, gradients.shape[-1]).float()
    return GradientSums(squares, 2 * (flat.t() @ flat) if products else None, len(gradients))


def sequence_gradients(inputs: Tensor, upstream: Tensor, batch: int) -> Tensor:
    """G of every sequence `[n, out, in]` from the layer's inputs `[..., in]` and d loss / d output `[..., out]`.

    Rows belong to `batch` sequences of equal length. Where they do not divide (tokens routed to experts) they count as
    one sequence: signs of different sequences are independent, so the estimate stays unbiased.
    """
    x, g = inputs.reshape(-1, inputs.shape[-1]), upstream.reshape(-1, upstream.shape[-1])
    if inputs.dim() != 3 and len(x) % batch:
        batch = 1
    rows = x.unflatten(0, (batch, -1)).float()
    return g.unflatten(0, (batch, -1)).float().transpose(1, 2) @ rows


def probe_signs(shape: tuple[int, int], sequence: int, probe: int) -> Tensor:
    """r in {-1, +1} `[tokens, width]` of one sequence and probe, whatever batch the sequence is in."""
    generator = torch.Generator().manual_seed(sequence * 64 + probe)
    return 2.0 * torch.randint(0, 2, shape, generator=generator).float() - 1.0
