"""Trained ranges of stored weights: what is trained is what is stored, and the gradients are those of finite steps."""

import pytest
import torch

from bitquilt.core.types import QuantizedWeight
from bitquilt.train.ranges import Ranges
from tests.weights import make_weight, naive_dense, uniform_segment

KINDS = ["mixed", "mixed_ragged", "reordered", "outliers", "one_bit", "five_bits", "ragged", "bfloat16_scales"]


def moved(part):
    g = torch.Generator().manual_seed(3)
    return tuple(value * (0.7 + 0.6 * torch.rand(value.shape, generator=g)) for value in part.start)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_is_stored(kind):
    stored = make_weight(kind)
    part = Ranges(stored, 1e-2)
    torch.testing.assert_close(part.weight(part.start), naive_dense(stored), rtol=1e-6, atol=1e-6)
    values = moved(part)
    found = part.export(values)
    assert found.layout == stored.layout
    torch.testing.assert_close(part.weight(values), naive_dense(found), rtol=1e-6, atol=1e-6)
    for before, after in zip(stored.segments, found.segments, strict=True):
        assert before.codes is after.codes
        assert not torch.equal(before.scale, after.scale)
        assert (before.zero is after.zero) == (before.zero is None or before.format.bits > 1)


def test_gradients_are_those_of_finite_steps():
    """With fp32 scales, whose rounding is finer than the steps: through the storage type they go straight."""
    part = Ranges(QuantizedWeight((uniform_segment(2, 20, 8, scale_dtype=torch.float32),)), 1e-2)
    values = moved(part)[0].requires_grad_()
    pull = torch.randn(part.weight(part.start).shape, generator=torch.Generator().manual_seed(4))
    (part.weight((values,)) * pull).sum().backward()
    for k in range(values.shape[1]):
        step = torch.zeros_like(values)
        step[0, k] = 0.25  # linear in the factor: any step will do
        up, down = ((part.weight(((values + s).detach(),)) * pull).sum() for s in (step, -step))
        assert float(values.grad[0, k]) == pytest.approx(float(up - down) / 0.5, rel=1e-3, abs=1e-4)


def test_levels_without_a_range_are_refused():
    with pytest.raises(ValueError, match="only uniform grids"):
        Ranges(make_weight("codebook"), 1e-2)
