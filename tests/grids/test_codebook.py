"""One-dimensional k-means: the optimum against brute force and another implementation, the laws, the edges."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquilt.grids import uniform
from bitquilt.grids.codebook import CodebookGrid, exact_kmeans, fit_codebook, lloyd, squared_error

COLUMN = torch.tensor([[-1.0, -0.9, -0.1, 0.0, 0.1, 0.8, 1.2, 5.0]]).t()


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


def error_of(weight, grid, mass=None):
    error = (weight - grid.quantize(weight)).double().square()
    return float((error if mass is None else error * mass).sum())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-20, 20), st.integers(0, 3)), min_size=1, max_size=9),
    st.integers(1, 4),
)
def test_the_programme_finds_the_optimum(points, k):
    values = torch.tensor(sorted(p[0] for p in points), dtype=torch.float64) / 7
    weights = torch.tensor([p[1] for p in points], dtype=torch.float64)
    centroids, boundaries = exact_kmeans(values[:, None], weights[:, None], k)
    assert (centroids.shape, boundaries.shape) == ((k, 1), (k + 1, 1))
    assert bool((centroids.diff(dim=0) >= 0).all())
    assert (int(boundaries[0]), int(boundaries[-1])) == (0, len(points))
    found = float(squared_error(values[:, None], weights[:, None], centroids))
    assert found == pytest.approx(brute_force(values, weights, k), abs=1e-12)


def test_columns_are_independent_and_batches_do_not_show(monkeypatch):
    values = weights_like(0, 50, 9)
    weights = torch.rand(50, 9, dtype=torch.float64)
    together = exact_kmeans(values, weights, 6)
    monkeypatch.setattr("bitquilt.grids.codebook._BATCH_ELEMENTS", 100)
    apart = exact_kmeans(values, weights, 6)
    alone = exact_kmeans(values[:, 3:4], weights[:, 3:4], 6)
    for one, other, single in zip(together, apart, alone, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[:, 3:4], single)


@pytest.mark.parametrize("k", [2, 3, 8, 16])
def test_exact_is_below_lloyd_which_is_below_its_start(k):
    values, ones = weights_like(k, 300, 5), torch.ones(300, 5, dtype=torch.float64)
    best = squared_error(values, ones, exact_kmeans(values, ones, k)[0])
    settled, boundaries = lloyd(values, ones, k)
    rounds = [squared_error(values, ones, lloyd(values, ones, k, i)[0]) for i in (1, 2, 5, 50)]
    assert bool((best <= rounds[-1] + 1e-12).all())
    assert all(bool((later <= earlier + 1e-12).all()) for earlier, later in itertools.pairwise(rounds))
    for c in range(k):  # centroids are means of their members
        members = values[int(boundaries[c, 0]) : int(boundaries[c + 1, 0]), 0]
        assert float(settled[c, 0]) == pytest.approx(float(members.mean()))


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


def test_the_known_column():
    """Law C3."""
    grid = fit_codebook(COLUMN, 2)
    torch.testing.assert_close(grid.levels, torch.tensor([[-0.95, 0.0, 1.0, 5.0]]), rtol=0, atol=1e-3)
    assert error_of(COLUMN, grid) == pytest.approx(0.105, abs=1e-3)
    mass = torch.ones_like(COLUMN)
    mass[7] = 0
    protected = fit_codebook(COLUMN, 2, mass)
    torch.testing.assert_close(protected.levels, torch.tensor([[-0.95, 0.0, 0.8, 1.2]]), rtol=0, atol=1e-3)
    assert error_of(COLUMN, protected, mass) == pytest.approx(0.025, abs=1e-3)
    for rows, expected in ((8, 4.11), (7, 0.1944)):  # a min-max grid through zero, for comparison
        column = COLUMN[:rows].t()
        assert error_of(column, uniform.fit(column, 2)) == pytest.approx(expected, abs=1e-2)
    assert fit_codebook(COLUMN, 2, clustering="uniform").levels.tolist() == [[-1.0, 1.0, 3.0, 5.0]]


@pytest.mark.parametrize("clustering", ["exact", "lloyd", "uniform"])
def test_scaling_a_column_scales_its_levels_and_leaves_the_codes(clustering):
    weight = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    scales = torch.tensor([1.0, 4.0, 0.125])
    one = fit_codebook(weight, 3, clustering=clustering)
    other = fit_codebook(weight * scales, 3, clustering=clustering)
    assert torch.equal(one.encode(weight), other.encode(weight * scales))
    torch.testing.assert_close(other.levels, one.levels * scales[:, None])


@pytest.mark.parametrize("clustering", ["exact", "lloyd"])
def test_few_distinct_weights_are_kept_exactly(clustering):
    weight = torch.tensor([[0.5, 1.0, 0.0], [0.5, -2.0, 0.0], [0.25, 1.0, 0.0], [3.0, 1.0, 0.0]])
    grid = fit_codebook(weight, 2, clustering=clustering)
    assert torch.equal(grid.quantize(weight), weight)
    assert grid.levels[1].tolist() == [-2.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("clustering", ["exact", "lloyd", "uniform"])
def test_a_column_without_mass_gets_zeros(clustering):
    weight = torch.randn(8, 2, generator=torch.Generator().manual_seed(2))
    mass = torch.ones(8, 2)
    mass[:, 1] = 0
    grid = fit_codebook(weight, 1, mass, clustering=clustering)
    assert grid.levels[1].tolist() == [0.0, 0.0]
    assert bool(grid.levels[0].abs().sum() > 0)


def test_weights_without_mass_move_nothing():
    weight = torch.randn(40, 4, generator=torch.Generator().manual_seed(3))
    mass = torch.ones(40, 4)
    mass[::5] = 0
    kept = mass[:, 0] > 0
    assert torch.equal(fit_codebook(weight, 3, mass).levels, fit_codebook(weight[kept], 3).levels)


def test_codes_are_nearest_and_levels_stay_in_storage_range():
    weight = torch.randn(100, 4, generator=torch.Generator().manual_seed(4))
    grid = fit_codebook(weight, 3)
    distance = (weight.unsqueeze(2) - grid.levels.unsqueeze(0)).abs()
    chosen = distance.gather(2, grid.encode(weight).long().unsqueeze(2)).squeeze(2)
    assert torch.equal(chosen, distance.amin(dim=2))
    assert bool(torch.isfinite(fit_codebook(1e6 * weight, 2).levels).all())
    coarse = fit_codebook(weight, 3, dtype=torch.float8_e4m3fn).levels
    assert torch.equal(coarse, coarse.to(torch.float8_e4m3fn).float())
    tie = CodebookGrid(1, torch.tensor([[0.0, 2.0]]))
    assert tie.encode(torch.tensor([[1.0]])).item() == 0


def test_no_clusters_is_an_error():
    with pytest.raises(ValueError, match="k is 0"):
        exact_kmeans(torch.zeros(3, 1), torch.ones(3, 1), 0)
