"""Windows as the protocols say, and the loss of a token by hand."""

import math

import pytest
import torch

from bitquilt.errors import UserError
from bitquilt.report.evaluation.perplexity import Window, from_mean, nll, plan_windows


def test_the_standard_protocol_drops_the_partial_window() -> None:
    assert plan_windows(11, 4) == [Window(0, 4, 1), Window(4, 8, 5)]
    assert plan_windows(12, 4)[-1] == Window(8, 12, 9)


def test_the_strided_protocol_scores_each_token_once_and_uses_the_partial_window() -> None:
    assert plan_windows(9, 4, 2) == [Window(0, 4, 1), Window(2, 6, 4), Window(4, 8, 6), Window(6, 9, 8)]
    assert plan_windows(3, 4, 2) == [Window(0, 3, 1)]


@pytest.mark.parametrize("stride", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("tokens", [2, 7, 8, 9, 16, 17, 40])
def test_strided_targets_are_every_token_that_has_a_past(tokens: int, stride: int) -> None:
    planned = plan_windows(tokens, 8, stride)
    targets = [token for window in planned for token in range(window.first_target, window.end)]
    assert sorted(set(targets)) == targets
    # Only windows that do not overlap (stride = seq_len) leave a first token without a past.
    blind = set(range(0, tokens, 8)) if stride == 8 else {0}
    assert set(range(tokens)) - set(targets) == blind
    assert all(window.start < window.first_target < window.end for window in planned)
    assert all(window.first_target - window.start >= 8 - stride for window in planned[1:])


def test_plans_that_cannot_be() -> None:
    with pytest.raises(UserError, match="has 3 tokens, and one window needs 4"):
        plan_windows(3, 4)
    with pytest.raises(UserError, match="seq_len is 1"):
        plan_windows(3, 1)
    for stride in (0, 5):
        with pytest.raises(UserError, match=f"stride is {stride}; wanted 1 to seq_len, which is 4"):
            plan_windows(30, 4, stride)
    with pytest.raises(UserError, match="has 1 token"):
        plan_windows(1, 4, 2)


def test_the_loss_of_a_token_by_hand() -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log()
    torch.testing.assert_close(nll(log_probs, torch.tensor([1, 2])), torch.tensor([math.log(4), -math.log(0.8)]))


def test_perplexity_of_a_mean() -> None:
    assert from_mean(math.log(7.0)) == pytest.approx(7.0)
    assert from_mean(1e4) == math.inf
