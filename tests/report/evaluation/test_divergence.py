"""KL and agreement of small distributions, by hand."""

import math

import numpy as np
import pytest
import torch

from bitquilt.report.evaluation.divergence import kl_divergence, same_top1, summarize


def test_kl_by_hand_and_its_direction() -> None:
    reference = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    model = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    forward = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.9 * math.log(1.8) + 0.1 * math.log(0.2)]
    torch.testing.assert_close(kl_divergence(reference, model), torch.tensor(forward))
    assert not torch.allclose(kl_divergence(model, reference), torch.tensor(forward))


def test_kl_of_a_distribution_with_itself_is_zero_and_never_below() -> None:
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    log_probs = logits.log_softmax(-1)
    assert (kl_divergence(log_probs, log_probs) == 0).all()
    assert (kl_divergence(log_probs, (logits + 1e-6).log_softmax(-1)) >= 0).all()


def test_top1_agreement() -> None:
    reference = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9]]).log()
    model = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]]).log()
    assert same_top1(reference, model).tolist() == [True, False, True]


def test_the_summary() -> None:
    kl = torch.arange(101, dtype=torch.float32).flip(0) ** 2
    far = summarize(kl, torch.tensor([True, True, True, False]))
    assert far.kl_mean == pytest.approx(np.mean(np.arange(101.0) ** 2))
    assert (far.kl_median, far.kl_p99, far.kl_max) == pytest.approx((2500.0, 9801.0, 10000.0))
    assert far.top1_agreement == 0.75
