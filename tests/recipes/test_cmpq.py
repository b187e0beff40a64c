"""CMPQ-style recipes: the contract of every recipe, the laws of the specification, and what a user may get wrong."""

import json
from dataclasses import replace

import pytest
import torch

import bitquilt
from bitquilt.core.packing import bits_per_weight, pack, storage_bits, unpack
from bitquilt.core.recipe import ChecksLayers, Needs
from bitquilt.core.types import Layer, LayerPlan, LayerStats
from bitquilt.errors import UserError
from bitquilt.layer.codebook_weight import LevelTables
from bitquilt.layer.layouts import channel_layout
from bitquilt.model.linear import QuantizedLinear
from bitquilt.recipes import make_recipe
from bitquilt.recipes.cmpq.trial_losses import Trial
from tests.recipes.test_contract import make_layer, output_error, run
from tests.weights import naive_dense

PLAIN = {"alpha": 0.0, "stream_alpha": 0.0}  # each layer for itself: bare layers have no drift
SWEPT = {**PLAIN, "error_outliers": 0.0045, "act_outliers": 0.0005, "allocation": "norm"}
VARIANTS = [
    ("cmpq", {}),
    ("cmpq", {"error_outliers": 0.0, "act_outliers": 0.0}),
    ("cmpq", {"error_outliers": 0.0, "act_outliers": 0.05}),
    ("cmpq", {"error_outliers": 0.05, "act_outliers": 0.02}),
    ("cmpq", {"allocation": "error_table"}),
    ("cmpq", {"published": True}),
    ("cmpq", {"published": True, "error_outliers": 0.0, "act_outliers": 0.0}),
    ("cmpq", {"published": True, "allocation": "error_table"}),
    ("cmpq+", PLAIN),
    ("cmpq+", SWEPT),
    ("cmpq+", {**SWEPT, "allocation": "error_table", "error_outliers": 0.03}),
]


def objective(layer, weight):
    norms = layer.stats.hessian.diagonal().double()
    return float(((layer.weight - naive_dense(weight)).double().square() * norms).sum())


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("bits", [2, 2.3, 3.5, 8])
def test_contract(name, options, bits):
    recipe = make_recipe(name, bits=bits, **options)
    layer = make_layer(out=300 if bits == 8 else 20)
    plan, solution = run(recipe, layer)
    layout = solution.weight.layout
    assert layout.in_features == len(plan.bits) == 44
    assert sum(plan.bits) == round(bits * 44)
    assert layout.nominal_bits == pytest.approx(round(bits * 44) / 44)
    scope, row_gain_dtype = ("channel", None) if recipe.published else ("shared", torch.float8_e4m3fn)
    tables = LevelTables(scope, dtype=layout.segments[0][0].scale_dtype, row_gain_dtype=row_gain_dtype)
    assert layout == channel_layout(layer.weight.shape[0], plan.bits, tables, layout.outliers)
    tensors = pack(solution.weight)
    assert bits_per_weight(layout) == 8 * sum(t.nbytes for t in tensors.values()) / layer.weight.numel()  # law C8
    assert torch.equal(naive_dense(unpack(tensors, layout)), naive_dense(solution.weight))
    torch.testing.assert_close(QuantizedLinear.from_weight(solution.weight).dequantize(), naive_dense(solution.weight))
    again = pack(run(recipe, layer)[1].weight)
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize(("out", "width"), [(5, 3), (1, 8), (2, 9), (9, 1)])
def test_layers_of_few_rows_or_columns(name, options, out, width):
    layer = make_layer(out=out, width=width)
    plan, solution = run(make_recipe(name, bits=2.5, **options), layer)
    own = options.get("published", False)
    if own:
        assert max(plan.bits) <= max(1, (out - 1).bit_length())
    assert ("more levels than rows" in [event.kind for event in solution.events]) == (own and out < 5)
    assert output_error(layer, solution) < 0.2 * float((layer.stats.sample @ layer.weight.t()).square().sum())


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_scale_of_the_hessian_changes_nothing(name, options):
    layer = make_layer()
    scaled = Layer(layer.name, layer.weight, layer.bias, LayerStats(64 * layer.stats.hessian, 300, layer.stats.sample))
    one, other = (run(make_recipe(name, bits=2.4, **options), each) for each in (layer, scaled))
    assert one[0] == other[0]
    assert torch.equal(naive_dense(one[1].weight), naive_dense(other[1].weight))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_rows_may_come_in_any_order(name, options):
    layer = make_layer()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(5))
    shuffled = Layer(layer.name, layer.weight[order], layer.bias[order], layer.stats)
    one, other = (run(make_recipe(name, bits=2.4, **options), each) for each in (layer, shuffled))
    assert one[0] == other[0]
    torch.testing.assert_close(naive_dense(other[1].weight), naive_dense(one[1].weight)[order])


@pytest.mark.parametrize("options", [options for name, options in VARIANTS if name == "cmpq"])
def test_permuted_channels_permute_the_result(options):
    """Law C2."""
    layer = make_layer()
    order = torch.randperm(44, generator=torch.Generator().manual_seed(6))
    stats = LayerStats(layer.stats.hessian[order][:, order], 300, layer.stats.sample[:, order])
    moved = Layer(layer.name, layer.weight[:, order], layer.bias, stats)
    one, other = (run(make_recipe("cmpq", bits=2.4, **options), each) for each in (layer, moved))
    assert other[0].bits == tuple(one[0].bits[j] for j in order.tolist())
    torch.testing.assert_close(naive_dense(other[1].weight), naive_dense(one[1].weight)[:, order])


def test_norms_choose_bits_but_leave_the_codes_of_a_channel():
    """Law C5, second half: without outliers a channel's codes depend on its weights and width alone."""
    layer = make_layer()
    recipe = make_recipe("cmpq", bits=3, error_outliers=0.0, act_outliers=0.0, published=True)
    other = Layer(layer.name, layer.weight, None, LayerStats(torch.diag(torch.rand(44)), 1, None))
    assert torch.equal(naive_dense(run(recipe, layer)[1].weight), naive_dense(run(recipe, other)[1].weight))


def test_protected_weights_are_exact_and_more_of_them_never_hurt():
    """Law C6."""
    layer = make_layer(out=60)
    errors = []
    for share in (0.0, 0.002, 0.01, 0.03, 0.1, 0.2):
        options = {"error_outliers": share, "act_outliers": 0.01, "published": True}
        solution = run(make_recipe("cmpq", bits=2.5, **options), layer)[1]
        errors.append(objective(layer, solution.weight))
        sparse = solution.weight.outliers
        rows = torch.repeat_interleave(torch.arange(60), sparse.rows.diff().long())
        columns = sparse.columns.long()
        exact, stored = layer.weight[rows, columns], naive_dense(solution.weight)[rows, columns]
        assert float((exact - stored).abs().max()) <= 2**-11 * float(sparse.values.abs().max())
        assert len(rows) == round(0.01 * 60 * 44) + round(share * 60 * 44)
    assert errors == sorted(errors, reverse=True)


def test_enough_levels_reconstruct_exactly():
    """Law C7."""
    layer = make_layer(out=200)
    grid = (layer.weight * 2).round().clamp(-3, 4) / 2  # eight distinct values
    layer = Layer(layer.name, grid, None, layer.stats)
    options = {"error_outliers": 0.0, "act_outliers": 0.0, "published": True}
    solution = run(make_recipe("cmpq", bits=3, **options), layer)[1]
    assert torch.equal(naive_dense(solution.weight), grid)


def test_channels_that_matter_get_the_bits_and_it_helps():
    layer = make_layer(out=120, width=64)
    plan, by_norm = run(make_recipe("cmpq", bits=2.5), layer)
    assert (set(plan.bits[:20]), set(plan.bits[-20:])) == ({2}, {3})  # the inputs' scales rise with the channel
    recipe = make_recipe("cmpq", bits=2.5)
    backwards = LayerPlan(plan.bits[::-1], 1)
    blind = recipe.quantize(layer, backwards, recipe.prepare(layer.stats))
    table = run(make_recipe("cmpq", bits=2.5, allocation="error_table"), layer)[1]
    assert objective(layer, table.weight) < objective(layer, by_norm.weight) < objective(layer, blind.weight)


def test_compensation_lowers_the_layers_output_error():
    layer = make_layer(out=60, width=64, tokens=600)
    mixed = layer.stats.sample @ (torch.eye(64) + 0.4 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))
    layer = Layer(layer.name, layer.weight, None, LayerStats(mixed.t() @ mixed, 600, mixed))
    plain = run(make_recipe("cmpq", bits=2.5), layer)[1]
    swept = run(make_recipe("cmpq+", bits=2.5, **SWEPT), layer)[1]
    assert output_error(layer, swept) < 0.9 * output_error(layer, plain)
    assert plain.loss is None
    assert swept.loss > 0


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("out", [96, 130])
def test_true_bits_are_met_from_below(name, options, out):
    """Exact to one channel, and to an outlier where O_q takes what is left."""
    layer = make_layer(out=out, width=100)
    least, most = make_recipe(name, bpw=3.0, **options)._budget().reach(out, 100)
    for target in (least, least + 0.3, least + 0.9, least + 1.25, most):
        recipe = make_recipe(name, bpw=target, **options)
        layout = run(recipe, layer)[1].weight.layout
        bits = storage_bits(layout)
        assert bits <= target * out * 100 + 1e-6
        if target == most:
            continue
        # an outlier, and wider row pointers for all; without O_q whole bytes per row are the step, and equal widths
        # save the map of one bit per channel and a table
        step = 32 + 16 * (out + 1)
        if not (recipe.error_outliers and layout.outliers):
            step += 2 * 8 * out + 2 * 16 * 32 + 200
        if recipe.allocation != "error_table":
            assert bits > target * out * 100 - step


def test_dead_channels_and_zero_inputs_rank_last():
    layer = make_layer()
    x = layer.stats.sample.clone()
    x[:, [3, 40]] = 0
    layer = Layer(layer.name, layer.weight, None, LayerStats(x.t() @ x, 300, x))
    for name, options in (("cmpq", {}), ("cmpq", {"allocation": "error_table"}), ("cmpq+", SWEPT)):
        plan, solution = run(make_recipe(name, bits=2.9, **options), layer)
        assert plan.bits[3] == plan.bits[40] == min(plan.bits)
        assert bool(torch.isfinite(naive_dense(solution.weight)).all())
    dead = Layer(layer.name, layer.weight, None, LayerStats(torch.zeros(44, 44), 300, torch.zeros(300, 44)))
    assert run(make_recipe("cmpq", bits=2.5), dead)[0].bits == (3,) * 22 + (2,) * 22


def test_zero_columns_and_zero_weights_stay_zero():
    layer = make_layer()
    layer.weight[:, [0, 7]] = 0
    dense = naive_dense(run(make_recipe("cmpq", bits=2.5), layer)[1].weight)
    assert bool((dense[:, [0, 7]] == 0).all())


def test_weights_beyond_half_precision_are_reported_and_not_protected():
    layer = make_layer()
    layer = Layer(layer.name, 1e6 * layer.weight, None, layer.stats)
    for name, options in (("cmpq", {}), ("cmpq+", SWEPT)):
        solution = run(make_recipe(name, bits=4, **options), layer)[1]
        kinds = [event.kind for event in solution.events]
        assert kinds == ["outliers out of float16 range", "scales out of float16 range"]
        assert bool(torch.isfinite(naive_dense(solution.weight)).all())


def test_missing_statistics_are_named():
    layer = make_layer()
    with pytest.raises(ValueError, match="activation statistics are missing"):
        make_recipe("cmpq").prepare(None)
    broken = LayerStats(torch.full((44, 44), float("nan")), 300, layer.stats.sample)
    with pytest.raises(ValueError, match="norms holds 44 NaN"):
        make_recipe("cmpq").prepare(broken)
    layer.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"block\.layer: weight holds 1 NaN"):
        run(make_recipe("cmpq"), layer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0.5}, "bits is 0.5; the palette reaches means from 1 to 8"),
        ({"bits": 4.5, "palette": (2, 3, 4)}, "means from 2 to 4"),
        ({"palette": (2, 4)}, "has a hole at 3"),
        ({"palette": ()}, "ascending widths"),
        ({"error_outliers": 0.6}, "error_outliers is 0.6"),
        ({"act_outliers": -1}, "act_outliers is -1"),
        ({"swap": 0.2}, "option 'swap': got 0.2; it is no longer an option and is fixed at 0.0"),
        ({"bpw": 0}, "bpw is 0"),
        ({"bpw": 3, "bits": 2}, "bits and bpw are two budgets"),
        ({"allocation": "first"}, "option 'allocation': got 'first'"),
        ({"group_size": 8}, "no option 'group_size'"),
        ({"codebook": "channel"}, r"'codebook': got 'channel'; .* fixed at 'shared' \('channel' with published=true\)"),
        ({"bits": 8.5}, "bits is 8.5; the palette reaches means from 1 to 8"),
    ],
)
def test_bad_options_are_named_with_the_fix(options, message):
    with pytest.raises(UserError, match=message):
        make_recipe("cmpq", **options)


def test_a_target_no_layer_can_meet_is_refused_with_what_it_can():
    recipe = make_recipe("cmpq", bpw=2.5, published=True, error_outliers=0.0, act_outliers=0.0)
    assert isinstance(recipe, ChecksLayers)
    with pytest.raises(ValueError, match=r"b \(16 x 64\) reaches 3\..* to .*; all layers together reach"):
        recipe.check_layers({"a": (4096, 64), "b": (16, 64)})
    with pytest.raises(ValueError, match=r"bpw is 2\.5; this 20 x 44 layer reaches"):
        run(recipe, make_layer())
    recipe.check_layers({"a": (4096, 4096)})


@pytest.mark.parametrize(
    ("name", "options"),
    [("cmpq", {"bits": 2.4}), ("cmpq", {"bpw": 5.0, "allocation": "error_table"}), ("cmpq+", SWEPT)],
)
def test_from_checkpoint_to_logits(make_model, token_file, tmp_path, name, options):
    recipe = make_recipe(name, **options)
    arguments = {"calibration": token_file, "samples": 6, "seq_len": 16}
    result = bitquilt.quantize(make_model(), recipe, out=tmp_path / "out", **arguments)
    report = result.report
    if recipe.bpw is None:
        assert report["nominal_bits"] == pytest.approx(recipe.bits, abs=1 / 32)
    else:
        assert recipe.bpw - 0.2 < report["bpw"] <= recipe.bpw
    assert report["logit_difference"] < 1e-4
    loaded = bitquilt.load(result.folder)
    with torch.no_grad():
        logits = loaded(torch.arange(3, 19)[None]).logits
    assert bool(torch.isfinite(logits).all())
    plan = json.loads((result.folder / "plan.json").read_text())
    assert {entry["group_size"] for entry in plan["layers"].values()} == {1}
    again = bitquilt.quantize(
        make_model(), recipe, out=tmp_path / "again", plan=result.folder / "plan.json", **arguments
    )
    with torch.no_grad():
        assert torch.equal(bitquilt.load(again.folder)(torch.arange(3, 19)[None]).logits, logits)
    with pytest.raises(UserError, match="has group_size 1; wanted groups of a multiple of 8"):
        bitquilt.quantize(
            make_model(), "rtn", out=tmp_path / "rtn", bits=3, group_size=8, plan=result.folder / "plan.json"
        )


def test_a_model_too_narrow_for_the_target_is_refused_before_the_work(make_model, token_file, tmp_path):
    options = {"bpw": 2.0, "published": True}
    with pytest.raises(UserError, match=r"bpw is 2\.0; model\.layers\.0\.self_attn\.q_proj"):
        bitquilt.quantize(make_model(), "cmpq", token_file, tmp_path / "out", samples=6, seq_len=16, **options)
    assert not (tmp_path / "out.work").exists()


def test_published_is_a_table_per_channel_and_the_shares_as_asked():
    recipe = make_recipe("cmpq", published=True, bpw=4.0)
    layer = make_layer(out=200, width=64)
    layout = run(recipe, layer)[1].weight.layout
    assert {form.group_size for form, _ in layout.segments} == {1}
    assert layout.row_gain_dtype is None
    assert layout.outliers >= round(0.005 * 200 * 64)


def test_outliers_are_kept_where_they_are_worth_more_than_bits():
    """Wild weights: protected. Tame ones: the bytes go into bits."""
    tame = make_layer(out=128, width=128)
    wild = make_layer(out=128, width=128)
    wild.weight[torch.rand(128, 128, generator=torch.Generator().manual_seed(2)) < 0.005] *= 30
    recipe = make_recipe("cmpq", bpw=3.0)
    kept = run(recipe, wild)[1].weight.layout
    assert kept.outliers >= round(0.005 * 128 * 128)
    for layer in (wild, tame):
        prepared = recipe.prepare(layer.stats)
        cost = recipe.measure(layer, prepared)
        asked = recipe.quantize(layer, cost.plans[0], prepared)  # most outliers first
        chosen = run(recipe, layer)[1]
        assert objective(layer, chosen.weight) <= objective(layer, asked.weight) * (1 + 1e-9)


def test_bits_instead_of_outliers_where_these_cost_more_than_they_save():
    layer = make_layer(out=64, width=64)
    recipe = make_recipe("cmpq", bpw=2.7)
    prepared = recipe.prepare(layer.stats)
    cost = recipe.measure(layer, prepared)
    asked, chosen = (
        recipe.quantize(layer, plan, prepared).weight for plan in (cost.plans[0], recipe.allocate(cost, 64))
    )
    assert chosen.layout.nominal_bits > asked.layout.nominal_bits
    assert objective(layer, chosen) < objective(layer, asked)


def with_unequal_rows(layer):
    """Half of the rows eight times as large as the others: queries in front of rotary positions look like that."""
    weight = layer.weight.clone()
    weight[: len(weight) // 2] *= 8
    return Layer(layer.name, weight, layer.bias, layer.stats)


@pytest.mark.parametrize(("name", "options"), [("cmpq", {}), ("cmpq+", SWEPT), ("cmpq", {"allocation": "error_table"})])
@pytest.mark.parametrize("bpw", [2.6, 3.6, 4.6])
def test_gains_of_rows_are_used_where_they_pay(name, options, bpw, monkeypatch):
    alike = make_layer(out=64, width=96, tokens=600)
    unequal = with_unequal_rows(alike)
    recipe = make_recipe(name, bpw=bpw, **options)
    for layer, pays in ((alike, False), (unequal, True)):
        chosen = run(recipe, layer)[1]
        assert (chosen.weight.row_gains is not None) == pays
        assert bits_per_weight(chosen.weight.layout) <= bpw
        with monkeypatch.context() as patch:
            patch.setattr(Trial, "gain_per_row_pays", lambda *_, pays=pays: not pays)
            other = run(recipe, layer)[1]
        assert (other.weight.row_gains is not None) != pays
        if pays:
            assert objective(layer, chosen.weight) < 0.97 * objective(layer, other.weight)
            if name == "cmpq+":
                assert chosen.loss < other.loss


def test_the_loss_of_a_sweep_over_gains_of_rows_is_that_of_the_weight():
    layer = with_unequal_rows(make_layer(out=40, width=48, tokens=500))
    recipe = make_recipe("cmpq+", bits=3, allocation="norm", **PLAIN)
    solution = run(recipe, layer)[1]
    error = (naive_dense(solution.weight) - layer.weight).double()
    hessian = layer.stats.hessian.double() / layer.stats.tokens
    hessian += recipe.damp * hessian.diagonal().mean() * torch.eye(48)
    assert solution.loss == pytest.approx(float((error @ hessian * error).sum()), rel=1e-3)


@pytest.mark.parametrize(("out", "width"), [(32, 64), (64, 172), (172, 64), (200, 200)])
def test_bits_by_the_error_table_never_lose_to_bits_by_norms(out, width):
    """The second table, the padding and the larger map of more widths are paid for before they are used."""
    layer = with_unequal_rows(make_layer(out=out, width=width, tokens=400))
    for bpw in (3.1, 3.9, 4.6):
        options = {"bpw": bpw, "error_outliers": 0.0, "act_outliers": 0.0}
        by_norm, by_table = (
            run(make_recipe("cmpq", allocation=choice, **options), layer)[1].weight
            for choice in ("norm", "error_table")
        )
        assert storage_bits(by_table.layout) <= bpw * out * width
        assert objective(layer, by_table) <= 1.001 * objective(layer, by_norm)


def test_a_palette_of_one_width_spends_what_is_left_on_outliers():
    layer = make_layer(out=128, width=128)
    recipe = make_recipe("cmpq", bpw=3.2, palette=(3,))
    plan, solution = run(recipe, layer)
    assert set(plan.bits) == {3}
    assert 3.15 < bits_per_weight(solution.weight.layout) <= 3.2
    assert solution.weight.outliers is not None


def test_shared_tables_cost_little_on_narrow_layers_and_lose_less():
    """At the same bytes, on 64 rows."""
    layer = make_layer(out=64, width=96)
    shared, own = (
        run(make_recipe("cmpq", bpw=4.0, published=published), layer)[1].weight for published in (False, True)
    )
    assert shared.layout.nominal_bits > own.layout.nominal_bits + 0.5
    assert objective(layer, shared) < 0.8 * objective(layer, own)


def test_tiny_weights_keep_their_digits():
    layer = make_layer()
    small = Layer(layer.name, 1e-4 * layer.weight, None, layer.stats)
    recipe = make_recipe("cmpq", bits=3, error_outliers=0.0, act_outliers=0.0)  # float16 could not hold them
    big, little = (run(recipe, each)[1].weight for each in (layer, small))
    assert objective(small, little) == pytest.approx(1e-8 * objective(layer, big), rel=0.05)


def test_a_layer_repairs_what_the_layers_before_it_broke():
    """Against the full-precision model's output on its own inputs, at the same bytes; 6 bits: rounding is small."""
    g = torch.Generator().manual_seed(1)
    layer = make_layer()
    here = layer.stats.sample
    full = here + 0.1 * here @ torch.randn(44, 44, generator=g)  # what a weight on `here` can repair
    stats = replace(layer.stats, drift=(full - here).t() @ here)
    aim, errors, sizes = full @ layer.weight.t(), [], []
    for alpha in (0.0, 1.0):
        recipe = make_recipe("cmpq+", bits=6, alpha=alpha, stream_alpha=0.0)
        _, solution = run(recipe, replace(layer, stats=stats))
        errors.append(float((here @ naive_dense(solution.weight).t() - aim).square().sum()))
        sizes.append(storage_bits(solution.weight.layout))
    assert errors[1] < 0.1 * errors[0]
    assert sizes[0] == sizes[1]


def test_only_cmpq_plus_repairs():
    with pytest.raises(UserError, match=r"recipe cmpq, option 'alpha': got 0\.5; it is no longer an option"):
        make_recipe("cmpq", alpha=0.5)
    assert make_recipe("cmpq").needs == Needs(hessian=True)
    assert make_recipe("cmpq+").needs == Needs(hessian=True, drift=True, stream_drift=True)
    assert make_recipe("cmpq+", **PLAIN).needs == Needs(hessian=True)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("budget", ["bits", "bpw"])
def test_a_matrix_of_zeros_has_zeros_as_levels_and_an_event(name, options, budget):
    """As block expansion makes them. Layers of more than 4096 weights are clustered in bins."""
    layer = make_layer(out=200)
    layer = replace(layer, weight=torch.zeros_like(layer.weight))
    _, solution = run(make_recipe(name, **{budget: 3.5}, **options), layer)
    assert not naive_dense(solution.weight).any()
    assert "zero weights" in {event.kind for event in solution.events}


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_layer_whose_inputs_are_all_zero_is_stored_with_an_event(name, options):
    layer = make_layer(out=200)
    stats = replace(layer.stats, hessian=torch.zeros_like(layer.stats.hessian))
    _, solution = run(make_recipe(name, bits=3.5, **options), replace(layer, stats=stats))
    assert torch.isfinite(naive_dense(solution.weight)).all()
    assert [e.detail for e in solution.events if e.kind == "dead channels"] == [
        "44 of 44 input channels saw only zeros"
    ]
    if name == "cmpq+":
        assert not naive_dense(solution.weight).any()
