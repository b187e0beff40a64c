import torch

from bitquilt.layer.hessian import factorize
from bitquilt.layer.sensitivity.salience import group_salience, salience


def test_the_worked_example():
    """H = [[2, 1], [1, 2]], w = [1, 1]: 1 / U_jj^2 = [1.5, 2]."""
    factor = factorize(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), 1e-9)
    torch.testing.assert_close(salience(torch.ones(1, 2), factor), torch.tensor([[1.5, 2.0]]), rtol=1e-4, atol=0)


def test_it_grows_with_the_square_of_the_weight_and_the_scale_of_the_hessian():
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    hessian, weight = x.t() @ x, torch.randn(3, 6)
    one = salience(weight, factorize(hessian, 0.01))
    torch.testing.assert_close(salience(2 * weight, factorize(hessian, 0.01)), 4 * one)
    torch.testing.assert_close(salience(weight, factorize(3 * hessian, 0.01)), 3 * one, rtol=1e-4, atol=0)


def test_group_means_skip_dead_columns_and_sums_do_not_depend_on_them():
    values = torch.tensor([[1.0, 2.0, 3.0, 100.0, 7.0], [3.0, 4.0, 5.0, 100.0, 9.0]])
    dead = torch.tensor([False, False, False, True, False])
    groups = [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert group_salience(values, groups, dead).tolist() == [2.5, 4.0, 8.0]
    assert group_salience(values, groups, dead, "sum").tolist() == [5.0, 4.0, 8.0]
    all_dead = torch.ones(5, dtype=torch.bool)
    assert group_salience(values, groups, all_dead).tolist() == [0.0, 0.0, 0.0]
