"""Stored weights as codes, scales and biases: the same values, in the order of the inputs."""

import pytest
import torch

from bitquilt.core.types import Format, LayerPlan, Layout, QuantizedWeight, Segment, group_slices
from bitquilt.engines.affine import affine
from bitquilt.engines.known import ENGINES
from bitquilt.layer.assembly import assemble
from bitquilt.layer.grids.uniform import fit
from bitquilt.layer.nearest import round_to_nearest
from bitquilt.model.linear import QuantizedLinear

MLX = ENGINES["mlx"]


def stored(bits: tuple[int, ...], group_size: int, width: int, symmetric: bool = False) -> QuantizedWeight:
    """A random weight `[8, width]` rounded to groups of `bits`."""
    weight = torch.randn(8, width, generator=torch.Generator().manual_seed(len(bits)))
    rule = "symmetric" if symmetric else "code"
    groups = group_slices(width, group_size)
    swept = round_to_nearest(weight, groups, lambda k, w: fit(w, bits[k], one_bit=rule, symmetric=symmetric))
    return assemble(swept, LayerPlan(bits, group_size))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "group_size", "width", "held"),
    [
        *(((b,) * 2, 32, 64, (b if b != 7 else 8, 32)) for b in range(1, 9)),
        ((4,), 256, 256, (4, 128)),  # a group cut in two
        ((3, 3), 128, 192, (3, 64)),  # the last group is narrower
        ((5,), 128, 96, (5, 32)),  # a group wider than the layer
        ((2, 4, 1, 4), 32, 128, (4, 32)),  # several widths, stored in another order
        ((4, 2, 4), 64, 160, (4, 32)),  # the narrow last group is moved too
    ],
)
def test_every_uniform_layout_keeps_its_values(bits, group_size, width, held, symmetric):
    weight = stored(bits, group_size, width, symmetric)
    container = MLX.container(weight.layout)
    assert (container.bits, container.group_size) == held
    ours = QuantizedLinear.from_weight(weight).dequantize()
    found = affine(weight, container.group_size)
    assert found.codes.shape == ours.shape
    assert int(found.codes.max()) < 2**container.bits
    # scale * (code - zero) and scale * code + bias are rounded differently in fp32
    torch.testing.assert_close(found.decode(), ours, rtol=0, atol=float(ours.abs().max()) * 2e-6)


def uniform(bits=4, group_size=32, width=64, **changed):
    return Layout(16, width, ((Format(bits, group_size), width),), **changed)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (uniform(group_size=8), "its 64 inputs are in groups of 8, MLX holds equal groups of 32, 64, 128 inputs"),
        (uniform(width=72), "its 72 inputs are in groups of 32"),
        (uniform(outliers=3), "it has 3 outliers, MLX holds none"),
        (uniform(row_gain_dtype=torch.float8_e4m3fn), "it has a gain per row"),
        (Layout(16, 64, ((Format(4, 64, "codebook"), 64),)), "its grid is codebook, MLX holds uniform steps"),
        (uniform(ordering="order", block=16), "holds equal groups"),
    ],
)
def test_what_cannot_be_held_is_named(layout, reason):
    with pytest.raises(ValueError, match=reason):
        MLX.container(layout)


def test_the_size_is_that_of_the_tensors():
    for bits in (1, 2, 3, 4, 5, 6, 8):
        weight = stored((bits,) * 2, 64, 128)
        held = MLX.container(weight.layout)
        for dtype in (torch.float16, torch.bfloat16):
            made = MLX.tensors(affine(weight, held.group_size), held, dtype)
            specs = MLX.layer_specs(weight.layout, dtype)
            assert {k: (tuple(t.shape), t.dtype) for k, t in made.items()} == {
                k: (s.shape, s.dtype) for k, s in specs.items()
            }
        assert MLX.storage_bits(weight.layout) == 8 * 128 * bits + 8 * 2 * 32


def test_segments_without_zeros_have_a_bias():
    codes = torch.arange(32, dtype=torch.uint8).repeat(2, 1) % 4
    weight = QuantizedWeight((Segment(Format(2, 32, symmetric=True), codes, torch.ones(2, 1, dtype=torch.float16)),))
    assert affine(weight, 32).decode()[0, :4].tolist() == [-1.5, -0.5, 0.5, 1.5]
