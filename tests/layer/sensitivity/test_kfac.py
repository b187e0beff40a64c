"""The second-order tables: additive, in nats, and right about a real model's layers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM

import bitquilt
from bitquilt.core.types import Layer
from bitquilt.layer.sensitivity.kfac import MEASURED_WIDTHS, corrected, tried_at_one_bit, width_losses
from bitquilt.recipes import make_recipe


def rounding(weight):
    recipe = make_recipe("rtn", group_size=8)
    return lambda bits: recipe.rounded(Layer("x", weight, None, None), None, bits)


def test_groups_add_up_to_the_weighted_error():
    g = torch.Generator().manual_seed(0)
    weight, rows, columns = torch.randn(12, 20, generator=g), torch.rand(12, generator=g), torch.rand(20, generator=g)
    table = width_losses(weight, rounding(weight), rows, columns, (2, 3, 4), 8)
    assert table.shape == (3, 3)
    error = (weight - rounding(weight)(3)).square()
    torch.testing.assert_close(table[:, 1].sum(), 0.5 * (rows[:, None] * error * columns).sum())
    torch.testing.assert_close(table[2, 1], 0.5 * (rows[:, None] * error * columns)[:, 16:].sum())


def test_wide_codes_are_extrapolated_closely():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(64)
    table = width_losses(weight, rounding(weight), ones, ones, tuple(range(2, 9)), 8)
    for bits in range(MEASURED_WIDTHS + 1, 9):
        exact = 0.5 * float((weight - rounding(weight)(bits)).square().sum())
        assert 0.9 < float(table[:, bits - 2].sum()) / exact < 1.1
    assert (table.diff(dim=1) <= 0).all()


def test_predicted_nats_are_measured_nats(make_model: Callable[..., Path], tmp_path: Path, token_file: Path):
    """Quantize one layer, run the model: the sum over layers is right within a factor of two, and so is the order."""
    source = make_model(hidden_size=64, intermediate_size=96)
    ids = load_file(token_file)["input_ids"]
    found = bitquilt.measure_model(source, tmp_path / "s", "rtn", token_file, samples=6, seq_len=16, group_size=8)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    guesses, truths = [], []
    with torch.no_grad():
        right = model(ids).logits.log_softmax(-1)
        for name, table in found.losses.items():
            module = model.get_submodule(name)
            weight = module.weight.data
            module.weight.data = make_recipe("rtn", group_size=8).rounded(Layer(name, weight, None, None), None, 4)
            wrong = model(ids).logits.log_softmax(-1)
            module.weight.data = weight
            truths.append(float((right.exp() * (right - wrong)).sum(-1).mean()))
            guesses.append(float(table[:, found.widths[name].index(4)].sum()))
    assert 0.5 < sum(guesses) / sum(truths) < 2.0
    assert spearmanr(guesses, truths)[0] > 0.7
    assert np.isfinite(guesses).all()


def test_a_table_is_corrected_where_it_was_tried_and_less_beyond():
    table = np.array([[8.0, 2.0, 0.5, 0.125], [4.0, 1.0, 0.25, 0.06]], dtype=np.float32)
    widths, bits = (1, 2, 3, 4), (2, 3)
    told = 2.0 + 0.25
    found = corrected(table, widths, bits, 16 * told)
    assert found[0, 1] + found[1, 2] == pytest.approx(16 * told)
    assert found[0].tolist() == pytest.approx([128.0, 32.0, 2.0, 0.25])  # 16, 16, its root, its root's root
    assert found[1].tolist() == pytest.approx([64.0, 16.0, 4.0, 0.24])
    assert corrected(table, widths, bits, told).tolist() == table.tolist()
    assert corrected(table, widths, bits, 1e9 * told).tolist() == corrected(table, widths, bits, 32 * told).tolist()
    small = corrected(table, widths, bits, told / 16)
    assert (np.diff(small, axis=1) <= 0).all()
    assert small[0, 1] + small[1, 2] == pytest.approx(told / 16)
    assert not corrected(np.zeros_like(table), widths, bits, 1.0).any()


def test_one_bit_costs_what_was_tried_and_never_less_than_two():
    table = np.array([[8.0, 2.0, 0.5], [4.0, 3.0, 0.25]], dtype=np.float32)
    assert tried_at_one_bit(table, 120.0).tolist() == [[80.0, 2.0, 0.5], [40.0, 3.0, 0.25]]
    assert tried_at_one_bit(table, 6.0).tolist() == [[4.0, 2.0, 0.5], [3.0, 3.0, 0.25]]
    assert not tried_at_one_bit(np.zeros_like(table), 0.0).any()
