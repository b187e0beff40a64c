"""Thresholds, bands, shares, parts: the worked numbers, invariances and the budget."""

import itertools

import pytest
import torch

from bitquilt.layer.sensitivity.activation import part_sizes, partition, published_threshold
from bitquilt.ops.microscaling import E2M1, E2M3, E3M2

PUBLISHED = (published_threshold(4, 6.0, 1), published_threshold(6, 28.0, 3))


def bands(sample: torch.Tensor, four: float, six: float) -> torch.Tensor:
    """Bits of every element of `sample` `[T, in]`: 4 up to `four` M_t, 6 up to `six` M_t, else 8; uint8 `[T, in]`."""
    size = sample.abs()
    largest = size.amax(dim=1, keepdim=True)
    found = torch.full(size.shape, 8, dtype=torch.uint8, device=sample.device)
    found[size <= six * largest] = 6
    found[size <= four * largest] = 4
    return found


def sample(width=256, tokens=300, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=g) * torch.exp(1.5 * torch.randn(width, generator=g))


def test_thresholds():
    assert PUBLISHED[0] == pytest.approx(0.010499, abs=5e-7)
    assert PUBLISHED[1] == pytest.approx(0.035996, abs=5e-7)
    assert published_threshold(6, 7.5, 1) == pytest.approx(0.033596, abs=5e-7)
    for element in (E2M1, E3M2, E2M3):
        assert published_threshold(element.bits, element.largest, element.paper_exponent) > 0


def test_the_worked_token():
    token = torch.tensor([[8, 0.05, 0.2, 1.0]])
    assert 8 * PUBLISHED[0] == pytest.approx(0.08399, abs=1e-5)
    assert 8 * PUBLISHED[1] == pytest.approx(0.28796, abs=1e-5)
    assert bands(token, *PUBLISHED).tolist() == [[8, 4, 6, 8]]
    assert bands(-token, *PUBLISHED).tolist() == [[8, 4, 6, 8]]


def test_shares_are_those_of_the_bands():
    x = sample()
    found = partition(x, PUBLISHED)
    counted = [float((bands(x, *PUBLISHED) == width).float().mean()) for width in (4, 6, 8)]
    assert found.shares == pytest.approx(counted, abs=1e-6)
    assert sum(found.shares) == pytest.approx(1)


@pytest.mark.parametrize("width", [1, 31, 32, 44, 96, 128, 200, 256, 1024])
def test_parts_fill_the_layer_in_whole_blocks(width):
    found = partition(sample(width), PUBLISHED)
    assert sum(found.sizes) == width
    assert sorted(found.order.tolist()) == list(range(width))
    alignment = 32 if width % 128 else 128
    n4, n6, n8 = found.sizes
    assert n8 % alignment == 0 or n8 == width
    assert n6 % alignment == 0 or n8 + n6 == width
    assert n4 >= 0
    assert sorted(_by_channel(found).tolist()) == [4] * n4 + [6] * n6 + [8] * n8


def _by_channel(found):
    """Bits per channel, from those of blocks of 32 from the loudest on."""
    loudest = found.order.flip(0)
    bits = torch.empty_like(loudest)
    for block, width in zip(loudest.split(32), found.bits(32), strict=True):
        bits[block] = width
    return bits


def test_part_sizes():
    assert part_sizes(4096, (0.6, 0.3, 0.1)) == (2304, 1280, 512)
    assert part_sizes(1280, (0.6, 0.3, 0.1)) == (768, 384, 128)
    assert part_sizes(128, (0.1, 0.5, 0.4)) == (0, 0, 128)
    assert part_sizes(96, (0.0, 1.0, 0.0)) == (0, 96, 0)
    assert part_sizes(44, (0.5, 0.4, 0.1)) == (0, 12, 32)
    assert part_sizes(5, (1.0, 0.0, 0.0)) == (5, 0, 0)


def test_the_largest_channels_take_the_most_bits():
    x = sample()
    found = partition(x, PUBLISHED)
    means = x.abs().mean(dim=0)
    assert torch.equal(means[found.order], means.sort().values)
    by_bits = [means[_by_channel(found) == width] for width in (4, 6, 8)]
    present = [part for part in by_bits if len(part)]
    assert all(float(low.max()) <= float(high.min()) for low, high in itertools.pairwise(present))


def test_sign_and_scale_change_nothing():
    x = sample()
    one = partition(x, PUBLISHED)
    for other in (-x, 8 * x, x * torch.where(torch.arange(300) % 2 == 0, 1.0, -1.0).unsqueeze(1)):
        again = partition(other, PUBLISHED)
        assert again.sizes == one.sizes
        assert torch.equal(again.order, one.order)


def test_the_mean_falls_as_the_thresholds_grow_and_a_target_is_met():
    x = sample(1024)
    means = []
    for multiplier in (0, 0.1, 0.5, 1, 2, 8, 100):
        shares = partition(x, PUBLISHED, multiplier=multiplier).shares
        means.append(sum(w * s for w, s in zip((4, 6, 8), shares, strict=True)))
    assert means == sorted(means, reverse=True)
    assert means[0] == pytest.approx(8, abs=1e-6)
    assert means[-1] == 4
    for target in (4, 4.5, 5.5, 7, 8):
        found = partition(x, PUBLISHED, target=target)
        mean = sum(w * s for w, s in zip((4, 6, 8), found.shares, strict=True))
        assert mean <= target + 1e-9
        assert mean == pytest.approx(target, abs=0.01)


def test_padding_tokens_do_not_count():
    x = sample()
    padded = torch.cat([x, torch.zeros(500, 256)])
    assert partition(padded, PUBLISHED).shares == partition(x, PUBLISHED).shares
    assert partition(torch.zeros(9, 256), PUBLISHED).sizes == (256, 0, 0)


def test_a_token_is_measured_against_its_own_largest():
    """One huge token must not push the others into the band of four bits."""
    x = sample()
    with_sink = torch.cat([x, torch.full((1, 256), 1e-3)])
    with_sink[-1, 0] = 1e6
    one, other = partition(x, PUBLISHED).shares, partition(with_sink, PUBLISHED).shares
    assert other == pytest.approx(one, abs=1 / 150)


def test_channels_are_ranked_by_the_loudest_run():
    x = torch.ones(100, 64)
    x[:, 0] = 3  # steady
    x[:10, 1] = 20  # mean 2.9, but 20 in the first run of ten
    assert partition(x, PUBLISHED, runs=1).order[-1] == 0
    assert partition(x, PUBLISHED, runs=10).order[-1] == 1
    assert partition(x[:3], PUBLISHED, runs=10).order.shape == (64,)


def test_inputs_that_are_not_finite_are_an_error():
    x = sample()
    x[3, 4] = float("inf")
    with pytest.raises(ValueError, match="the layer's input holds NaN or Inf"):
        partition(x, PUBLISHED)
