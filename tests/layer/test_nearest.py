"""Symmetric groups for tables that are read row by row."""

import pytest
import torch

from bitquilt.core.packing import bits_per_weight
from bitquilt.layer.nearest import round_symmetric


@pytest.mark.parametrize(("bits", "bpw"), [(2, 2.5), (4, 4.5), (8, 8.5)])
def test_every_value_is_near_a_level_and_costs_what_it_says(bits, bpw):
    weight = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    stored = round_symmetric(weight, bits, 32)
    assert bits_per_weight(stored.layout) == bpw
    (segment,) = stored.segments
    step = segment.scale.float().repeat_interleave(32, 1)
    rounded = step * (segment.codes - (2**bits - 1) / 2)
    inside = weight.abs() <= step * (2**bits - 1) / 2
    assert bool(((rounded - weight).abs() <= step / 2 + 1e-6)[inside].all())
    full = weight.view(50, 3, 32).abs().amax(2).repeat_interleave(32, 1) * 2 / (2**bits - 1)
    min_max = full * (torch.floor(weight / full + 2 ** (bits - 1)).clamp(0, 2**bits - 1) - (2**bits - 1) / 2)
    assert (rounded - weight).square().sum() <= (min_max - weight).square().sum() * (1 + 1e-3)


def test_zero_rows_ragged_groups_and_many_rows(monkeypatch):
    monkeypatch.setattr("bitquilt.layer.nearest._ROWS", 7)
    weight = torch.randn(20, 40, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    stored = round_symmetric(weight, 4, 32)
    (segment,) = stored.segments
    assert segment.scale.shape == (20, 2)
    assert bool(torch.isfinite(segment.scale.float()).all())
    rounded = segment.scale.float().repeat_interleave(32, 1)[:, :40] * (segment.codes - 7.5)
    assert float(rounded[3].abs().max()) < 1e-3
    assert float((rounded - weight).square().mean() / weight.square().mean()) < 0.02
    whole = round_symmetric(weight[5:12], 4, 32)
    assert torch.equal(whole.segments[0].codes, segment.codes[5:12])
