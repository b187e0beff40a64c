"""Coordinate descent on bare tensors: never worse, exact steps, a fixed point, grids untouched."""

import pytest
import torch

from bitquilt.core.types import group_slices
from bitquilt.layer.descent import descend
from bitquilt.layer.gptq_sweep import sweep
from bitquilt.layer.grids.uniform import fit
from bitquilt.layer.hessian import damped, factorize


@pytest.fixture(params=[40, 300], ids=["one block", "three blocks"])
def problem(request):
    n = request.param
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4 * n, n, generator=g) @ torch.randn(n, n, generator=g)
    hessian = x.t() @ x / len(x)
    factor = factorize(hessian, 0.01)
    weight, groups = torch.randn(12, n, generator=g), group_slices(n, 16)
    swept = sweep(weight, factor.upper, groups, lambda _k, columns: fit(columns, 2))
    return weight, damped(hessian, factor), swept, groups


def loss(weight, quantized, hessian):
    difference = (weight - quantized).double()
    return float(torch.trace(difference @ hessian.double() @ difference.t()))


def test_the_loss_falls_and_is_the_sweeps_quadratic_form(problem):
    weight, hessian, swept, groups = problem
    assert swept.loss == pytest.approx(loss(weight, swept.weight, hessian), rel=1e-3)
    losses = [swept.loss]
    for passes in (1, 2, 4):
        found = descend(weight, hessian, swept, groups, passes)
        assert found.loss == pytest.approx(loss(weight, found.weight, hessian), rel=1e-6)
        losses.append(found.loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.99 * losses[0]


def test_codes_stay_on_their_grids(problem):
    weight, hessian, swept, groups = problem
    found = descend(weight, hessian, swept, groups, 3)
    assert found.grids == swept.grids
    for group, grid in zip(groups, found.grids, strict=True):
        torch.testing.assert_close(grid.decode(found.codes[:, group].float()), found.weight[:, group])


def test_at_the_end_no_single_code_can_be_better(problem):
    weight, hessian, swept, groups = problem
    found = descend(weight, hessian, swept, groups, 100)
    again = descend(weight, hessian, found, groups, 1)
    assert torch.equal(again.codes, found.codes)
    least = found.loss
    for j in (0, 17, weight.shape[1] - 1):
        grid = found.grids[j // 16]
        for code in range(4):
            other = found.weight.clone()
            other[:, j : j + 1] = grid.decode(torch.full((12, 1), float(code)))
            assert loss(weight, other, hessian) >= least * (1 - 1e-5)


def test_a_diagonal_hessian_leaves_nothing_to_repair():
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    groups = group_slices(16, 8)
    swept = sweep(weight, torch.eye(16), groups, lambda _k, columns: fit(columns, 3))
    assert torch.equal(descend(weight, torch.eye(16), swept, groups, 2).codes, swept.codes)
