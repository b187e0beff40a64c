"""One-dimensional k-means: both bodies against brute force, each other and another implementation."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquilt.layer.grids.kmeans import exact_kmeans, kmeans_reference
from bitquilt.ops import cpu_kernels


def reference(values, weights, k):
    found = kmeans_reference(values.t().contiguous(), weights.t().contiguous(), k)
    return tuple(tensor.t().contiguous() for tensor in found)


BODIES = [exact_kmeans, reference]


def squared_error(values: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of `values` `[n, columns]` to the nearest of `centroids` `[k, columns]`, `[columns]`."""
    distance = (values.unsqueeze(0) - centroids.unsqueeze(1)).square().amin(dim=0)
    return (distance * weights).sum(dim=0)


def brute_force(values, weights, k):
    """Least weighted squared error over every way to cut the sorted values into k intervals, empty ones too."""
    n, best = len(values), float("inf")
    for cuts in itertools.combinations_with_replacement(range(n + 1), k - 1):
        edges, error = (0, *cuts, n), 0.0
        for a, b in itertools.pairwise(edges):
            x, w = values[a:b], weights[a:b]
            if float(w.sum()) > 0:
                error += float((w * (x - (w * x).sum() / w.sum()).square()).sum())
        best = min(best, error)
    return best


def weights_like(seed, out, width):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=g, dtype=torch.float64).sort(dim=0).values


@pytest.mark.parametrize("body", BODIES)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-20, 20), st.integers(0, 3)), min_size=1, max_size=9),
    st.integers(1, 4),
)
def test_the_programme_finds_the_optimum(body, points, k):
    values = torch.tensor(sorted(p[0] for p in points), dtype=torch.float64) / 7
    weights = torch.tensor([p[1] for p in points], dtype=torch.float64)
    centroids, boundaries = body(values[:, None], weights[:, None], k)
    assert (centroids.shape, boundaries.shape) == ((k, 1), (k + 1, 1))
    assert bool((centroids.diff(dim=0) >= 0).all())
    assert (int(boundaries[0]), int(boundaries[-1])) == (0, len(points))
    found = float(squared_error(values[:, None], weights[:, None], centroids))
    assert found == pytest.approx(brute_force(values, weights, k), abs=1e-12)


@pytest.mark.parametrize("body", BODIES)
def test_columns_are_independent_and_batches_do_not_show(body, monkeypatch):
    values = weights_like(0, 50, 9)
    weights = torch.rand(50, 9, dtype=torch.float64)
    together = body(values, weights, 6)
    monkeypatch.setattr("bitquilt.layer.grids.kmeans._BATCH_ELEMENTS", 100)
    apart = body(values, weights, 6)
    alone = body(values[:, 3:4], weights[:, 3:4], 6)
    for one, other, single in zip(together, apart, alone, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[:, 3:4], single)


def test_exact_centroids_are_means_and_assignment_is_nearest():
    values, ones = weights_like(3, 200, 1), torch.ones(200, 1, dtype=torch.float64)
    centroids, boundaries = exact_kmeans(values, ones, 7)
    nearest = (values - centroids.t()).abs().argmin(dim=1)
    for c in range(7):
        members = values[int(boundaries[c]) : int(boundaries[c + 1])]
        assert float(centroids[c]) == pytest.approx(float(members.mean()))
        assert set(nearest[int(boundaries[c]) : int(boundaries[c + 1])].tolist()) == {c}


@pytest.mark.parametrize(("n", "k"), [(500, 4), (2000, 16)])
def test_as_good_as_ckmeans(n, k):
    ckwrap = pytest.importorskip("ckwrap", reason="ckwrap (LGPL) is a test-only dependency")
    values, ones = weights_like(n, n, 1), torch.ones(n, 1, dtype=torch.float64)
    found = float(squared_error(values, ones, exact_kmeans(values, ones, k)[0]))
    theirs = ckwrap.ckmeans(values[:, 0].numpy(), (k, k))
    assert found == pytest.approx(float(theirs.withinss.sum()), rel=1e-9)


@pytest.mark.skipif(cpu_kernels.level() == cpu_kernels.REFERENCE, reason="the native kernels are not built")
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 4), (7, 9), (300, 1), (300, 2), (301, 3), (4096, 16), (513, 256)])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_native_body_is_the_definition(n, k, threads):
    values, g = weights_like(n, n, 5), torch.Generator().manual_seed(k)
    weights = torch.rand(n, 5, generator=g, dtype=torch.float64)
    weights[torch.rand(n, 5, generator=g) < 0.1] = 0
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        native = exact_kmeans(values, weights, k)
    finally:
        torch.set_num_threads(before)
    plain = reference(values, weights, k)
    torch.testing.assert_close(
        squared_error(values, weights, native[0]), squared_error(values, weights, plain[0]), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(native[0], plain[0], rtol=1e-9, atol=1e-9)
    assert (native[1].dtype, native[1].shape) == (plain[1].dtype, plain[1].shape)
    assert bool((native[1].diff(dim=0) >= 0).all())


@pytest.mark.parametrize("body", BODIES)
def test_columns_without_mass_or_spread(body):
    values = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
    weights = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 0.5]], dtype=torch.float64)
    centroids, _ = body(values, weights, 2)
    assert centroids[:, 0].tolist() == [0.0, 0.0]
    assert centroids[:, 1].tolist() == [5.0, 5.0]


def test_nothing_to_cluster_is_an_error():
    with pytest.raises(ValueError, match="k is 0"):
        exact_kmeans(torch.zeros(3, 1), torch.ones(3, 1), 0)
    with pytest.raises(ValueError, match=r"values is \[0, 2\]"):
        exact_kmeans(torch.zeros(0, 2), torch.ones(0, 2), 2)
    if cpu_kernels.level() != cpu_kernels.REFERENCE:
        with pytest.raises(ValueError, match="70000 clusters"):
            exact_kmeans(torch.zeros(3, 1), torch.ones(3, 1), 70000)
    assert exact_kmeans(torch.zeros(3, 0), torch.ones(3, 0), 2)[0].shape == (2, 0)
