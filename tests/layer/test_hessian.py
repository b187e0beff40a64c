import pytest
import torch

from bitquilt.layer.hessian import factorize


def random_hessian(n=24, tokens=200, seed=0):
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed))
    return x.t() @ x / tokens


def test_the_two_by_two_example():
    """H = [[2, 1], [1, 2]]: U_11^2 = 2/3, U_22^2 = 1/2."""
    factor = factorize(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), damp=1e-9)
    assert factor.upper.diagonal().square().tolist() == pytest.approx([2 / 3, 1 / 2], rel=1e-4)
    assert factor.importance.tolist() == pytest.approx([1.5, 2.0], rel=1e-4)
    assert factor.inverse_diagonal.tolist() == pytest.approx([2 / 3, 2 / 3], rel=1e-4)


def test_it_is_the_factor_of_the_damped_inverse():
    hessian, damp = random_hessian(), 0.05
    upper = factorize(hessian, damp).upper.double()
    damped = hessian.double() + damp * hessian.diagonal().double().mean() * torch.eye(24)
    torch.testing.assert_close(upper.t() @ upper, torch.linalg.inv(damped), rtol=1e-3, atol=1e-4)
    assert torch.equal(upper, upper.triu())


def test_order_effect_bounds():
    """U_jj^2 <= [H^-1]_jj, equal at the first column; the last is 1 / H_jj."""
    hessian = random_hessian()
    factor = factorize(hessian, 1e-6)
    squares = factor.upper.diagonal().square()
    assert bool((squares <= factor.inverse_diagonal * (1 + 1e-5)).all())
    assert float(squares[0]) == pytest.approx(float(factor.inverse_diagonal[0]))
    assert float(squares[-1]) == pytest.approx(1 / float(hessian[-1, -1]), rel=1e-3)


def test_dead_channels_are_found_and_touch_nobody():
    hessian = random_hessian()
    hessian[5], hessian[:, 5] = 0, 0
    factor = factorize(hessian, 0.01)
    assert factor.dead.nonzero().flatten().tolist() == [5]
    others = factor.upper[5].clone()
    others[5] = 0
    assert float(others.abs().max()) == 0
    live = [i for i in range(24) if i != 5]
    alone = factorize(hessian[live][:, live], 0.01)
    torch.testing.assert_close(factor.upper[live][:, live], alone.upper, rtol=1e-4, atol=1e-5)


def test_all_channels_dead_is_the_identity():
    factor = factorize(torch.zeros(4, 4), 0.01)
    assert bool(factor.dead.all())
    assert bool(torch.isfinite(factor.upper).all())


def test_scale_of_the_hessian_changes_nothing_but_the_scale():
    hessian = random_hessian()
    one, other = factorize(hessian, 0.01), factorize(1024.0 * hessian, 0.01)
    torch.testing.assert_close(one.upper, 32.0 * other.upper)


def test_float64_is_tried_before_the_damp_is_raised():
    singular = torch.ones(2, 2)
    assert factorize(singular, 0.01).precision == torch.float32
    tight = factorize(singular, 1e-9)
    assert tight.precision == torch.float64
    assert tight.damp == pytest.approx(1e-9)


def test_an_indefinite_matrix_raises_the_damp_step_by_step():
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0]))
    indefinite[0, 1] = indefinite[1, 0] = 1.5  # eigenvalue -0.5
    factor = factorize(indefinite, 0.01)
    assert factor.damp == pytest.approx(1.0)
    assert factor.precision == torch.float64


def test_hopeless_and_non_finite_matrices_are_refused():
    with pytest.raises(ValueError, match="not positive definite"):
        factorize(torch.tensor([[1.0, 100.0], [100.0, 1.0]]), 0.01)
    with pytest.raises(ValueError, match="NaN or Inf"):
        factorize(torch.tensor([[float("nan"), 0.0], [0.0, 1.0]]), 0.01)
