"""Trained levels of stored weights: what is trained is what is stored, codes follow offsets, gradients are right."""

from dataclasses import replace

import pytest
import torch

from bitquilt.layer.codebook_weight import LevelTables, sweep_channels
from bitquilt.layer.hessian import factorize
from bitquilt.train.levels import LevelRounding
from bitquilt.train.problem import Link, Rule, TrainingSamples, TrainingSettings
from bitquilt.train.trainer import train
from tests.weights import make_weight, naive_dense

ROUNDING, SCALING = Rule(1e-2, -0.5, 0.5), Rule(1e-2, low=0.5, high=2.0)
FP32 = {"dtype": torch.float32, "gain_dtype": torch.float32, "row_gain_dtype": torch.float32}
TABLES = {
    "shared": LevelTables(),
    "rows": LevelTables(row_gain_dtype=torch.float8_e4m3fn),
    "channel": LevelTables("channel"),
    "fp32": LevelTables(**FP32),
}


def swept(tables, out=24, width=20, seed=0, compensated=True):
    """A layer of one to four bits per channel, one channel of zeros, and the input it was swept for."""
    g = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(out, width, generator=g), torch.randn(300, width, generator=g)
    weight[:, 3] = 0.0
    x[:, 1:] += 0.5 * x[:, :-1]
    bits = [1 + (j * 7) % 4 for j in range(width)]
    hessian = x.t() @ x / 300 if compensated else torch.eye(width)
    factor = factorize(hessian, 0.01, torch.arange(width).flip(0))
    nothing = torch.zeros_like(weight, dtype=torch.bool)
    stored, _, aim = sweep_channels(weight, bits, tables, nothing, torch.ones(width), factor)
    return stored, aim, weight, x


def moved(part):
    g = torch.Generator().manual_seed(3)
    offset, shift, gains, rows = part.start
    return (
        offset + torch.rand(offset.shape, generator=g) - 0.5,
        shift + 0.9 * torch.rand(shift.shape, generator=g) - 0.45,
        gains * (0.7 + 0.6 * torch.rand(gains.shape, generator=g)) if part.rules[2].rate else gains,
        rows * (0.7 + 0.6 * torch.rand(rows.shape, generator=g)) if part.rules[3].rate else rows,
    )


@pytest.mark.parametrize("kind", ["codebook", "shared_table", "tables_of_three"])
def test_any_codebook_starts_at_what_is_stored(kind):
    """Levels in no order, an aim that has nothing to do with the codes."""
    stored = make_weight(kind)
    part = LevelRounding.of(stored, torch.randn(naive_dense(stored).shape), ROUNDING, SCALING)
    assert torch.equal(part.weight(part.start), naive_dense(stored))
    again, _ = part.export(part.start)
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(again.segments, stored.segments, strict=True))


@pytest.mark.parametrize("kind", TABLES)
def test_what_is_trained_is_what_is_stored(kind):
    stored, aim, *_ = swept(TABLES[kind])
    part = LevelRounding.of(stored, aim, ROUNDING, SCALING)
    torch.testing.assert_close(part.weight(part.start), naive_dense(stored), rtol=1e-6, atol=1e-6)
    values = moved(part)
    found, moved_aim = part.export(values)
    assert found.layout == stored.layout
    torch.testing.assert_close(part.weight(values), naive_dense(found), rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(a.codes, b.codes) for a, b in zip(found.segments, stored.segments, strict=True))
    assert all(bool((s.scale.float().diff(dim=1) >= 0).all()) for s in found.segments)
    # training goes on from there: the weight is its start, and a weight's place is where it was left
    onward = LevelRounding.of(found, moved_aim, ROUNDING, SCALING)
    torch.testing.assert_close(onward.weight(onward.start), naive_dense(found), rtol=1e-6, atol=1e-6)
    if kind == "fp32":
        live = (part.unit[part.base] * part.gains > 0).expand_as(part.place)
        torch.testing.assert_close(onward.place[live], (part.place + values[0])[live], rtol=1e-3, atol=1e-3)


def test_a_code_follows_its_offset_and_stops_at_the_last_level():
    stored, aim, *_ = swept(TABLES["shared"])
    part = LevelRounding.of(stored, aim, ROUNDING, SCALING)
    codes = torch.cat([s.codes for s in stored.segments], dim=1)
    for step in (1, -1, 9):
        found, _ = part.export((part.start[0] + step, *part.start[1:]))
        top = torch.cat([torch.full((s.codes.shape[1],), 2**s.format.bits - 1) for s in stored.segments])
        after = torch.cat([s.codes for s in found.segments], dim=1)
        inside = (codes > 0) & (codes < top)  # beyond the ends a weight may be further away than a step
        wanted = torch.minimum((codes.int() + step).clamp_min(0), top)
        assert torch.equal(after.int()[inside], wanted[inside].int())
    assert torch.equal(after.int(), top.int().expand_as(after)) is False  # far above the last level stays there
    assert bool((after <= top).all())


def test_gradients_of_levels_and_gains_are_those_of_finite_steps():
    """With fp32 storage: through a storage type gradients go straight."""
    stored, aim, *_ = swept(TABLES["fp32"])
    part = LevelRounding.of(stored, aim, ROUNDING, SCALING)
    pull = torch.randn(aim.shape, generator=torch.Generator().manual_seed(4))
    start = part.start
    values = (start[0], *(v.clone().requires_grad_() for v in start[1:]))
    (part.weight(values) * pull).sum().backward()
    for i in (1, 2, 3):
        for k in range(0, len(start[i]), 3):
            step = torch.zeros_like(start[i])
            step[k] = 0.25  # linear in each: any step will do
            pair = ((*start[:i], start[i] + s, *start[i + 1 :]) for s in (step, -step))
            up, down = ((part.weight(v) * pull).sum() for v in pair)
            assert float(values[i].grad[k]) == pytest.approx(float(up - down) / 0.5, rel=1e-3, abs=1e-3)


def test_an_offset_has_the_slope_between_its_two_levels_and_none_outside():
    stored, aim, *_ = swept(TABLES["fp32"])
    part = LevelRounding.of(stored, aim, ROUNDING, SCALING)
    offset = part.start[0].clone().requires_grad_()
    part.weight((offset, *part.start[1:])).sum().backward()
    free = part.place.round()
    assert bool((offset.grad[(free < 0) | (free > part.top)] == 0).all())
    inside = (part.place > 0) & (part.place < part.top)
    below = part.place.floor().long()
    apart = (
        part.table[(part.base + below + 1).clamp_max(len(part.table) - 1)]
        - part.table[(part.base + below).clamp(0, len(part.table) - 1)]
    )
    slope = apart * part.gains * part.row_gains
    torch.testing.assert_close(offset.grad[inside], slope[inside], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["shared", "rows", "channel"])
def test_training_finds_a_better_weight(kind):
    """Of weights that were rounded one by one, with no eye on each other: errors on samples not trained on fall."""
    stored, aim, weight, x = swept(TABLES[kind], compensated=False)
    samples = x[:256].reshape(64, 4, 20)
    part = LevelRounding.of(stored, aim, replace(ROUNDING, rate=2e-3), replace(SCALING, rate=3e-3))
    link = Link(lambda weights, hidden: torch.tanh(hidden @ weights["layer"].t()), {"layer": part})
    target = torch.tanh(samples @ weight.t())
    data = TrainingSamples(64, lambda chosen: samples[list(chosen)], (lambda chosen: target[list(chosen)],))
    trained = train((link,), data, TrainingSettings(10, 4, betas=(0.9, 0.99)))
    assert trained.best_loss < 0.97 * trained.start_loss


def test_what_has_no_levels_of_its_own_is_refused():
    stored, aim, *_ = swept(TABLES["shared"])
    for other in (replace(stored, outliers=make_weight("outliers").outliers), make_weight("mixed")):
        with pytest.raises(ValueError, match="only codebooks without outliers"):
            LevelRounding.of(other, aim, ROUNDING, SCALING)
