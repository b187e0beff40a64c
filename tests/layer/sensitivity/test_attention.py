"""Exact traces against automatic differentiation, the estimator against the exact traces, and the laws of both."""

from dataclasses import replace

import pytest
import torch

from bitquilt.layer.sensitivity.attention import GradientSums, gradient_sums, probe_signs, sequence_gradients
from tests.layer.sensitivity.exact_attention import jacobian_of, tiny

SHAPES = [(4, 2, True), (4, 4, True), (4, 4, False), (2, 1, False)]


@pytest.mark.parametrize(("heads", "kv_heads", "rotary"), SHAPES)
@pytest.mark.parametrize("name", ["q", "k", "v", "o"])
def test_exact_forms_are_the_squared_jacobian(heads, kv_heads, rotary, name):
    attention = tiny(heads, kv_heads, rotary)
    jacobian = jacobian_of(attention, name)
    trace, products = getattr(attention, f"exact_{name}")()
    torch.testing.assert_close(trace, 2 * jacobian.square().sum(), rtol=1e-12, atol=0)
    rows = jacobian.flatten(0, 2)
    torch.testing.assert_close(products, 2 * rows.t() @ rows, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(products.trace(), trace)


def test_adding_the_squared_norms_of_sharing_heads_would_be_wrong():
    attention = tiny(4, 2)
    columns, mixed = attention.head_columns(), attention.parts()[3] @ attention.x
    without = sum(2 * columns[h].square().sum() * mixed[h].square().sum() for h in range(4))
    assert abs(float(without / attention.exact_v()[0]) - 1) > 0.005


def test_without_sharing_the_hessian_of_v_is_one_kronecker_product_per_head():
    attention = tiny(4, 4, rotary=False)
    jacobian = jacobian_of(attention, "v")
    mixed, columns = attention.parts()[3] @ attention.x, attention.head_columns()
    for h in range(4):
        rows = jacobian[:, :, 4 * h : 4 * h + 4].flatten(2).flatten(0, 1)
        expected = 2 * torch.kron(columns[h].t() @ columns[h], mixed[h].t() @ mixed[h])
        torch.testing.assert_close(2 * rows.t() @ rows, expected)


def test_a_constant_added_to_every_key_changes_nothing():
    attention = tiny(4, 4, rotary=False)
    _, _, values, probabilities, outputs = attention.parts()
    centred = torch.einsum("hts,htsv->htv", probabilities, values[:, None] - outputs[:, :, None])
    assert float(centred.abs().max()) < 1e-12
    # queries and values held, keys shifted: what the exact form of Q is built from
    _, keys, _, _, _ = attention.parts()
    for h in range(4):
        for t in range(6):
            spread = [
                torch.einsum("s,sk,sv->kv", probabilities[h, t], shifted, values[h] - outputs[h, t])
                for shifted in (keys[h], keys[h] + 3.0)
            ]
            torch.testing.assert_close(*spread)


def test_the_first_token_says_nothing_about_queries_and_keys():
    attention = tiny()
    for name in ("q", "k"):
        assert float(jacobian_of(attention, name)[0].abs().max()) < 1e-14
    alone = tiny(tokens=1)
    assert float(alone.exact_q()[0]) == pytest.approx(0, abs=1e-20)
    assert float(alone.exact_k()[0]) == pytest.approx(0, abs=1e-20)


def test_scaling():
    attention = tiny()
    louder = replace(attention, o=3 * attention.o)
    for name in ("q", "k", "v"):
        ratio = getattr(louder, f"exact_{name}")()[0] / getattr(attention, f"exact_{name}")()[0]
        assert float(ratio) == pytest.approx(9)
    torch.testing.assert_close(louder.exact_o()[0], attention.exact_o()[0])


def estimate(attention, name, probes):
    weight = getattr(attention, name).clone().requires_grad_()
    output = replace(attention, **{name: weight}).output()
    sums = None
    for probe in range(probes):
        signs = (
            probe_signs(tuple(output.shape), 0, probe % 64)
            if probe < 64
            else probe_signs(tuple(output.shape), probe, 0)
        )
        (gradient,) = torch.autograd.grad((signs.double() * output).sum(), weight, retain_graph=True)
        one = gradient_sums(gradient.unsqueeze(0), products=True)
        sums = one if sums is None else sums + one
    return sums


@pytest.mark.parametrize("name", ["q", "k", "v", "o"])
def test_the_estimators_mean_is_the_exact_trace_and_the_row_blocks(name):
    attention = tiny()
    sums = estimate(attention, name, 400)
    trace, products = getattr(attention, f"exact_{name}")()
    assert sums.passes == 400
    assert sums.squares / 400 == pytest.approx(float(trace), rel=0.1)
    assert sums.squares == pytest.approx(float(sums.products.trace()), rel=1e-5)
    error = (sums.products / 400 - products).norm() / products.norm()
    assert float(error) < 0.15


def test_signs_are_signs_that_sequence_and_probe_decide():
    one = probe_signs((50, 40), 2, 3)
    assert sorted(one.unique().tolist()) == [-1.0, 1.0]
    assert abs(float(one.mean())) < 0.1
    assert torch.equal(one, probe_signs((50, 40), 2, 3))
    for other in ((3, 3), (2, 4)):
        assert not torch.equal(one, probe_signs((50, 40), *other))
    before = torch.random.get_rng_state()
    probe_signs((3, 3), 0, 0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_gradients_by_sequence_are_those_of_each_alone():
    g = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(3, 5, 7, generator=g), torch.randn(3, 5, 4, generator=g)
    expected = torch.stack([upstream[i].t() @ x[i] for i in range(3)])
    torch.testing.assert_close(sequence_gradients(x, upstream, 3), expected)
    torch.testing.assert_close(sequence_gradients(x.flatten(0, 1), upstream.flatten(0, 1), 3), expected)
    routed = sequence_gradients(x.flatten(0, 1)[:7], upstream.flatten(0, 1)[:7], 3)
    torch.testing.assert_close(routed, (upstream.flatten(0, 1)[:7].t() @ x.flatten(0, 1)[:7]).unsqueeze(0))


def test_sums_merge_shards():
    gradients = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1))
    whole = gradient_sums(gradients, products=True)
    merged = gradient_sums(gradients[:1], products=True) + gradient_sums(gradients[1:], products=True)
    assert merged.squares == pytest.approx(whole.squares)
    torch.testing.assert_close(merged.products, whole.products)
    assert gradient_sums(gradients, products=False).products is None
    assert (whole + GradientSums(1.0, None, 1)).products is None
