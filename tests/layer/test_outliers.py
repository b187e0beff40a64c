"""Which weights are protected, how they are stored, and that any recipe can protect them."""

import itertools

import pytest
import torch

from bitquilt.core.packing import bits_per_weight, pack, tensor_specs, unpack
from bitquilt.core.types import Format, Layer, Layout
from bitquilt.errors import UserError
from bitquilt.layer.grouped_weight import solve
from bitquilt.layer.hessian import factorize
from bitquilt.layer.outliers import (
    activation_outliers,
    check_share,
    error_outliers,
    fits_half,
    largest,
    sparse_remainder,
)
from bitquilt.recipes import make_recipe
from tests.recipes.test_contract import make_layer, output_error, run
from tests.weights import naive_dense

WEIGHT = torch.tensor([[1.0, -4.0, 0.5], [2.0, 1.0, -6.0]])
NORMS = torch.tensor([3.0, 1.0, 0.5])


def test_both_rules_rank_by_what_the_output_feels():
    # a_j |w_ij|: 3 4 .25 / 6 1 3
    assert activation_outliers(WEIGHT, NORMS, 2 / 6).int().tolist() == [[0, 1, 0], [1, 0, 0]]
    taken = torch.tensor([[False, True, False], [True, False, False]])
    quantized = WEIGHT - torch.tensor([[0.1, 9.0, 0.0], [9.0, 0.2, 0.5]])
    # a_j |w - q| outside what is taken: .3 - 0 / - .2 .25
    assert error_outliers(WEIGHT, quantized, NORMS, 2, taken).int().tolist() == [[1, 0, 0], [0, 0, 1]]
    assert int(error_outliers(WEIGHT, quantized, NORMS, 99, taken).sum()) == 4


def test_growing_counts_only_add_and_the_earlier_index_wins_a_tie():
    score = torch.tensor([[1.0, 3.0, 3.0], [3.0, 0.0, 2.0]])
    sets = [largest(score, count) for count in range(7)]
    assert [int(chosen.sum()) for chosen in sets] == list(range(7))
    assert all(bool((more | ~fewer).all()) for fewer, more in itertools.pairwise(sets))
    assert sets[2].int().tolist() == [[0, 1, 1], [0, 0, 0]]


def test_the_remainder_is_exact_to_half_precision():
    g = torch.Generator().manual_seed(0)
    weight, dense = torch.randn(6, 9, generator=g), torch.randn(6, 9, generator=g)
    mask = torch.rand(6, 9, generator=g) > 0.7
    sparse = sparse_remainder(weight - dense, mask)
    assert sparse.rows.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    rebuilt = dense.clone()
    rows = torch.repeat_interleave(torch.arange(6), sparse.rows.diff())
    rebuilt[rows, sparse.columns] += sparse.values.float()
    assert torch.equal(rebuilt[~mask], dense[~mask])
    torch.testing.assert_close(rebuilt[mask], weight[mask], rtol=1e-3, atol=2e-3)
    assert sparse_remainder(weight - dense, torch.zeros_like(mask)) is None
    assert not fits_half(1e6 * weight)
    with pytest.raises(ValueError, match="beyond float16"):
        sparse_remainder(1e6 * weight - dense, mask)


@pytest.mark.parametrize("shares", [{"rho": -0.1}, {"rho": 0.3}, {"a": 0.2, "b": 0.2}, {"rho": float("nan")}])
def test_absurd_shares_are_named(shares):
    with pytest.raises(ValueError, match=r"rho is|a \+ b is"):
        check_share(**shares)
    check_share(a=0.0, b=0.25)


@pytest.mark.parametrize("name", ["gptq", "slim-llm"])
@pytest.mark.parametrize("act_order", [False, True])
def test_any_sweep_can_protect_weights(name, act_order):
    """Protected weights cost the sweep nothing, the others less than before, and the sparse part is counted."""
    layer = make_layer(out=24, width=48)
    layer.weight[3, 5], layer.weight[7, 40] = 12.0, -15.0
    recipe = make_recipe(name, bits=2, group_size=16)
    plan, plain = run(recipe, layer)
    factor = factorize(layer.stats.hessian / layer.stats.tokens, 0.01)
    mask = activation_outliers(layer.weight, layer.stats.hessian.diagonal().sqrt(), 0.01)
    assert bool(mask[7, 40])

    def fit_group(columns, weight, bits, scale_dtype):
        from bitquilt.layer.grids.uniform import fit

        return fit(weight, bits, scale_dtype=scale_dtype)

    protected = solve(layer, plan, factor, fit_group, damp=0.01, act_order=act_order, protected=mask)
    bare = solve(layer, plan, factor, fit_group, damp=0.01, act_order=act_order)
    assert protected.loss < bare.loss
    layout = protected.weight.layout
    assert layout.outliers == int(mask.sum()) == 12
    assert bits_per_weight(layout) > bits_per_weight(plain.weight.layout)
    again = unpack(pack(protected.weight), layout)
    assert torch.equal(naive_dense(again), naive_dense(protected.weight))


@pytest.mark.parametrize("name", ["gptq", "slim-llm"])
def test_recipes_on_groups_take_outliers_as_options(name):
    layer = make_layer(out=24, width=48)
    layer.weight[3, 5], layer.weight[7, 40] = 12.0, -15.0
    layouts, errors = [], []
    both = {"act_outliers": 0.01, "error_outliers": 0.02}
    for options in ({}, {"act_outliers": 0.01}, {"error_outliers": 0.02}, both):
        recipe = make_recipe(name, bits=2, group_size=16, **options)
        solution = run(recipe, layer)[1]
        layouts.append(solution.weight.layout)
        errors.append(output_error(layer, solution))
    assert [layout.outliers for layout in layouts] == [0, 12, 23, 35]
    assert errors[3] < errors[1] < errors[0]
    assert errors[2] < errors[0]
    sizes = [bits_per_weight(layout) for layout in layouts]
    assert sizes == sorted(sizes)
    # 16 bits for the value, 8 for a column of 48; 25 row pointers of 8 bits
    assert sizes[3] - sizes[0] == pytest.approx((35 * 24 + 25 * 8) / (24 * 48), abs=0.02)


@pytest.mark.parametrize("name", ["gptq", "slim-llm"])
def test_outliers_that_half_precision_cannot_hold_are_an_event(name):
    layer = make_layer(out=24, width=48)
    layer = Layer(layer.name, 1e6 * layer.weight, None, layer.stats)
    solution = run(make_recipe(name, bits=3, group_size=16, error_outliers=0.01), layer)[1]
    assert "outliers out of float16 range" in [event.kind for event in solution.events]
    assert solution.weight.outliers is None


@pytest.mark.parametrize("name", ["gptq", "slim-llm", "cmpq"])
def test_absurd_shares_are_refused_by_every_recipe(name):
    with pytest.raises(UserError, match=r"error_outliers is 0\.7"):
        make_recipe(name, error_outliers=0.7)


@pytest.mark.parametrize(
    ("columns", "count", "narrow"), [(200, 9, "uint8"), (300, 300, "int16"), (40_000, 40_000, "int32")]
)
def test_indices_take_the_bytes_they_need(columns, count, narrow):
    layout = Layout(2, columns, ((Format(2, 8), columns),), outliers=count)
    specs = tensor_specs(layout)
    assert [str(specs[f"outlier_{key}"].dtype) for key in ("columns", "rows")] == [f"torch.{narrow}"] * 2
