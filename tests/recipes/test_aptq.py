"""APTQ end to end: layers of two widths within the target, the first pass kept, the Hessian usable by other recipes."""

import json

import pytest
import torch

import bitquilt
from bitquilt.core.packing import pack, storage_bits
from bitquilt.core.types import Layer
from bitquilt.errors import UserError
from bitquilt.recipes import make_recipe
from tests.recipes.test_contract import make_layer
from tests.weights import naive_dense


def test_with_the_inputs_hessian_and_equal_bits_it_is_gptq():
    layer = make_layer()
    recipes = (
        make_recipe("aptq", bits=4, group_size=8, palette=(4,), allocation="hawq2"),
        make_recipe("gptq", bits=4, group_size=8),
    )
    found = []
    for recipe in recipes:
        prepared = recipe.prepare(layer.stats)
        plan = recipe.allocate(recipe.measure(layer, prepared), 44)
        found.append(pack(recipe.quantize(layer, plan, prepared).weight))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("allocation", ["trace", "hawq2"])
def test_plans(allocation):
    recipe = make_recipe("aptq", bits=3, group_size=8, allocation=allocation)
    sensed = {}
    for i in range(4):
        layer = make_layer(seed=i, width=40)
        sensed[f"l{i}"] = recipe.sense(Layer(f"l{i}", layer.weight, None, None), trace=10.0**i)
    plans = recipe.plan_model(sensed)
    weights = {name: value["weights"] for name, value in sensed.items()}
    mean = sum(plans[name].bits[0] * weights[name] for name in plans) / sum(weights.values())
    assert mean <= 3
    assert all(len(set(plan.bits)) == 1 for plan in plans.values())
    assert plans["l3"].bits[0] == 4
    assert plans["l0"].bits[0] == 2
    assert len(plans["l3"].bits) == 5


@pytest.mark.parametrize("options", [{}, {"allocation": "hawq2", "palette": (2, 3, 4, 5)}])
def test_true_bits_are_met_from_below(options):
    """The largest layer is the step; scales and zeros of ragged groups are counted."""
    shapes = {"a": (20, 44), "b": (33, 40), "c": (64, 17), "d": (12, 96)}
    sensed, layouts = {}, {}
    for bpw in (4.9, 5.6, 6.3):
        recipe = make_recipe("aptq", bpw=bpw, group_size=8, **options)
        recipe.check_layers(shapes)
        for i, (name, (out, width)) in enumerate(shapes.items()):
            layer = make_layer(out=out, width=width, seed=i)
            sensed[name] = recipe.sense(Layer(name, layer.weight, None, None), trace=10.0**i)
        plans = recipe.plan_model(sensed)
        for i, (name, (out, width)) in enumerate(shapes.items()):
            layer = make_layer(out=out, width=width, seed=i)
            layouts[name] = recipe.quantize(layer, plans[name], recipe.prepare(layer.stats)).weight.layout
        weights = sum(out * width for out, width in shapes.values())
        stored = sum(map(storage_bits, layouts.values()))
        assert bpw * weights - 2 * 33 * 40 - 2 * 64 * 17 < stored <= bpw * weights


def test_a_target_that_the_layers_cannot_have_is_refused_with_what_they_can(make_model, quantize_tiny, tmp_path):
    for bpw in (2.0, 9.0):
        with pytest.raises(UserError, match=rf"bpw is {bpw:g}; with palette \(2, 4\).* reach 4\.\d+ to 6\.\d+"):
            quantize_tiny(make_model(), tmp_path / "out", make_recipe("aptq", bpw=bpw, group_size=8))
    assert not (tmp_path / "out.work").exists()
    report = quantize_tiny(make_model(), tmp_path / "out", make_recipe("aptq", bpw=5.5, group_size=8)).report
    assert 5.0 < report["bpw"] <= 5.5


def test_published_measures_feed_forward_layers_where_gptq_does(make_quantized):
    """Their traces are those of the inputs; attention keeps its own."""
    ours, published = (make_quantized("llama", "aptq", published=p).report["layers"] for p in (False, True))
    for name, layer in published.items():
        assert (layer["trace"] == ours[name]["trace"]) == ("self_attn" in name), name


def test_a_larger_palette_needs_hawq2():
    recipe = make_recipe("aptq", bits=3, group_size=8, allocation="hawq2", palette=(2, 3, 4, 8))
    layer = make_layer()
    sensed = recipe.sense(layer, 1.0)
    assert sensed["error_2"] > sensed["error_3"] > sensed["error_4"] > sensed["error_8"]
    assert set(recipe.plan_model({"a": sensed, "b": sensed})["a"].bits) <= {2, 3, 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1.9}, r"bits is 1\.9; the palette \(2, 4\) reaches 2 to 4"),
        ({"bits": 4.1}, r"bits is 4\.1"),
        ({"bpw": 0.0}, r"bpw is 0\.0; wanted true bits"),
        ({"bpw": 3.0, "bits": 3.0}, "two budgets for the same run"),
        ({"palette": (2, 3, 4)}, "allocation=trace takes two widths"),
        ({"palette": (1, 4)}, "wanted widths from 2 to 8"),
        ({"palette": (4, 2)}, "wanted ascending bits"),
        ({"probes": 4}, "option 'probes': got 4; it is no longer an option and is fixed at 1"),
        ({"group_size": 10}, "group size is 10"),
        ({"published": True, "allocation": "hawq2"}, "allocation is hawq2; published=true has trace: leave out one"),
        ({"published": True, "scale_search": True}, "scale_search is True; published=true has False"),
        ({"published": True, "palette": (2, 3)}, r"palette is \(2, 3\); published=true has \(2, 4\)"),
    ],
)
def test_bad_options_are_named_with_the_fix(options, message):
    with pytest.raises(UserError, match=message):
        make_recipe("aptq", **options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt-neox", "qwen3-moe"])
def test_end_to_end(family, make_model, quantize_tiny, tmp_path):
    out = tmp_path / "out"
    report = quantize_tiny(make_model(family), out, "aptq", bits=3).report
    assert report["nominal_bits"] <= 3
    widths = {entry["bits"][0] for entry in report["layers"].values()}
    assert widths == {"2", "4"}
    ranked = sorted(report["layers"].values(), key=lambda entry: -entry["trace"] / entry["weights"])
    assert ranked[0]["bits"][0] == "4"
    assert ranked[-1]["bits"][0] == "2"
    ids = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert bool(torch.isfinite(bitquilt.load(out)(input_ids=ids).logits).all())
    assert not (tmp_path / "out.work").exists()
    plan = json.loads((out / "plan.json").read_text())
    assert set(plan["layers"]) == set(report["layers"])


def test_the_plan_and_the_seed_decide(make_model, quantize_tiny, read_tensors, tmp_path):
    first = quantize_tiny(make_model(), tmp_path / "a", "aptq", bits=3, batch_size=2)
    again = quantize_tiny(make_model(), tmp_path / "b", "aptq", bits=3, plan=tmp_path / "a" / "plan.json", batch_size=2)
    one, other = read_tensors(first.folder), read_tensors(again.folder)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_sequences_of_one_token_are_an_event(make_model, quantize_tiny, tmp_path):
    report = quantize_tiny(make_model(), tmp_path / "out", "aptq", bits=3, seq_len=1).report
    silent = [event["layer"] for event in report["events"] if event["kind"] == "no attention-aware Hessian"]
    assert len(silent) == 4
    assert all(name.endswith(("q_proj", "k_proj")) for name in silent)


@pytest.mark.parametrize("name", ["gptq", "slim-llm"])
def test_other_recipes_take_the_hessian_too(name, make_model, quantize_tiny, read_tensors, tmp_path):
    plain = quantize_tiny(make_model(), tmp_path / "plain", name)
    aware = quantize_tiny(make_model(), tmp_path / "aware", name, hessian="attention")
    one, other = read_tensors(plain.folder), read_tensors(aware.folder)
    changed = {
        key
        for key in one
        if key in other and one[key].shape == other[key].shape and not torch.equal(one[key], other[key])
    }
    assert any("q_proj.codes" in key for key in changed)
    assert aware.report["fingerprint"]["recipe"]["hessian"] == "attention"


def test_the_first_pass_reads_what_the_blocks_will(make_model, quantize_tiny, tmp_path):
    """An embedding in few bits is what both passes begin with; the first leaves nothing behind."""
    model = make_model()
    plain = quantize_tiny(model, tmp_path / "plain", "aptq", bits=3).report
    coarse = quantize_tiny(model, tmp_path / "coarse", "aptq", bits=3, embedding_bits=2).report
    name = "model.layers.0.mlp.down_proj"
    assert plain["layers"][name]["trace"] != coarse["layers"][name]["trace"]
    assert coarse["layers"]["model.embed_tokens"]["bits"].startswith("2")


def test_the_head_takes_the_highest_width(make_model, quantize_tiny, tmp_path):
    result = quantize_tiny(make_model(), tmp_path / "out", "aptq", bits=2.5, include_head=True)
    assert set(result.report["layers"]["lm_head"]["bits"]) == {"4"}


def test_a_killed_run_looks_once(make_model, quantize_tiny, tmp_path, monkeypatch):
    """Stopped after the first block: what the first pass found is read, and the result is that of one run."""
    from bitquilt.stream import block, first_pass
    from bitquilt.stream.hidden_states import CalibratedStates

    calls = []
    original = first_pass.collect_gradients

    def counting(*args, **kwargs):
        calls.append(kwargs["hessian"])
        return original(*args, **kwargs)

    monkeypatch.setattr(first_pass, "collect_gradients", counting)
    monkeypatch.setattr(block, "collect_gradients", counting)
    whole = quantize_tiny(make_model(), tmp_path / "whole", "aptq", bits=3)
    assert calls == [False, False, True, True]
    real = CalibratedStates.delete

    def killed(states, i):
        real(states, i)
        raise KeyboardInterrupt

    monkeypatch.setattr(CalibratedStates, "delete", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize_tiny(make_model(), tmp_path / "out", "aptq", bits=3)
    monkeypatch.setattr(CalibratedStates, "delete", real)
    assert not list(tmp_path.glob("out.work/first-*"))
    calls.clear()
    result = quantize_tiny(make_model(), tmp_path / "out", "aptq", bits=3)
    assert calls == [True]
    assert result.report["layers"].keys() == whole.report["layers"].keys()
    for name, entry in whole.report["layers"].items():
        assert result.report["layers"][name]["bits"] == entry["bits"]
        assert result.report["layers"][name]["loss"] == entry["loss"]


def test_weights_that_are_not_finite_are_named():
    layer = make_layer()
    layer.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"block\.layer: weight holds 1"):
        make_recipe("aptq").sense(layer, 1.0)
    clean = make_layer()
    recipe = make_recipe("aptq", bits=4, group_size=8)
    plan = recipe.allocate(recipe.measure(clean, None), 44)
    assert naive_dense(recipe.quantize(clean, plan, recipe.prepare(clean.stats)).weight).shape == clean.weight.shape
