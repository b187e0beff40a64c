"""The search objective: incremental equals full recomputation, KL by its definition, batch effects, small errors."""

import pytest
import torch

from bitquilt.allocation.double_pointer import pair_candidates, pairs
from bitquilt.core.types import group_slices
from bitquilt.layer.sensitivity.output_divergence import pair_losses


def kl(p_logits, q_logits):
    p, q = torch.log_softmax(p_logits.double(), -1), torch.log_softmax(q_logits.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture
def layer():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 44, generator=g) / 4
    x = torch.randn(700, 44, generator=g)  # more than one chunk of tokens
    bias = torch.randn(20, generator=g)
    noise = {b: weight + torch.randn(20, 44, generator=g) / 2 ** (b + 2) for b in (1, 2, 3)}
    return x, weight, bias, noise


def steps(weight, noise, ranking, groups):
    return [
        (groups[k], noise[b][:, groups[k]] - noise[2][:, groups[k]])
        for low, high in pairs(ranking)
        for k, b in ((low, 1), (high, 3))
    ]


@pytest.mark.parametrize("objective", ["kl", "kl_reverse"])
def test_incremental_search_equals_recomputing_every_candidate(layer, objective):
    x, weight, bias, noise = layer
    groups = group_slices(44, 8)
    ranking = [3.0, 1.0, 5.0, 0.5, 2.0, 4.0]
    found = pair_losses(x, weight, bias, noise[2], steps(weight, noise, ranking, groups), objective).tolist()
    expected = []
    for bits in pair_candidates(ranking, 2):
        quantized = torch.cat([noise[b][:, g] for b, g in zip(bits, groups, strict=True)], dim=1)
        right = x @ weight.t() + bias
        if objective == "kl":
            expected.append(kl(right, x @ quantized.t() + bias))
        else:
            p = torch.softmax(right, -1).clamp(min=1e-6)
            q = torch.softmax(x @ quantized.t(), -1).clamp(min=1e-6)
            expected.append(float((q * (q.log() - p.log())).sum(-1).double().mean()))
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_worked_kl():
    """P = [.7, .2, .1], Q = [.6, .3, .1]: KL(P, Q) = 0.026812."""
    p, q = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.6, 0.3, 0.1]).log()
    found = pair_losses(torch.ones(1, 1), p[:, None], None, q[:, None], [])
    assert found.item() == pytest.approx(0.026812, abs=1e-6)


def test_small_errors_keep_their_digits():
    """KL -> (sum P d^2 - (sum P d)^2) / 2, far below what differences of log-softmaxes resolve in fp32."""
    g = torch.Generator().manual_seed(1)
    weight, x = torch.randn(50, 16, generator=g), torch.randn(64, 16, generator=g)
    error = 1e-4 * torch.randn(50, 16, generator=g)
    p = torch.softmax((x @ weight.t()).double(), -1)
    d = (x @ (weight + error - weight).t()).double()
    expected = float((((p * d * d).sum(-1) - (p * d).sum(-1) ** 2) / 2).mean())
    assert pair_losses(x, weight, None, weight + error, []).item() == pytest.approx(expected, rel=1e-3)


def test_huge_errors_stay_finite():
    weight, x = torch.randn(8, 4), torch.randn(16, 4)
    assert torch.isfinite(pair_losses(x, weight, None, weight + 1e4 * torch.randn(8, 4), [])).all()


def test_a_constant_added_to_every_output_costs_nothing():
    weight, x = torch.randn(8, 4), torch.ones(5, 4)
    assert pair_losses(x, weight, None, weight + 0.5, []).item() == pytest.approx(0.0, abs=1e-6)
