"""MicroMix: parts of the closed form, weights and inputs in the same numbers, one partition per input, round trips."""

import json

import pytest
import torch

import bitquilt
from bitquilt.core.packing import bits_per_weight, layout_from_json, layout_to_json, pack, unpack
from bitquilt.core.types import Format, Layer, LayerPlan, LayerStats, Layout
from bitquilt.errors import UserError
from bitquilt.layer.sensitivity.kfac import width_losses
from bitquilt.model.linear import QuantizedLinear
from bitquilt.ops.microscaling import E2M1, E3M2, E4M3, quantize_blocks
from bitquilt.recipes import make_recipe
from tests.recipes.test_contract import make_layer, run
from tests.weights import naive_dense

VARIANTS = [
    {},
    {"bits": 4.5},
    {"bits": 6},
    {"published": True, "multiplier": 2.0},
    {"quantize_activations": False},
]


def wide_layer(width=256, out=20, tokens=300):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, width, generator=g) * torch.exp(1.5 * torch.randn(width, generator=g))
    stats = LayerStats(torch.zeros(0, 0), tokens, x)
    return Layer("block.layer", torch.randn(out, width, generator=g), torch.randn(out, generator=g), stats)


def emulated(layer, solution, x, element_of, rule):
    """X_p W_p^T part by part, with the channels looked up, in double precision."""
    layout, dense = solution.weight.layout, naive_dense(solution.weight).double()
    order = (
        torch.arange(layout.in_features) if solution.weight.permutation is None else solution.weight.permutation.order
    )
    output, start = torch.zeros(len(x), layout.out_features, dtype=torch.float64), 0
    for form, width in layout.segments:
        channels = order[start : start + width]
        start += width
        part = quantize_blocks(x[:, channels], element_of[form.bits], rule)
        output += part.double() @ dense[:, channels].t()
    return output + layer.bias.double()


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("width", [3, 32, 44, 160, 256])
def test_contract(options, width):
    recipe = make_recipe("micromix", **options)
    layer = wide_layer(width)
    plan, solution = run(recipe, layer)
    layout = solution.weight.layout
    assert (layout.out_features, layout.in_features) == (20, width)
    assert layout.nominal_bits == pytest.approx(
        sum(w * b for w, b in zip(plan.widths(width), plan.bits, strict=True)) / width
    )
    tensors = pack(solution.weight)
    assert layout_from_json(json.loads(json.dumps(layout_to_json(layout)))) == layout
    assert torch.equal(naive_dense(unpack(tensors, layout)), naive_dense(solution.weight))
    assert torch.equal(QuantizedLinear.from_weight(solution.weight).dequantize(), naive_dense(solution.weight))
    relative = (naive_dense(solution.weight) - layer.weight).square().sum() / layer.weight.square().sum()
    assert float(relative) < 0.03
    again = pack(run(recipe, layer)[1].weight)
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)
    given = recipe.quantize(layer, plan, recipe.prepare(layer.stats))
    assert all(torch.equal(tensors[key], value) for key, value in pack(given.weight).items())


@pytest.mark.parametrize("rule", ["ceil", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_is_the_product_of_the_rounded_operands(rule, dtype):
    layer = wide_layer(512)
    solution = run(make_recipe("micromix", bits=5.5, published=rule == "paper"), layer)[1]
    assert len(solution.weight.segments) == 3
    module = QuantizedLinear.from_weight(solution.weight, layer.bias)
    assert module.settle() is None  # the kernels would leave the input as it is
    x = layer.stats.sample[:7].to(dtype)
    expected = emulated(layer, solution, x, {4: E2M1, 6: E3M2, 8: E4M3}, rule)
    output = module(x)
    assert output.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    plain = torch.nn.functional.linear(x.float(), naive_dense(solution.weight), layer.bias)
    assert float((plain - expected).abs().max()) > 1e-3  # the inputs really are rounded


def test_without_quantized_inputs_the_product_is_the_plain_one():
    layer = wide_layer()
    solution = run(make_recipe("micromix", quantize_activations=False), layer)[1]
    module = QuantizedLinear.from_weight(solution.weight)
    x = layer.stats.sample[:7]
    torch.testing.assert_close(module(x), x @ naive_dense(solution.weight).t())


@pytest.mark.parametrize(("bits", "element"), [(4, E2M1), (8, E4M3)])
def test_one_part_is_plain_mx(bits, element):
    layer = wide_layer(128)
    plan = LayerPlan((bits,) * 4, 32)
    recipe = make_recipe("micromix")
    prepared = recipe.prepare(layer.stats)
    module = QuantizedLinear.from_weight(recipe.quantize(layer, plan, prepared).weight)
    x = layer.stats.sample[:4]
    order = prepared.order
    expected = (
        quantize_blocks(x[:, order], element, "ceil") @ quantize_blocks(layer.weight[:, order], element, "ceil").t()
    )
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_storage_of_the_worked_example():
    """4096 inputs in parts of 2304, 1280 and 512: 5.375 bits and the order of the channels."""

    def part(bits):
        return Format(bits, 32, "mx", torch.uint8, symmetric=True, activation="ceil")

    layout = Layout(4096, 4096, ((part(4), 2304), (part(6), 1280), (part(8), 512)), "order", 1)
    assert layout.nominal_bits == 5.125
    assert bits_per_weight(layout) == pytest.approx(5.375 + 16 / 4096)
    assert bits_per_weight(Layout(64, 64, ((part(4), 64),))) == 4.25


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [("886644", 32), ("444444", 32), ("468846", 32), ("864", 64)])
def test_what_a_plan_stores_is_known_before(bits, group_size, sampled):
    """Whatever the order of the channels comes to, even where it is no order at all."""
    layer, recipe = wide_layer(172), make_recipe("micromix")
    plan = LayerPlan(tuple(map(int, bits)), group_size)
    prepared = recipe.prepare(layer.stats) if sampled else None
    stored = recipe.quantize(layer, plan, prepared).weight
    assert recipe.layout(20, 172, plan) == stored.layout == unpack(pack(stored), stored.layout).layout
    # the plan's first group holds the loudest channels
    loudest = recipe.column_order(layer, prepared)[:group_size]
    order, start = stored.permutation.order, 0
    for form, width in stored.layout.segments:
        inside = set(order[start : start + width].tolist())
        assert (set(loudest.tolist()) <= inside) == (form.bits == plan.bits[0])
        start += width


def test_tables_count_what_rounding_the_input_costs():
    """The loss of a group at a width is that of the layer's own product, on the sampled tokens, errors squared."""
    layer = wide_layer(96)
    layer = Layer(
        layer.name, layer.weight, None, LayerStats(layer.stats.sample.t() @ layer.stats.sample, 300, layer.stats.sample)
    )
    recipe = make_recipe("micromix")
    prepared = recipe.prepare(layer.stats)
    order, x = recipe.column_order(layer, prepared), layer.stats.sample
    table = width_losses(
        layer.weight,
        lambda bits: recipe.rounded(layer, prepared, bits),
        torch.ones(20),
        recipe.column_cost(layer, prepared),
        recipe.widths(20),
        32,
        inputs=lambda bits: recipe.input_error(layer, prepared, bits),
        order=order,
    )
    for i, element in enumerate((E2M1, E3M2, E4M3)):
        for k, channels in enumerate(order.split(32)):
            wrong = quantize_blocks(layer.weight[:, channels], element, "ceil") - layer.weight[:, channels]
            noise = quantize_blocks(x[:, channels], element, "ceil") - x[:, channels]
            weights = (wrong.square() @ x[:, channels].square().mean(dim=0)).sum()
            inputs = (layer.weight[:, channels].square() @ noise.square().mean(dim=0)).sum()
            assert float(table[k, i]) == pytest.approx(0.5 * float(weights + inputs), rel=1e-4)
    assert not recipe.input_error(layer, None, 4).any()
    still = make_recipe("micromix", quantize_activations=False)
    assert not still.input_error(layer, prepared, 4).any()


def test_layers_of_one_input_share_the_parts():
    layer = wide_layer()
    recipe = make_recipe("micromix")
    other = Layer("block.other", layer.weight.flip(0)[:7], None, layer.stats)
    prepared = recipe.prepare(layer.stats)
    plans = [recipe.allocate(recipe.measure(one, prepared), 256) for one in (layer, other)]
    assert plans[0] == plans[1]


def test_a_lower_target_takes_fewer_bits():
    layer = wide_layer(1024)
    means = [
        run(make_recipe("micromix", bits=b, alignment=32), layer)[1].weight.layout.nominal_bits for b in (4, 5, 6, 8)
    ]
    assert means == sorted(means)
    assert means[0] == 4
    assert means[-1] == pytest.approx(8, abs=0.1)
    assert means[1] == pytest.approx(5, abs=0.2)


@pytest.mark.parametrize(("out", "width", "alignment"), [(300, 1024, 128), (300, 1024, 32), (64, 160, 32)])
def test_true_bits_are_met_from_below(out, width, alignment):
    """To the parts that move at one multiplier; the rows pay for the order of the channels."""
    layer = wide_layer(width, out)
    order = 16 / out
    for target in (4.27, 4.6, 5.4, 6.6, 8.0):
        recipe = make_recipe("micromix", bpw=target + order, alignment=alignment)
        recipe.check_layers({layer.name: (out, width)})
        bpw = bits_per_weight(run(recipe, layer)[1].weight.layout)
        assert target + order - 2 * 2 * alignment / width < bpw <= target + order


def test_a_target_below_four_bits_is_refused_before_the_work(make_model, quantize_tiny, tmp_path):
    with pytest.raises(UserError, match=r"bpw is 4\.2; model\.layers\.0\.self_attn\.q_proj \(\d+ x \d+\) takes"):
        quantize_tiny(make_model(), tmp_path / "out", make_recipe("micromix", bpw=4.2))
    assert not (tmp_path / "out.work").exists()
    report = quantize_tiny(make_model(), tmp_path / "out", make_recipe("micromix", bpw=6.5, alignment=32)).report
    assert report["bpw"] <= 6.5


def test_without_a_sample_everything_has_eight_bits_and_the_report_says_so():
    layer = make_layer()
    layer = Layer(layer.name, layer.weight, None, LayerStats(torch.eye(44), 1, None))
    plan, solution = run(make_recipe("micromix"), layer)
    assert set(plan.bits) == {8}
    assert [event.kind for event in solution.events] == ["no token sample"]
    with pytest.raises(ValueError, match="needs calibration data"):
        make_recipe("micromix").prepare(None)


def test_what_is_not_finite_is_named():
    layer = make_layer()
    layer.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"block\.layer: weight holds 1 NaN"):
        run(make_recipe("micromix"), layer)
    layer = wide_layer()
    layer.stats.sample[0, 0] = float("inf")
    with pytest.raises(ValueError, match="the layer's input holds NaN or Inf"):
        run(make_recipe("micromix"), layer)


def test_an_infinite_input_spoils_its_own_token_only():
    layer = wide_layer()
    module = QuantizedLinear.from_weight(run(make_recipe("micromix"), layer)[1].weight)
    x = layer.stats.sample[:3].clone()
    clean = module(x)
    x[1, 5] = float("inf")
    output = module(x)
    assert bool(output[1].isnan().all())
    assert torch.equal(output[[0, 2]], clean[[0, 2]])
    assert module(x[:0]).shape == (0, 20)


def test_gradients_pass_through_the_rounding():
    layer = wide_layer()
    module = QuantizedLinear.from_weight(run(make_recipe("micromix"), layer)[1].weight)
    x = layer.stats.sample[:3].clone().requires_grad_()
    upstream = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    module(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ module.dequantize())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits is 3; MX elements have 4, 6 or 8, so their mean is 4 to 8"),
        ({"bits": 5, "multiplier": 2}, "give one"),
        ({"bpw": 5, "multiplier": 2}, "give one"),
        ({"bpw": 5, "bits": 5}, "two budgets for the same run"),
        ({"bpw": -1}, "bpw is -1"),
        ({"multiplier": -1}, "multiplier is -1"),
        ({"alignment": 48}, "alignment is 48; wanted a positive multiple of 32"),
        ({"runs": 8}, "option 'runs': got 8; it is no longer an option and is fixed at 32"),
        ({"six": "e2m3"}, "option 'six': got 'e2m3'"),
        ({"group_size": 32}, "has no option 'group_size'"),
    ],
)
def test_bad_options_are_named_with_the_fix(options, message):
    with pytest.raises(UserError, match=message):
        make_recipe("micromix", **options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_end_to_end(family, make_model, quantize_tiny, tmp_path):
    recipe = make_recipe("micromix", bits=5.5, alignment=32)
    result = quantize_tiny(make_model(family), tmp_path / "out", recipe)
    report = result.report
    assert 4 <= report["nominal_bits"] <= 8
    assert all({"shares", "multiplier"} <= set(layer) for layer in report["layers"].values() if layer["output_error"])
    ids = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        logits = bitquilt.load(tmp_path / "out")(input_ids=ids).logits
    assert bool(torch.isfinite(logits).all())
    replayed = quantize_tiny(make_model(family), tmp_path / "again", recipe, plan=tmp_path / "out" / "plan.json")
    with torch.no_grad():
        assert torch.equal(bitquilt.load(replayed.folder)(input_ids=ids).logits, logits)


def test_a_plan_with_bits_that_no_element_has_is_refused(make_model, quantize_tiny, tmp_path):
    recipe = make_recipe("micromix")
    quantize_tiny(make_model(), tmp_path / "out", recipe)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    entry = next(iter(plan["layers"].values()))
    entry["bits"] = "5" + entry["bits"][1:]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="gives channels 5 bits; MX elements have 4, 6 or 8"):
        quantize_tiny(make_model(), tmp_path / "other", recipe, plan=tmp_path / "plan.json")
