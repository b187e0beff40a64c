"""The column graph: the worked adjacency, its spectrum, groups, invariances, dead columns."""

import pytest
import torch

from bitquilt.core.types import LayerStats, group_slices
from bitquilt.layer.hessian import factorize
from bitquilt.layer.sensitivity.column_graph import adjacency, column_features


def make(width=24, tokens=200, dead=()):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=g) * torch.linspace(0.3, 2, width)
    x[:, list(dead)] = 0
    weight = torch.randn(10, width, generator=g)
    return weight, LayerStats(x.t() @ x, tokens, x), factorize(x.t() @ x / tokens, 0.01)


def test_the_worked_adjacency():
    upper = torch.tensor([[1, 0.5, 0], [0, 1, 0.25], [0, 0, 2]])
    found = adjacency(upper).to_dense()
    expected = torch.tensor([[0.66667, 0.31527, 0], [0.31527, 0.59638, 0.12585], [0, 0.12585, 0.84978]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    values = torch.linalg.eigvalsh(found.double())
    assert float(values[-1]) == pytest.approx(1.0)
    assert float(values[0]) > -1


def test_only_the_strongest_edges_are_kept_and_the_spectrum_stays():
    _, _, factor = make()
    for top in (1, 4, 100):
        found = adjacency(factor.upper, top=top).to_dense()
        assert torch.equal(found, found.t())
        assert int((found > 0).sum(dim=1).min()) >= 2
        values = torch.linalg.eigvalsh(found.double())
        assert float(values[-1]) == pytest.approx(1.0, abs=1e-5)
        assert float(values[0]) > -1
    sparse = adjacency(factor.upper, top=1).to_dense()
    assert int((sparse > 0).sum()) <= 24 + 2 * 24


def test_groups_are_nodes_whose_edges_are_the_mean_of_their_columns():
    _, _, factor = make(width=20)
    groups = group_slices(20, 8)  # the last is narrower
    found = adjacency(factor.upper, groups).to_dense()
    assert found.shape == (3, 3)
    root = factor.upper.diagonal().sqrt()
    strength = factor.upper.abs() / root[:, None] / root
    a, b, c = (float(strength[i, j].mean()) for i, j in ((groups[0], groups[1]), (groups[0], groups[2]),
                                                         (groups[1], groups[2])))  # fmt: skip
    plain = torch.tensor([[1, a, b], [a, 1, c], [b, c, 1]])
    degree = plain.sum(dim=1).rsqrt()
    torch.testing.assert_close(found, plain * degree[:, None] * degree)


def test_a_node_alone_has_a_loop():
    assert adjacency(torch.eye(3)).to_dense().tolist() == torch.eye(3).tolist()
    assert adjacency(torch.eye(4), group_slices(4, 8)).to_dense().tolist() == [[1.0]]


@pytest.mark.parametrize("group_size", [1, 8])
def test_features_are_standardised_and_see_no_scale(group_size):
    weight, stats, factor = make(dead=(3,))
    groups = group_slices(24, group_size)
    found = column_features(weight, stats, factor, groups)
    assert found.shape == (len(groups), 8)
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.square().mean(dim=0), torch.ones(8))
    scaled = LayerStats(64 * stats.hessian, stats.tokens, stats.sample)
    assert torch.equal(column_features(weight, scaled, factorize(64 * stats.hessian / 200, 0.01), groups), found)
    torch.testing.assert_close(column_features(100 * weight, stats, factor, groups), found)


def test_features_of_one_group_or_of_equal_columns_are_zero():
    weight, stats, factor = make()
    assert not column_features(weight, stats, factor, group_slices(24, 32)).any()
    same = column_features(torch.ones(4, 24), stats, factor, group_slices(24, 1))
    assert not same[:, :4].any()


def test_without_a_sample_the_inputs_size_comes_from_the_hessian():
    weight, stats, factor = make()
    found = column_features(weight, LayerStats(stats.hessian, stats.tokens), factor, group_slices(24, 4))
    assert bool(torch.isfinite(found).all())
