"""A gain per row: what it finds, how it is stored, the edges."""

import pytest
import torch

from bitquilt.layer.grids.row_gains import fit_row_gains


def test_the_sizes_of_the_rows_are_found_whatever_the_columns_are():
    g = torch.Generator().manual_seed(0)
    rows, columns = 2.0 ** torch.randint(-3, 3, (40,), generator=g), torch.rand(500, generator=g) + 0.01
    weight = torch.randn(40, 500, generator=g) * rows.unsqueeze(1) * columns
    gains = fit_row_gains(weight, torch.ones_like(weight)).float()
    ratio = gains / rows
    assert float(ratio.max() / ratio.min()) < 1.3  # an eighth by float8, the rest by 500 samples
    assert bool((gains == fit_row_gains(100 * weight, torch.ones_like(weight)).float().roll(0)).float().mean() > 0.9)


def test_what_does_not_count_changes_nothing():
    weight = torch.randn(12, 30, generator=torch.Generator().manual_seed(1))
    counted = torch.ones_like(weight)
    counted[3, 5] = counted[0, 0] = 0
    loud = weight.clone()
    loud[3, 5] = loud[0, 0] = 1e4
    assert torch.equal(fit_row_gains(weight, counted).float(), fit_row_gains(loud, counted).float())


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-4, 1.0, 1e6])
def test_gains_are_positive_and_finite(scale):
    weight = scale * torch.randn(8, 20, generator=torch.Generator().manual_seed(2))
    weight[2], weight[:, 4], weight[5] = 0.0, 0.0, 1e-9 * weight[5]
    for counted in (torch.ones_like(weight), torch.zeros_like(weight)):
        gains = fit_row_gains(weight, counted)
        assert gains.dtype == torch.float8_e4m3fn
        assert bool((gains.float() > 0).all())
        assert bool(torch.isfinite(gains.float()).all())
    assert fit_row_gains(weight[:0], weight[:0]).shape == (0,)
