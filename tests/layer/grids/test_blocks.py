"""Fits of block types: what they lose on Gaussian weights, and that a sweep computes with stored values."""

import pytest
import torch

from bitquilt.core.types import Layer, LayerPlan, LayerStats
from bitquilt.layer.grids.blocks import (
    UnitFit,
    block_layout,
    block_type,
    block_values,
    check_blocks,
    round_blocks,
    run_plan,
)
from bitquilt.layer.grouped_weight import FeedbackSweep
from bitquilt.ops.block_types import BLOCK_TYPES, decode_blocks

# squared error of Gaussian weights as a share of theirs; llama.cpp's own: 0.0074 (Q4_0), 0.0062 (Q4_1), 0.0018 (Q5_0)
LOST = {
    "q4_0": 0.0068, "q4_1": 0.0056, "q5_0": 0.0017, "q5_1": 0.0014, "q8_0": 2.7e-5, "q2_k": 0.072, "q3_k": 0.022,
    "q4_k": 0.0053, "q5_k": 0.0013, "q6_k": 0.00031, "iq4_nl": 0.0056, "iq4_xs": 0.0057,
}  # fmt: skip


def gaussian(rows=32, columns=512, seed=0):
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def values(stored):
    return decode_blocks(stored.codes, stored.scale, BLOCK_TYPES[stored.format.grid])


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rounding_loses_no_more_than_it_should(name):
    weight = gaussian()
    apart = values(round_blocks(weight, BLOCK_TYPES[name]).segments[0]) - weight
    assert float(apart.square().sum() / weight.square().sum()) < LOST[name]


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("fill", [0.0, 1e-7, -3.0, 1e4])
def test_constant_rows_stay_finite_and_near(name, fill):
    weight = torch.full((2, 256), fill)
    found = values(round_blocks(weight, BLOCK_TYPES[name]).segments[0])
    assert bool(found.isfinite().all())
    assert float((found - weight).abs().max()) <= max(0.13 * abs(fill), 1e-6)


@pytest.mark.parametrize("columns", [256, 96])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_sweep_stores_what_it_computed(bits, columns):
    weight, inputs = gaussian(columns=columns), gaussian(400, columns, seed=1)
    inputs = inputs @ gaussian(columns, columns, seed=2)  # correlated: there is an error to feed back
    layer = Layer("layer", weight, None, LayerStats(inputs.t() @ inputs, len(inputs)))
    kind, plan = run_plan(LayerPlan((bits,) * (columns // 32), 32), columns)
    sweep = FeedbackSweep(group_size=32, damp=0.01, alpha=0.0, stream_alpha=0.0, passes=1, group_order=True)
    factor = sweep.prepare(layer.stats)
    solved = sweep.solve(layer, plan, factor, lambda f: UnitFit(weight, kind, f.importance))
    assert solved.weight.layout == block_layout(len(weight), columns, LayerPlan((bits,), 32))
    error = inputs @ (values(solved.weight.segments[0]) - weight).t()
    plain = inputs @ (block_values(weight, bits) - weight).t()
    assert float(error.square().sum()) < 0.8 * float(plain.square().sum())
    assert solved.loss == pytest.approx(float(error.square().sum()) / len(inputs), rel=0.3)  # the damp is in the loss


def test_narrow_rows_take_types_of_32_columns():
    assert [block_type(bits, 512).name for bits in (2, 4, 8)] == ["q2_k", "q4_k", "q8_0"]
    assert [block_type(bits, 576).name for bits in (2, 4, 5, 6)] == ["iq4_nl", "iq4_nl", "q5_0", "q8_0"]


def test_options_and_plans_that_blocks_cannot_have():
    with pytest.raises(ValueError, match="group_size is 64"):
        check_blocks("blocks", 64, trained=False)
    with pytest.raises(ValueError, match="not trained"):
        check_blocks("blocks", 32, trained=True)
    with pytest.raises(ValueError, match=r"groups of \[2, 3\] bits"):
        run_plan(LayerPlan((2, 3), 32), 64)
    with pytest.raises(ValueError, match="48 inputs"):
        run_plan(LayerPlan((2, 2), 32), 48)
    with pytest.raises(ValueError, match=r"\[7\] bits"):
        run_plan(LayerPlan((7, 7), 32), 64)
