"""The promises of every recipe on bare tensors: exact storage, bounded bits, invariance, named errors, determinism."""

import pytest
import torch

from bitquilt.core.packing import bits_per_weight, pack, unpack
from bitquilt.core.recipe import Needs, Plannable
from bitquilt.core.types import Layer, LayerPlan, LayerStats
from bitquilt.errors import UserError
from bitquilt.model.linear import QuantizedLinear
from bitquilt.recipes import RECIPES, make_recipe, takes_fractions, usual_options
from tests.weights import naive_dense

GROUPED = [name for name in RECIPES if not takes_fractions(name)]  # the others have a file of their own
VARIANTS = [
    ("rtn", {}),
    ("rtn", {"scale_search": True}),
    ("gptq", {}),
    ("gptq", {"scale_search": True}),
    ("gptq", {"scale_search": True, "act_order": True}),
    ("gptq", {"scale_search": True, "group_order": True, "symmetric": True, "alpha": 0.75, "stream_alpha": 0.75}),
    ("quilt", {}),
    ("slim-llm+", {}),
    ("slim-llm+", {"published": True}),
    ("slim-llm+", {"published": True, "allocation": "uniform"}),
    ("slim-llm", {}),
    ("slim-llm", {"group_order": True, "symmetric": True, "alpha": 0.5}),
    ("slim-llm", {"published": True}),
    ("slim-llm", {"allocation": "dp"}),
]


def make_layer(out=20, width=44, seed=0, tokens=300, bias=True):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=g) * torch.linspace(0.2, 3, width)
    weight = torch.randn(out, width, generator=g)
    stats = LayerStats(x.t() @ x, tokens, x)
    return Layer("block.layer", weight, torch.randn(out, generator=g) if bias else None, stats)


def run(recipe, layer):
    prepared = recipe.prepare(layer.stats)
    plan = recipe.allocate(recipe.measure(layer, prepared), layer.weight.shape[1])
    return plan, recipe.quantize(layer, plan, prepared)


def output_error(layer, solution):
    difference = naive_dense(solution.weight) - layer.weight
    return float((layer.stats.sample @ difference.t()).square().sum())


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_contract(name, options, bits):
    recipe = make_recipe(name, bits=bits, group_size=8, **options)
    layer = make_layer()
    plan, solution = run(recipe, layer)
    layout = solution.weight.layout
    assert (layout.out_features, layout.in_features) == (20, 44)
    assert layout.nominal_bits <= bits
    assert len(plan.bits) == 6
    assert set(plan.bits) <= {bits - 1, bits, bits + 1}
    tensors = pack(solution.weight)
    assert torch.equal(naive_dense(unpack(tensors, layout)), naive_dense(solution.weight))
    torch.testing.assert_close(QuantizedLinear.from_weight(solution.weight).dequantize(), naive_dense(solution.weight))
    again = pack(run(recipe, layer)[1].weight)
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("width", [3, 8, 9, 20])
def test_layers_narrower_than_a_group_and_ragged_last_groups(name, options, width):
    recipe = make_recipe(name, bits=3, group_size=8, **options)
    layer = make_layer(out=5, width=width)
    plan, solution = run(recipe, layer)
    assert solution.weight.layout.in_features == width
    assert sum(plan.widths(width)) == width
    assert output_error(layer, solution) < 0.2 * float((layer.stats.sample @ layer.weight.t()).square().sum())


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_scale_of_the_hessian_changes_nothing(name, options):
    recipe = make_recipe(name, bits=2, group_size=8, **options)
    layer = make_layer()
    scaled = Layer(layer.name, layer.weight, layer.bias, LayerStats(64 * layer.stats.hessian, 300, layer.stats.sample))
    one, other = run(recipe, layer), run(recipe, scaled)
    assert one[0] == other[0]
    assert torch.equal(naive_dense(one[1].weight), naive_dense(other[1].weight))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_rows_may_come_in_any_order(name, options):
    recipe = make_recipe(name, bits=2, group_size=8, **options)
    layer = make_layer()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(5))
    shuffled = Layer(layer.name, layer.weight[order], layer.bias[order], layer.stats)
    one, other = run(recipe, layer), run(recipe, shuffled)
    assert one[0] == other[0]
    torch.testing.assert_close(naive_dense(other[1].weight), naive_dense(one[1].weight)[order])


def test_more_data_driven_means_less_error():
    layer = make_layer(width=64, tokens=600)
    errors = [
        output_error(layer, run(make_recipe(name, bits=2, group_size=16, **options), layer)[1])
        for name, options in (("rtn", {}), ("gptq", {}), ("gptq", {"scale_search": True}), ("slim-llm", {}))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.9 * errors[2] < 0.9 * errors[1]


def test_salience_weights_of_the_calibration_matter():
    """The default's column weight lowers the sweep's loss against the plain squared error (the published one)."""
    better = 0
    for seed in range(8):
        layer = make_layer(width=64, seed=seed)
        scales = torch.rand(64, generator=torch.Generator().manual_seed(seed)) * 4
        x = layer.stats.sample * scales
        layer = Layer(layer.name, layer.weight, layer.bias, LayerStats(x.t() @ x, 300, x))
        plain = run(make_recipe("slim-llm", bits=3, group_size=16, allocation="uniform", published=True), layer)
        weighted = run(make_recipe("slim-llm", bits=3, group_size=16, allocation="uniform"), layer)
        better += weighted[1].loss < plain[1].loss
    assert better >= 7


def test_the_search_sees_the_salience_of_the_groups():
    """Inputs and weights are small but for two groups: they get the high bits, and it helps."""
    layer = make_layer(width=64, tokens=500)
    weight = layer.weight.clone()
    weight[:, :48] *= 0.05
    layer = Layer(layer.name, weight, layer.bias, layer.stats)
    plan, mixed = run(make_recipe("slim-llm", bits=2, group_size=16), layer)
    assert plan.bits[3] == 3
    assert 1 in plan.bits[:3]
    uniform = run(make_recipe("slim-llm", bits=2, group_size=16, allocation="uniform"), layer)[1]
    assert output_error(layer, mixed) < output_error(layer, uniform)


def test_a_searched_map_and_the_same_map_given_are_the_same_weight():
    recipe = make_recipe("slim-llm", bits=3, group_size=8)
    layer = make_layer()
    plan, searched = run(recipe, layer)
    given = recipe.quantize(layer, plan, recipe.prepare(layer.stats))
    one, other = pack(searched.weight), pack(given.weight)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_mixed_bits_take_no_more_bytes_than_uniform_ones_but_for_the_map():
    layer = make_layer(out=256, width=64, tokens=600)
    for bits in (2, 3):
        mixed = run(make_recipe("slim-llm", bits=bits, group_size=16), layer)[1].weight.layout
        uniform = run(make_recipe("gptq", bits=bits, group_size=16), layer)[1].weight.layout
        assert bits_per_weight(mixed) <= bits_per_weight(uniform) + 8 / (256 * 64)


def test_published_needs_at_least_one_pair_and_falls_back_where_none_fits():
    layer = make_layer(width=64)
    plan, _ = run(make_recipe("slim-llm", bits=3, group_size=8, published=True), layer)
    assert plan.bits.count(4) >= 1
    narrow, _ = run(make_recipe("slim-llm", bits=3, group_size=32, published=True), layer)
    assert narrow.bits == (3, 3)


@pytest.mark.parametrize("allocation", ["sba", "dp", "uniform"])
@pytest.mark.parametrize("bpw", [3.7, 4.0, 4.4, 5.1])
def test_slim_llm_meets_a_fraction_in_every_layer(allocation, bpw):
    layer = make_layer(out=256, width=124, tokens=400)
    recipe = make_recipe("slim-llm", bpw=bpw, group_size=16, allocation=allocation)
    recipe.check_layers({layer.name: (256, 124)})
    plan, solution = run(recipe, layer)
    # one-bit groups store no zero, so a pair may take less than the two groups it came from
    assert bpw - 0.25 < bits_per_weight(solution.weight.layout) <= bpw
    assert recipe.layout(256, 124, plan) == solution.weight.layout
    if allocation == "uniform":
        assert len(set(plan.bits)) <= 2


def test_more_bits_in_a_layer_are_less_error_and_out_of_reach_is_refused():
    layer = make_layer(out=256, width=128, tokens=400)
    errors = [
        output_error(layer, run(make_recipe("slim-llm", bpw=bpw, group_size=16), layer)[1]) for bpw in (3.3, 3.9, 4.5)
    ]
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(ValueError, match=r"block: bpw is 2.5; this 256 x 128 layer reaches 3\.\d+ and more"):
        make_recipe("slim-llm", bpw=2.5, group_size=16).check_layers({"block": (256, 128)})


PLANNED = [
    *((name, {}) for name in GROUPED),
    ("slim-llm", {"published": True}),
    ("slim-llm+", {"published": True}),
    ("mg-ptq", {}),
    ("aptq", {}),
]


def test_every_recipe_can_share_a_budget():
    assert all(isinstance(make_recipe(name), Plannable) for name in RECIPES)


@pytest.mark.parametrize(("name", "options"), PLANNED)
def test_what_a_plan_stores_is_known_before(name, options):
    recipe = make_recipe(name, bits=3, group_size=8, **options)
    layer = make_layer(out=20, width=44)
    prepared = recipe.prepare(layer.stats)
    # one bit in an edited plan too, where a plan of ours has none
    for bits in [(2, 3, 4, 2, 3, 8), (2, 2, 3, 3, 3, 4), (5,) * 6, (1, 2, 1, 8, 1, 1), (1,) * 6]:
        plan = LayerPlan(bits, 8)
        assert recipe.layout(20, 44, plan) == recipe.quantize(layer, plan, prepared).weight.layout
    for bits in recipe.widths(20):
        rounded = recipe.rounded(layer, prepared, bits)
        uniform = recipe.quantize(layer, LayerPlan((bits,) * 6, 8), prepared)
        if name == "rtn":
            torch.testing.assert_close(rounded, naive_dense(uniform.weight))
        error = float((rounded - layer.weight).square().mean())
        assert error < 1.2 * 4.0 ** (1 - bits) * float(layer.weight.square().mean())
    assert recipe.column_cost(layer, prepared).shape == (44,)


def test_a_global_allocation_needs_a_plan():
    layer = make_layer()
    with pytest.raises(ValueError, match="a plan for the whole model"):
        run(make_recipe("slim-llm", allocation="global", group_size=8), layer)


def test_dead_channels_are_zeroed_and_reported():
    layer = make_layer()
    x = layer.stats.sample.clone()
    x[:, [3, 17]] = 0
    layer = Layer(layer.name, layer.weight, layer.bias, LayerStats(x.t() @ x, 300, x))
    for name in ("gptq", "slim-llm"):
        solution = run(make_recipe(name, bits=4, group_size=8), layer)[1]
        assert [event.kind for event in solution.events] == ["dead channels"]
        assert "2 of 44" in solution.events[0].detail


def test_a_hessian_that_resists_is_reported_and_still_solved_by_the_sweep():
    layer = make_layer()
    indefinite = layer.stats.hessian.clone()
    indefinite[0, 1] = indefinite[1, 0] = 2 * indefinite.diagonal().mean()
    layer = Layer(layer.name, layer.weight, layer.bias, LayerStats(indefinite, 300, layer.stats.sample))
    solution = run(make_recipe("gptq", bits=3, group_size=8), layer)[1]
    assert [event.kind for event in solution.events] == ["hessian not positive definite"]


def test_extreme_weights_keep_their_range():
    layer = make_layer()
    layer = Layer(layer.name, 1e6 * layer.weight, None, layer.stats)
    for name in GROUPED:
        solution = run(make_recipe(name, bits=8, group_size=8), layer)[1]
        assert "scales out of float16 range" in [event.kind for event in solution.events]
        torch.testing.assert_close(naive_dense(solution.weight), layer.weight, rtol=0.1, atol=1e5)


@pytest.mark.parametrize("name", GROUPED)
def test_nan_in_a_weight_names_the_layer(name):
    layer = make_layer()
    layer.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"block\.layer: weight holds 1 NaN"):
        run(make_recipe(name, bits=3, group_size=8), layer)


def test_without_a_sample_slim_llm_keeps_uniform_bits():
    layer = make_layer()
    layer = Layer(layer.name, layer.weight, None, LayerStats(torch.eye(44), 1, None))
    plan, _ = run(make_recipe("slim-llm", bits=2, group_size=8), layer)
    assert set(plan.bits) == {2}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("slim", {}, "did you mean 'slim-llm'"),
        ("awq", {}, "known are rtn, gptq, slim-llm"),
        ("gptq", {"dampp": 1}, "did you mean 'damp'"),
        ("gptq", {"bits": 9}, "bits is 9"),
        ("slim-llm", {"bits": 1}, "bits is 1"),
        ("rtn", {"group_size": 12}, "multiple of 8"),
        ("rtn", {"group_size": 0}, "multiple of 8"),
        ("gptq", {"damp": 0.0}, "damp is 0"),
        ("gptq", {"bits": 2.5}, "option 'bits': got 2.5"),
        ("slim-llm", {"allocation": "vibes"}, "option 'allocation': got 'vibes'"),
        ("rtn", {"published": True}, "no published variant"),
    ],
)
def test_bad_options_are_named_with_the_fix(name, options, message):
    with pytest.raises(UserError, match=message):
        make_recipe(name, **options)


def test_published_is_an_option_among_others():
    recipe = make_recipe("slim-llm", published=True, bits=3, allocation="uniform")
    assert (recipe.published, recipe.bits, recipe.allocation) == (True, 3, "uniform")
    assert recipe.layout(20, 16, LayerPlan((1, 1), 8)).segments[0][0].symmetric is False  # an offset, as published
    assert make_recipe("slim-llm").layout(20, 16, LayerPlan((1, 1), 8)).segments[0][0].symmetric


PUBLISHED_ENTRY = {  # of a plan.json before `published` was an option
    "group_statistic": "sum",
    "objective": "kl_reverse",
    "candidates": "published",
    "candidate_quantizer": "min_max",
    "search": "published",
    "weighting": "none",
    "one_bit": "code",
}


def test_options_of_old_plans_are_read_where_they_have_the_value_that_is_now_fixed():
    old = {"bits": 3, "train_seed": 0, "rate": 1e-2, "salience": "cholesky", "mask_factor": 4.0}
    assert make_recipe("slim-llm", **old, search="wide", one_bit="symmetric") == make_recipe("slim-llm", bits=3)
    assert make_recipe("slim-llm", **old, **PUBLISHED_ENTRY) == make_recipe("slim-llm", bits=3, published=True)
    published = {"codebook": "channel", "row_gains": "off", "outlier_choice": "asked", "damp": 0.01}
    assert make_recipe("cmpq", **published) == make_recipe("cmpq", published=True)
    assert make_recipe("slim-llm+", start="weight", batch=1, **PUBLISHED_ENTRY).published
    for name in RECIPES:
        usual = {option: value for option, value in usual_options(name).items() if option != "bits" or value}
        if usual.get("bpw", 0) is None:
            del usual["bpw"]
        assert make_recipe(name, **usual) == make_recipe(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "slim-llm",
            {"search": "published"},
            r"got 'published'; .* fixed at 'wide' \('published' with published=true\)",
        ),
        ("slim-llm", {**PUBLISHED_ENTRY, "one_bit": "paper"}, "option 'group_statistic': got 'sum'; it is no longer"),
        (
            "slim-llm",
            {"published": True, "search": "wide"},
            "got 'wide'; it is no longer an option and is fixed at 'pub",
        ),
        (
            "slim-llm+",
            {"rate": 0.1},
            r"option 'rate': got 0\.1; it is no longer an option and is fixed at 0\.01: leave it",
        ),
        ("aptq", {"measure_at": "layer"}, "fixed at 'residual': leave it out"),
        ("cmpq", {"compensation": True}, "option 'compensation': got True"),
        ("quilt", {"levels": "zero"}, "option 'levels': got 'zero'"),
        ("cmpq+", {"published": True}, r"cmpq\+ has no published variant; .* use recipe cmpq"),
    ],
)
def test_other_values_of_options_that_went_are_refused_with_the_fix(name, options, message):
    with pytest.raises(UserError, match=message):
        make_recipe(name, **options)


def test_needs_are_named_fields_that_reject_a_misspelling() -> None:
    with pytest.raises(TypeError, match="hesian"):
        Needs(hesian=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="stream_drift is measured together with drift"):
        Needs(stream_drift=True)
    with pytest.raises(ValueError, match="attention_only restricts output_hessian"):
        Needs(attention_only=True)
    assert not Needs().calibration
    assert Needs(full_outputs=True).full_model
    assert make_recipe("quilt").needs == Needs(hessian=True, drift=True, stream_drift=True)
    assert make_recipe("quilt", alpha=0, stream_alpha=0.5).needs.drift
    assert make_recipe("aptq").needs == Needs(hessian=True, output_hessian=True)
    assert make_recipe("gptq", hessian="attention").needs == Needs(hessian=True, output_hessian=True)
