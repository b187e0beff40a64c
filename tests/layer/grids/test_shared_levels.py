"""Tables shared by columns, with a gain each: how good, how stored, the edges."""

import pytest
import torch

from bitquilt.layer.grids.codebook import fit_codebook
from bitquilt.layer.grids.shared_levels import fit_table


def relative_error(weight, grid, mass=None):
    error = (weight - grid.quantize(weight)).double().square()
    size = weight.double().square()
    return float((error if mass is None else error * mass).sum() / (size if mass is None else size * mass).sum())


def gaussian(out, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=g) * (0.01 + torch.rand(width, generator=g))


@pytest.mark.parametrize(("bits", "optimum"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
@pytest.mark.parametrize("gain_dtype", [torch.float16, torch.float8_e4m3fn])
def test_gaussian_columns_come_near_the_known_optimum(bits, optimum, gain_dtype):
    """Max 1960, Quantizing for minimum distortion: what many weights of unit variance lose at so many levels."""
    weight = gaussian(600, 120)
    found = relative_error(weight, fit_table(weight, bits, gain_dtype=gain_dtype).fit(weight))
    assert 0.95 * optimum < found < 1.04 * optimum


def test_a_shared_table_costs_little_against_one_per_column_on_many_rows():
    weight = gaussian(2000, 20)
    own, shared = fit_codebook(weight, 3), fit_table(weight, 3).fit(weight)
    assert relative_error(weight, own) < relative_error(weight, shared) < 1.05 * relative_error(weight, own)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_levels_are_products_of_stored_values(scale):
    weight = scale * gaussian(64, 30)
    grid = fit_table(weight, 3, dtype=torch.bfloat16).fit(weight)
    assert grid.gains.dtype == torch.float8_e4m3fn
    assert grid.tables.dtype == torch.bfloat16
    assert torch.equal(grid.levels, grid.gains.float()[:, None] * grid.tables.float())
    assert bool((grid.tables.float().diff() > 0).all())
    assert relative_error(weight, grid) < 0.05


def test_importance_draws_the_table_to_the_columns_that_matter():
    g = torch.Generator().manual_seed(1)
    heavy = torch.randn(300, 20, generator=g) ** 3
    weight = torch.cat([heavy, torch.rand(300, 20, generator=g) - 0.5], dim=1)
    importance = torch.ones(40)
    importance[:20] = 1e3
    plain, weighted = fit_table(weight, 2).fit(weight), fit_table(weight, 2, None, importance).fit(weight)
    errors = [(weight - grid.quantize(weight)).square().sum(0)[:20].sum() for grid in (plain, weighted)]
    assert errors[1] < errors[0]


def test_weights_without_mass_move_nothing():
    weight = gaussian(50, 12)
    mass = torch.ones_like(weight)
    mass[::5] = 0
    wild = weight.masked_fill(mass == 0, 50.0)
    one, other = (fit_table(w, 3, mass).fit(w, mass) for w in (weight, wild))
    assert relative_error(weight, one, mass) < 0.04
    torch.testing.assert_close(
        relative_error(weight, other, mass), relative_error(weight, one, mass), rtol=0.02, atol=0
    )


def test_dead_columns_and_layers_get_zeros():
    weight = gaussian(20, 6)
    weight[:, 2] = 0
    grid = fit_table(weight, 2).fit(weight)
    assert grid.gains[2] == 0
    assert bool((grid.quantize(weight)[:, 2] == 0).all())
    nothing = torch.zeros(20, 6)
    assert bool((fit_table(nothing, 2).fit(nothing).levels == 0).all())
    mass = torch.zeros_like(weight)
    assert bool((fit_table(weight, 2, mass).fit(weight, mass).levels == 0).all())


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 2)])
@pytest.mark.parametrize("bits", [1, 4])
def test_layers_of_few_weights(shape, bits):
    weight = gaussian(*shape)
    grid = fit_table(weight, bits).fit(weight)
    assert grid.levels.shape == (shape[1], 2**bits)
    assert bool(torch.isfinite(grid.levels).all())
    assert relative_error(weight, grid) < 0.5


def test_more_rows_than_the_table_is_fitted_on():
    weight = gaussian(2500, 110)
    table = fit_table(weight, 2)
    assert relative_error(weight, table.fit(weight)) < 0.121
