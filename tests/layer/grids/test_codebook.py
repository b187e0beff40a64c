"""Tables of levels per column: known columns, the laws, the edges."""

import pytest
import torch

from bitquilt.layer.grids import uniform
from bitquilt.layer.grids.codebook import CodebookGrid, fit_codebook

COLUMN = torch.tensor([[-1.0, -0.9, -0.1, 0.0, 0.1, 0.8, 1.2, 5.0]]).t()


def error_of(weight, grid, mass=None):
    error = (weight - grid.quantize(weight)).double().square()
    return float((error if mass is None else error * mass).sum())


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


def test_scaling_a_column_scales_its_levels_and_leaves_the_codes():
    weight = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    scales = torch.tensor([1.0, 4.0, 0.125])
    one = fit_codebook(weight, 3)
    other = fit_codebook(weight * scales, 3)
    assert torch.equal(one.encode(weight), other.encode(weight * scales))
    torch.testing.assert_close(other.levels, one.levels * scales[:, None])


def test_few_distinct_weights_are_kept_exactly():
    weight = torch.tensor([[0.5, 1.0, 0.0], [0.5, -2.0, 0.0], [0.25, 1.0, 0.0], [3.0, 1.0, 0.0]])
    grid = fit_codebook(weight, 2)
    assert torch.equal(grid.quantize(weight), weight)
    assert grid.levels[1].tolist() == [-2.0, 1.0, 1.0, 1.0]


def test_a_column_without_mass_gets_zeros():
    weight = torch.randn(8, 2, generator=torch.Generator().manual_seed(2))
    mass = torch.ones(8, 2)
    mass[:, 1] = 0
    grid = fit_codebook(weight, 1, mass)
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
