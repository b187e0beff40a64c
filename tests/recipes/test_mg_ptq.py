"""MG-PTQ: bits within the budget in groups and in columns, both allocators in the report, the guard, determinism."""

import json
from functools import partial

import pytest
import torch

import bitquilt
from bitquilt.allocation.graph_network import GraphTraining
from bitquilt.core.packing import pack, unpack
from bitquilt.core.types import Cost, Layer, LayerPlan, LayerStats
from bitquilt.errors import UserError
from bitquilt.model.linear import QuantizedLinear
from bitquilt.recipes import make_recipe, mg_ptq
from tests.recipes.test_contract import make_layer, output_error, run
from tests.weights import naive_dense


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Five steps of the graph network and two rounds of sweeps, instead of hundreds and tens."""
    monkeypatch.setattr(mg_ptq, "GraphTraining", partial(GraphTraining, steps=5, samples=2, rounds=2))


VARIANTS = [
    {},
    {"allocator": "graph"},
    {"allocator": "best"},
    {"granularity": "column"},
    {"granularity": "column", "allocator": "graph", "palette": (2, 3, 4)},
]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("bits", [2, 2.3, 3.5])
def test_contract(options, bits):
    recipe = make_recipe("mg-ptq", bits=bits, group_size=8, **options)
    layer = make_layer(out=20, width=44)
    plan, solution = run(recipe, layer)
    layout = solution.weight.layout
    assert layout.nominal_bits <= bits
    assert layout.nominal_bits >= bits - 0.2  # the narrow last group leaves less than a step
    assert set(plan.bits) <= set(recipe.palette)
    assert len(plan.bits) == (44 if recipe.plan_terms.unit_columns == 1 else 6)
    tensors = pack(solution.weight)
    assert torch.equal(naive_dense(unpack(tensors, layout)), naive_dense(solution.weight))
    torch.testing.assert_close(QuantizedLinear.from_weight(solution.weight).dequantize(), naive_dense(solution.weight))
    again = pack(run(recipe, layer)[1].weight)
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("width", [3, 8, 9, 20])
def test_narrow_layers_and_ragged_groups(options, width):
    layer = make_layer(out=5, width=width)
    plan, solution = run(make_recipe("mg-ptq", bits=3, group_size=8, **options), layer)
    assert solution.weight.layout.in_features == width
    assert sum(plan.widths(width)) == width
    assert output_error(layer, solution) < 0.25 * float((layer.stats.sample @ layer.weight.t()).square().sum())


@pytest.mark.parametrize("granularity", ["group", "column"])
def test_the_swept_loss_is_the_error_weighed_by_the_damped_hessian(granularity):
    """tr((W - Q) H (W - Q)^T), whatever the map and the order of the columns."""
    layer = make_layer(out=12, width=40)
    recipe = make_recipe("mg-ptq", bits=2.5, group_size=8, granularity=granularity)
    _, solution = run(recipe, layer)
    hessian = layer.stats.hessian.double() / layer.stats.tokens
    hessian += 0.01 * float(hessian.diagonal().mean()) * torch.eye(40)
    error = (layer.weight - naive_dense(solution.weight)).double()
    expected = float(torch.trace(error @ hessian @ error.t()))
    assert solution.loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("options", VARIANTS)
def test_the_scale_of_the_hessian_changes_nothing(options):
    recipe = make_recipe("mg-ptq", bits=2.4, group_size=8, **options)
    layer = make_layer()
    scaled = Layer(layer.name, layer.weight, layer.bias, LayerStats(64 * layer.stats.hessian, 300, layer.stats.sample))
    one, other = run(recipe, layer), run(recipe, scaled)
    assert one[0] == other[0]
    assert torch.equal(naive_dense(one[1].weight), naive_dense(other[1].weight))


@pytest.mark.parametrize(
    ("allocator", "reported", "candidates"),
    [
        ("exact", ("exact", "uniform"), ("exact", "uniform")),
        ("graph", ("exact", "graph", "uniform"), ("graph", "uniform")),
        ("best", ("exact", "graph", "uniform"), ("exact", "graph", "uniform")),
    ],
)
def test_every_map_is_swept_and_the_better_of_the_chosen_and_uniform_stays(
    allocator, reported, candidates, monkeypatch
):
    trained = []
    original = mg_ptq.graph_bits
    monkeypatch.setattr(mg_ptq, "graph_bits", lambda *args, **named: trained.append(1) or original(*args, **named))
    layer = make_layer(width=64, tokens=500)
    recipe = make_recipe("mg-ptq", bits=2, group_size=8, allocator=allocator)
    cost = recipe.measure(layer, recipe.prepare(layer.stats))
    assert len(trained) == (allocator != "exact")
    assert set(cost.details["swept_loss"]) == set(reported)
    assert set(cost.details["table_error"]) == {*reported, "lagrangian"}
    table = cost.details["table_error"]
    assert table["exact"] <= min(table.values()) + 1e-9
    assert cost.losses == tuple(cost.details["swept_loss"][name] for name in candidates)
    for plan, loss in zip(cost.plans, cost.losses, strict=True):
        assert recipe.quantize(layer, plan, recipe.prepare(layer.stats)).loss == loss
    fractional = make_recipe("mg-ptq", bits=2.5, group_size=8)
    assert "uniform" not in fractional.measure(layer, recipe.prepare(layer.stats)).details["swept_loss"]


@pytest.mark.parametrize(("losses", "chosen"), [((2.0, 1.0, 3.0), 1), ((2.0, 3.0, 1.5), 2), ((1.0, 1.0, 1.0), 0)])
def test_the_least_swept_loss_wins_and_the_earlier_map_a_tie(losses, chosen):
    plans = tuple(LayerPlan(bits, 8) for bits in ((1, 3), (3, 1), (2, 2)))
    assert make_recipe("mg-ptq").allocate(Cost(plans, losses), 16) == plans[chosen]


def test_mixed_bits_beat_uniform_ones_where_columns_differ():
    layer = make_layer(width=64, tokens=500)
    weight = layer.weight * torch.logspace(-1, 1, 64)
    layer = Layer(layer.name, weight, layer.bias, layer.stats)
    mixed = run(make_recipe("mg-ptq", bits=2, group_size=8), layer)[1]
    uniform = run(make_recipe("slim-llm", bits=2, group_size=8, allocation="uniform"), layer)[1]
    assert mixed.loss < 0.8 * uniform.loss


def test_columns_keep_their_own_bits():
    """Every fourth column is large: columns see it, groups of eight cannot."""
    layer = make_layer(width=64, tokens=500)
    weight = layer.weight.clone()
    weight[:, ::4] *= 20
    layer = Layer(layer.name, weight, layer.bias, LayerStats(torch.eye(64) * 500, 500, layer.stats.sample))
    plan, by_column = run(make_recipe("mg-ptq", bits=2, group_size=8, granularity="column"), layer)
    assert min(plan.bits[::4]) > max(b for j, b in enumerate(plan.bits) if j % 4)
    _, by_group = run(make_recipe("mg-ptq", bits=2, group_size=8), layer)
    assert by_column.loss < 0.5 * by_group.loss


@pytest.mark.parametrize("bits", [(2,) * 44, (4, 1, 3, 1) * 11, (4,) * 30 + (2,) * 14, (1,) * 40 + (3,) * 4])
def test_what_a_plan_of_columns_stores_is_known_before(bits):
    layer, plan = make_layer(out=20, width=44), LayerPlan(bits, 1)
    recipe = make_recipe("mg-ptq", group_size=8, granularity="column")
    stored = recipe.quantize(layer, plan, recipe.prepare(layer.stats)).weight
    assert recipe.layout(20, 44, plan) == stored.layout


def test_a_column_group_alone_and_dead_channels():
    layer = make_layer(width=20)
    plan, _ = run(make_recipe("mg-ptq", bits=2.5, group_size=32), layer)
    assert plan.bits == (2,)
    x = layer.stats.sample.clone()
    x[:, 8:16] = 0
    layer = Layer(layer.name, layer.weight, None, LayerStats(x.t() @ x, 300, x))
    plan, solution = run(make_recipe("mg-ptq", bits=2, group_size=8), layer)
    assert plan.bits[1] == 1
    assert [event.kind for event in solution.events] == ["dead channels"]


def test_nan_in_a_weight_names_the_layer():
    layer = make_layer()
    layer.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"block\.layer: weight holds 1 NaN"):
        run(make_recipe("mg-ptq", bits=3, group_size=8), layer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0.9}, r"bits is 0\.9; the palette \(1, 2, 3, 4\) reaches 1 to 4"),
        ({"bits": 4.1}, r"bits is 4\.1; the palette"),
        ({"palette": (2, 1)}, "wanted ascending bits"),
        ({"palette": (2, 9)}, "wanted widths from 1 to 8"),
        ({"palette": ()}, "wanted ascending bits"),
        ({"group_size": 12}, "group size is 12; wanted a positive multiple of 8"),
        ({"steps": 50}, "option 'steps': got 50; it is no longer an option and is fixed at 200"),
        ({"damp": 0}, "damp is 0"),
        ({"allocator": "magic"}, "option 'allocator': got 'magic'"),
        ({"act_order": True}, "has no option 'act_order'"),
        ({"bpw": 2.5}, "has no option 'bpw'"),
    ],
)
def test_bad_options_are_named_with_the_fix(options, message):
    with pytest.raises(UserError, match=message):
        make_recipe("mg-ptq", **options)


@pytest.mark.parametrize(("family", "granularity"), [("llama", "group"), ("gpt2", "column"), ("mixtral", "group")])
def test_end_to_end(family, granularity, make_model, quantize_tiny, tmp_path):
    options = {"bits": 2.5, "granularity": granularity}
    out = tmp_path / "out"
    result = quantize_tiny(make_model(family), out, "mg-ptq", **options)
    report = result.report
    assert report["nominal_bits"] <= 2.5
    for layer in report["layers"].values():
        assert set(layer["swept_loss"]) == {"exact"}  # no graph is trained, no uniform map has 2.5 bits
        assert layer["loss"] == layer["swept_loss"]["exact"]
    plan = json.loads((out / "plan.json").read_text())
    assert {entry["group_size"] for entry in plan["layers"].values()} == {1 if granularity == "column" else 8}
    ids = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        logits = bitquilt.load(out)(input_ids=ids).logits
    assert bool(torch.isfinite(logits).all())
    again = quantize_tiny(make_model(family), tmp_path / "replayed", "mg-ptq", plan=out / "plan.json", **options)
    with torch.no_grad():
        torch.testing.assert_close(bitquilt.load(again.folder)(input_ids=ids).logits, logits)


def test_a_plan_of_the_other_granularity_is_refused(make_model, quantize_tiny, tmp_path):
    quantize_tiny(make_model(), tmp_path / "out", "mg-ptq")
    with pytest.raises(UserError, match="wanted group_size 1"):
        quantize_tiny(make_model(), tmp_path / "other", "mg-ptq", granularity="column", plan=tmp_path / "out/plan.json")
