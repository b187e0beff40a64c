"""The corrected weight against plain least squares, in any column order, and where it must not move."""

import pytest
import torch

from bitquilt.core.types import Layer, LayerStats
from bitquilt.layer.hessian import factorize
from bitquilt.layer.target import check_repairs, corrected, layer_factor


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(0)
    full = torch.randn(500, 24, generator=g) @ torch.randn(24, 24, generator=g)
    here = full + 0.3 * torch.randn(500, 24, generator=g)
    weight = torch.randn(10, 24, generator=g)
    stream = torch.randn(500, 10, generator=g)
    stats = LayerStats(here.t() @ here, 500, here, (full - here).t() @ here, stream.t() @ here)
    return full, here, stream, Layer("layer", weight, None, stats)


@pytest.mark.parametrize("group_size", [None, 8])
def test_full_strength_is_the_least_squares_weight(problem, group_size):
    """a = r = 1 and no damp to speak of: the best weight on X for the full model's output and stream."""
    full, here, stream, layer = problem
    factor = layer_factor(layer.stats, 1e-7, group_size)
    aimed = full @ layer.weight.t() + stream
    best = torch.linalg.lstsq(here.double(), aimed.double()).solution.t().float()
    torch.testing.assert_close(corrected(layer, factor, 1.0, 1.0)[0].weight, best, rtol=1e-2, atol=1e-3)


def test_half_strength_moves_half_the_way(problem):
    layer = problem[3]
    factor = layer_factor(layer.stats, 0.01)
    whole = corrected(layer, factor, 1.0, 1.0)[0].weight - layer.weight
    half = corrected(layer, factor, 0.5, 0.5)[0].weight - layer.weight
    torch.testing.assert_close(half, 0.5 * whole, rtol=1e-4, atol=1e-5)
    separate = sum(corrected(layer, factor, *shares)[0].weight - layer.weight for shares in ((1.0, 0.0), (0.0, 1.0)))
    torch.testing.assert_close(separate, whole, rtol=1e-4, atol=1e-5)


def test_nothing_drifted_or_nothing_asked_is_the_weight_itself(problem):
    layer = problem[3]
    factor = layer_factor(layer.stats, 0.01)
    assert corrected(layer, factor, 0.0, 0.0) == (layer, ())
    still = LayerStats(layer.stats.hessian, 500, None, torch.zeros(24, 24))
    assert torch.equal(corrected(Layer("l", layer.weight, None, still), factor, 1.0, 1.0)[0].weight, layer.weight)


def test_unpaired_inputs_are_an_event(problem):
    layer = problem[3]
    bare = Layer("block.expert", layer.weight, None, LayerStats(layer.stats.hessian, 500))
    same, events = corrected(bare, layer_factor(bare.stats, 0.01), 0.5, 0.5)
    assert same is bare
    assert [(event.layer, event.kind) for event in events] == [("block.expert", "no full-precision inputs")]


def test_solve_is_the_inverse_of_the_damped_hessian(problem):
    hessian = problem[3].stats.hessian / 500
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    rows = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    for factor in (factorize(hessian, 0.01), factorize(hessian, 0.01, order)):
        torch.testing.assert_close(factor.solve(rows) @ damped, rows, rtol=1e-3, atol=1e-3)


def test_shares_are_checked():
    with pytest.raises(ValueError, match=r"stream_alpha is 1\.5; wanted a share"):
        check_repairs(1.0, 1.5)
    check_repairs(0.0, 0.0, 3, "attention")
    with pytest.raises(ValueError, match="hessian is 'attention'; alpha and stream_alpha repair"):
        check_repairs(0.0, 0.5, 0, "attention")
