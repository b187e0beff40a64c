"""Trainable weights: worked examples and laws of SliM-LLM+, gradients, and the way from a sweep and back."""

from dataclasses import replace

import pytest
import torch

from bitquilt.core.types import group_slices
from bitquilt.layer.gptq_sweep import sweep
from bitquilt.layer.grids.uniform import RangeSearch, fit
from bitquilt.layer.hessian import factorize
from bitquilt.layer.nearest import round_to_nearest
from bitquilt.train.problem import Link, Rule, TrainingSamples, TrainingSettings
from bitquilt.train.rounding import Clipping, Rounding
from bitquilt.train.trainer import train

FP32 = {"scale_dtype": torch.float32}
RULES = (Rule(0.01, -0.5, 0.5), Rule(3e-3, low=0.5, high=2.0))


def row(*values):
    return torch.tensor([values], dtype=torch.float32)


def clipping(weight, bits, group_size=None, **options):
    groups = group_slices(weight.shape[1], group_size or weight.shape[1])
    return Clipping(weight, groups, [bits] * len(groups), **{**FP32, **options})


def test_worked_example_at_the_published_start():
    part = clipping(row(-0.6, -0.1, 0.3, 0.9), 2)
    swept = part.export(part.start)
    assert swept.codes.tolist() == [[0, 1, 2, 3]]
    assert swept.grids[0].scale.item() == pytest.approx(0.491007, abs=1e-6)
    assert swept.grids[0].zero.item() == 1
    assert swept.weight.tolist() == [pytest.approx([-0.491007, 0, 0.491007, 0.982014], abs=1e-5)]
    assert (part.original - swept.weight).square().sum().item() == pytest.approx(0.065089, abs=1e-5)


def test_all_positive_groups_keep_a_zero_that_can_be_stored():
    part = clipping(row(0.2, 0.5, 0.6, 0.8), 2, initial=40.0)
    swept = part.export(part.start)
    assert swept.grids[0].zero.item() == 0
    assert swept.weight.tolist() == [pytest.approx([0.266667, 0.533333, 0.533333, 0.8], abs=1e-5)]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_wide_open_logits_are_min_max(bits):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(bits))
    part = clipping(weight, bits, 16, initial=40.0)
    for group in group_slices(40, 16):
        expected = fit(weight[:, group], bits, **FP32).quantize(weight[:, group])
        torch.testing.assert_close(part.weight(part.start)[:, group], expected)


def test_one_bit_groups_start_at_the_published_levels():
    part = clipping(row(0.1, 0.2, 0.6, 1.1), 1)
    assert part.weight(part.start).tolist() == [pytest.approx([0, 0, 1, 1], abs=1e-5)]
    wider = (torch.full((1, 1), 1.0), torch.zeros(1, 1))
    half = 0.5 * (torch.sigmoid(torch.tensor(1.0)).item() + 0.5)
    expected = [0.5 - half, 0.5 - half, 0.5 + half, 0.5 + half]
    assert part.weight(wider).tolist() == [pytest.approx(expected, abs=1e-5)]
    torch.testing.assert_close(part.export(wider).weight, part.weight(wider))


def test_the_gradient_of_the_worked_example():
    """u = 1, l = 2, upstream [1, 2, 3, 4]: dL/du = -0.0515, dL/dl = -0.0183."""
    part = clipping(row(-0.6, -0.1, 0.3, 0.9), 2)
    values = tuple(torch.full((1, 1), v, requires_grad=True) for v in (1.0, 2.0))
    (part.weight(values) * row(1, 2, 3, 4)).sum().backward()
    assert values[0].grad.item() == pytest.approx(-0.0515, abs=1e-4)
    assert values[1].grad.item() == pytest.approx(-0.0183, abs=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_gradients_of_the_clipping_are_finite_differences_with_the_rounding_held(bits):
    """What is rounded is straight through and held here: the rounding error r = round(w/s) - w/s and the zero stay what
    they are while the scale moves, so that inside the range the value is s (w_0/s_0 + r) = s round(w_0/s_0)."""
    weight = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).double()
    part = clipping(weight, bits, scale_dtype=torch.float64)
    upstream = torch.randn(3, 12, generator=torch.Generator().manual_seed(1)).double()
    start = [torch.full((3, 1), v, dtype=torch.float64) for v in (0.7, 1.1)]
    values = tuple(v.clone().requires_grad_(True) for v in start)
    (part.weight(values) * upstream).sum().backward()

    def held(u, low):
        if bits == 1:
            return part.weight((u, low))  # linear in the spread: nothing is rounded but the sign
        base, zero = (value.squeeze(1) for value in part._range(tuple(start)))
        scale = part._range((u, low))[0].squeeze(1)
        code = torch.round(weight / base) + zero
        inside = (code >= 0) & (code <= 2**bits - 1)
        error = torch.round(weight / base) - weight / base
        return torch.where(inside, weight + scale * error, scale * (code.clamp(0, 2**bits - 1) - zero))

    step = 1e-6
    for i, value in enumerate(values):
        moved = []
        for sign in (1, -1):
            shifted = [v.clone() for v in start]
            shifted[i] += sign * step
            moved.append((held(*shifted) * upstream).sum(1))
        expected = (moved[0] - moved[1]) / (2 * step)
        found = torch.zeros(3, dtype=torch.float64) if value.grad is None else value.grad.squeeze(1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(params=[(2, True), (2, False), (3, False), (4, True)], ids=str)
def swept(request):
    bits, symmetric = request.param
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 40, generator=g) @ torch.randn(40, 40, generator=g)
    weight, groups = torch.randn(12, 40, generator=g), group_slices(40, 16)
    upper = factorize(x.t() @ x / 400, 0.01).upper
    found = sweep(weight, upper, groups, lambda _k, c: fit(c, bits, search=RangeSearch(), symmetric=symmetric))
    return found, groups


def test_training_starts_exactly_at_the_sweep(swept):
    found, groups = swept
    part = Rounding.of(found, groups, torch.float16, *RULES)
    back = part.export(part.start)
    assert torch.equal(back.codes, found.codes)
    torch.testing.assert_close(back.weight, found.weight)
    for one, other in zip(back.grids, found.grids, strict=True):
        assert torch.equal(one.scale, other.scale)
        assert (one.zero is None) == (other.zero is None)
        assert one.zero is None or torch.equal(one.zero, other.zero)


def test_the_weight_that_is_trained_is_the_weight_that_is_stored(swept):
    found, groups = swept
    part = Rounding.of(found, groups, torch.float16, *RULES)
    g = torch.Generator().manual_seed(3)
    values = tuple(v + 0.3 * (torch.rand(v.shape, generator=g) - 0.5) for v in part.start)
    stored = part.export(values)
    for k, group in enumerate(groups):
        decoded = stored.grids[k].decode(stored.codes[:, group].float())
        torch.testing.assert_close(decoded, part.weight(values)[:, group])
        assert stored.grids[k].scale.dtype == torch.float16
    assert not torch.equal(stored.codes, found.codes)


def test_an_offset_moves_a_code_by_at_most_one_step(swept):
    found, groups = swept
    part = Rounding.of(found, groups, torch.float16, *RULES)
    for offset in (-0.5, 0.5):
        offsets, scale = part.start
        moved = part.export((torch.full_like(offsets, offset), scale)).codes.int() - found.codes.int()
        assert int((moved * (1 if offset > 0 else -1)).min()) >= 0
        assert int(moved.abs().max()) == 1


def test_a_scale_moves_no_code(swept):
    found, groups = swept
    part = Rounding.of(found, groups, torch.float16, *RULES)
    offsets, scale = part.start
    moved = part.export((offsets, scale * 1.3))
    assert torch.equal(moved.codes, found.codes)
    torch.testing.assert_close(moved.weight, 1.3 * found.weight, rtol=2e-3, atol=1e-6)


def test_gradients_of_the_rounding_are_finite_differences_with_the_codes_held(swept):
    """Straight through: a code's derivative by its offset is 1 inside the range, 0 outside. By the scales, of which the
    value is a linear function, they are finite differences as they stand."""
    found, groups = swept
    part = Rounding.of(found, groups, torch.float32, *RULES)
    values = tuple(v.clone().requires_grad_(True) for v in part.start)
    upstream = torch.randn(found.codes.shape, generator=torch.Generator().manual_seed(1))
    (part.weight(values) * upstream).sum().backward()
    free = torch.where(part.symmetric, torch.floor(part.place) + 0.5, torch.round(part.place)) + part.zero
    inside, passing = (free >= 0) & (free <= part.top), part.groups.split(upstream)
    torch.testing.assert_close(values[0].grad, torch.where(inside, passing * part.scale, torch.zeros(())))
    step = 0.25
    for i in range(part.scale.shape[1]):
        moved = []
        for sign in (1, -1):
            factors = part.start[1].clone()
            factors[:, i] += sign * step
            moved.append((part.weight((part.start[0], factors)) * upstream).sum(1))
        expected = (moved[0] - moved[1]) / (2 * step)
        torch.testing.assert_close(values[1].grad[:, i, 0], expected, rtol=1e-3, atol=1e-4)


def test_free_one_bit_levels_are_refused():
    weight, groups = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), group_slices(8, 8)
    found = sweep(weight, torch.eye(8), groups, lambda _k, columns: fit(columns, 1, one_bit="code"))
    with pytest.raises(ValueError, match="one-bit groups with an offset"):
        Rounding.of(found, groups, torch.float16, *RULES)


def test_trained_rounding_finds_better_codes_than_the_nearest():
    """One layer on correlated inputs, from round to nearest; the error counts on samples that were not trained on."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 8, 24, generator=g) @ torch.randn(24, 24, generator=g)
    weight, groups = torch.randn(10, 24, generator=g), group_slices(24, 8)
    nearest = round_to_nearest(weight, groups, lambda _k, c: fit(c, 2, search=RangeSearch(), symmetric=True))
    part = Rounding.of(replace(nearest, compensated=weight), groups, torch.float16, Rule(1 / 210, -0.5, 0.5), RULES[1])
    targets = inputs @ weight.t()
    samples = TrainingSamples(64, lambda chosen: inputs[list(chosen)], (lambda chosen: targets[list(chosen)],))
    trained = train((Link(lambda w, x: x @ w["layer"].t(), {"layer": part}),), samples, TrainingSettings(30, 8))
    assert trained.best_loss < 0.95 * trained.start_loss
    stored = part.export(trained.values["layer"])
    assert not torch.equal(stored.codes, nearest.codes)
    error = (inputs @ (stored.weight - weight).t()).square().mean() / targets.square().mean()
    assert float(error) < trained.start_loss
