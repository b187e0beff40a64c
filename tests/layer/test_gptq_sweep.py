"""The sweep on bare tensors: its loss identity, its gain over rounding, mixed bits, act_order."""

import pytest
import torch

from bitquilt.core.types import group_slices
from bitquilt.layer.gptq_sweep import sweep, sweep_grouped, sweep_ordered
from bitquilt.layer.grids.uniform import fit
from bitquilt.layer.hessian import factorize, group_order
from bitquilt.layer.nearest import round_to_nearest


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 40, generator=g) @ torch.randn(40, 40, generator=g)
    return torch.randn(24, 40, generator=g), x.t() @ x / 400


def loss(weight, quantized, hessian):
    difference = (weight - quantized).double()
    return float(torch.trace(difference @ hessian.double() @ difference.t()))


def damped(hessian, damp):
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian))


def fitter(bits):
    return lambda k, columns: fit(columns, bits[k])


@pytest.mark.parametrize("bits", [[2] * 5, [3] * 5, [1, 2, 3, 2, 2], [4, 3, 2, 3, 3]])
def test_loss_is_the_quadratic_form_of_the_damped_hessian(problem, bits):
    """W - Q = E U and tr((W-Q) H (W-Q)^T) = sum e^2, whatever the bits."""
    weight, hessian = problem
    factor = factorize(hessian, 0.01)
    swept = sweep(weight, factor.upper, group_slices(40, 8), fitter(bits))
    assert swept.loss == pytest.approx(loss(weight, swept.weight, damped(hessian, 0.01)), rel=1e-3)


def test_feedback_beats_rounding_by_far(problem):
    weight, hessian = problem
    factor = factorize(hessian, 0.01)
    groups = group_slices(40, 8)
    swept = sweep(weight, factor.upper, groups, fitter([3] * 5))
    rounded = round_to_nearest(weight, groups, fitter([3] * 5))
    assert loss(weight, swept.weight, hessian) < 0.6 * loss(weight, rounded.weight, hessian)


def test_first_column_is_rounded_and_later_ones_move_by_the_feedback_term(problem):
    """Two columns by hand: the second absorbs e_1 U_12."""
    weight, hessian = problem
    weight, hessian = weight[:, :2], hessian[:2, :2]
    factor = factorize(hessian, 0.01)
    swept = sweep(weight, factor.upper, [slice(0, 1), slice(1, 2)], fitter([2, 2]))
    grid = fit(weight[:, :1], 2)
    torch.testing.assert_close(swept.weight[:, :1], grid.quantize(weight[:, :1]))
    error = (weight[:, 0] - swept.weight[:, 0]) / factor.upper[0, 0]
    moved = (weight[:, 1] - error * factor.upper[0, 1]).unsqueeze(1)
    torch.testing.assert_close(swept.weight[:, 1:], fit(moved, 2).quantize(moved))


def test_blocks_do_not_change_the_result(problem, monkeypatch):
    weight, hessian = problem
    factor = factorize(hessian, 0.01)
    groups = group_slices(40, 8)
    lazy = sweep(weight, factor.upper, groups, fitter([3] * 5))
    monkeypatch.setattr("bitquilt.layer.gptq_sweep._BLOCK", 1)
    eager = sweep(weight, factor.upper, groups, fitter([3] * 5))
    torch.testing.assert_close(lazy.weight, eager.weight, rtol=1e-4, atol=1e-5)


def test_identity_hessian_means_plain_rounding(problem):
    weight, _ = problem
    groups = group_slices(40, 16)
    swept = sweep(weight, torch.eye(40), groups, fitter([3] * 3))
    rounded = round_to_nearest(weight, groups, fitter([3] * 3))
    assert torch.equal(swept.codes, rounded.codes)
    assert swept.loss == pytest.approx(rounded.loss, rel=1e-5)


def test_scale_of_the_hessian_and_order_of_rows_change_nothing(problem):
    weight, hessian = problem
    groups = group_slices(40, 8)
    one = sweep(weight, factorize(hessian, 0.01).upper, groups, fitter([2] * 5))
    scaled = sweep(weight, factorize(256 * hessian, 0.01).upper, groups, fitter([2] * 5))
    assert torch.equal(one.codes, scaled.codes)
    rows = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    permuted = sweep(weight[rows], factorize(hessian, 0.01).upper, groups, fitter([2] * 5))
    assert torch.equal(permuted.codes, one.codes[rows])


def test_given_order_visits_columns_in_that_order_and_answers_in_the_original_one(problem):
    weight, hessian = problem
    groups = group_slices(40, 8)
    grids = [fit(weight[:, group], 3) for group in groups]
    order = torch.argsort(hessian.diagonal(), descending=True)
    upper = factorize(hessian[order][:, order], 0.01).upper
    ordered = sweep_ordered(weight, upper, groups, grids, order)
    assert ordered.loss == pytest.approx(loss(weight, ordered.weight, damped(hessian, 0.01)), rel=1e-3)
    for grid, group in zip(grids, groups, strict=True):
        torch.testing.assert_close(grid.decode(ordered.codes[:, group].float()), ordered.weight[:, group])
    first = int(order[0])
    grid = grids[first // 8]
    torch.testing.assert_close(ordered.weight[:, [first]], grid.quantize(weight[:, [first]]))


def test_a_grouped_order_is_the_sweep_of_the_reordered_problem(problem):
    """Permuting the columns by hand, with the group boundaries that belong to it, gives the same weight."""
    weight, hessian = problem
    groups = [slice(0, 16), slice(16, 32), slice(32, 40)]  # a ragged last group
    order = group_order(hessian.diagonal(), groups)
    factor = factorize(hessian, 0.01, order)
    swept = sweep_grouped(weight, factor.upper, groups, fitter([3, 2, 2]), order)
    by_mean = sorted(range(3), key=lambda k: -float(hessian.diagonal()[groups[k]].mean()))
    widths = [groups[k].stop - groups[k].start for k in by_mean]
    starts = [sum(widths[:i]) for i in range(3)]
    spans = [slice(a, a + n) for a, n in zip(starts, widths, strict=True)]
    bits = [[3, 2, 2][k] for k in by_mean]
    plain = sweep(weight[:, order], factorize(hessian[order][:, order], 0.01).upper, spans, fitter(bits))
    assert torch.equal(swept.weight[:, order], plain.weight)
    assert torch.equal(swept.codes[:, order], plain.codes)
    for k, group in enumerate(groups):
        assert torch.equal(swept.grids[k].decode(swept.codes[:, group].float()), swept.weight[:, group])


def test_the_grids_of_a_grouped_sweep_see_their_columns_in_the_original_order(problem):
    weight, hessian = problem
    groups = group_slices(40, 8)
    order = group_order(hessian.diagonal(), groups)
    seen = {}

    def watching(k, columns):
        seen[k] = columns.clone()
        return fit(columns, 2)

    sweep_grouped(weight, factorize(hessian, 0.01, order).upper, groups, watching, order)
    first = int(order[0]) // 8
    torch.testing.assert_close(seen[first], weight[:, groups[first]])
    assert sorted(seen) == list(range(5))


def test_an_order_that_leaves_a_group_is_refused(problem):
    weight, hessian = problem
    order = torch.arange(40).view(2, 20).t().reshape(-1)
    with pytest.raises(ValueError, match="leaves a group before it is done"):
        sweep_grouped(weight, factorize(hessian, 0.01, order).upper, group_slices(40, 8), fitter([2] * 5), order)
