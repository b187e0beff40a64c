import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitquilt.core.packing import (
    bits_per_weight,
    check_indices,
    check_tensors,
    layout_from_json,
    layout_to_json,
    pack,
    storage_bits,
    tensor_specs,
    unpack,
)
from bitquilt.core.types import Format, Layout
from tests.weights import KINDS, make_weight, naive_dense


@pytest.mark.parametrize("kind", KINDS)
def test_packed_then_unpacked_is_the_same_weight_bit_for_bit(kind):
    weight = make_weight(kind)
    tensors = pack(weight)
    again = unpack(tensors, weight.layout)
    assert again.layout == weight.layout
    assert torch.equal(naive_dense(again), naive_dense(weight))
    for one, other in zip(weight.segments, again.segments, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scale, other.scale)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_model_is_the_size(kind):
    weight = make_weight(kind)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in pack(weight).values())
    assert storage_bits(weight.layout) == 8 * stored


@pytest.mark.parametrize("kind", KINDS)
def test_layout_survives_json(kind):
    layout = make_weight(kind).layout
    assert layout_from_json(json.loads(json.dumps(layout_to_json(layout)))) == layout


def test_gains_of_rows_are_stored_counted_and_read_again():
    plain = make_weight("shared_table")
    rows = plain.layout.out_features
    gains = (torch.rand(rows, generator=torch.Generator().manual_seed(3)) + 0.5).to(torch.float8_e4m3fn)
    weight = replace(plain, row_gains=gains)
    tensors = pack(weight)
    assert storage_bits(weight.layout) == storage_bits(plain.layout) + 8 * rows
    assert layout_from_json(json.loads(json.dumps(layout_to_json(weight.layout)))) == weight.layout
    again = unpack(tensors, weight.layout)
    assert again.layout == weight.layout
    assert torch.equal(naive_dense(again), gains.float().unsqueeze(1) * naive_dense(plain))
    with pytest.raises(ValueError, match=r"row_gains is missing"):
        check_tensors({k: t for k, t in tensors.items() if k != "row_gains"}, weight.layout, "weight")


def test_orders_that_a_segment_map_says_are_stored_as_one():
    assert make_weight("mixed").layout.ordering == "map"
    assert make_weight("mixed_ragged").layout.ordering == "map"
    assert make_weight("reordered").layout.ordering == "order"
    assert tensor_specs(make_weight("mixed").layout)["permutation"].nbytes == 2  # 6 blocks at 2 bits


def test_bits_per_weight_of_the_worked_example():
    """4096 x 4096, groups of 128, N = 2, 4 pairs of 1- and 3-bit groups with offsets stored: 2.1553 of the spec's
    storage (codes 2, scales 0.125, zeros 0.0303, map 4e-6)."""
    segments = ((Format(1, 128), 4 * 128), (Format(2, 128), 24 * 128), (Format(3, 128), 4 * 128))
    layout = Layout(4096, 4096, segments, "map", 128)
    assert bits_per_weight(layout) == pytest.approx(2.1553, abs=5e-5)
    assert layout.nominal_bits == 2.0
    uniform = Layout(4096, 4096, ((Format(3, 128), 4096),))
    assert bits_per_weight(uniform) == pytest.approx(3.1484, abs=5e-5)
    free = ((Format(1, 128, symmetric=True), 4 * 128), *segments[1:])
    assert bits_per_weight(Layout(4096, 4096, free, "map", 128)) < bits_per_weight(
        Layout(4096, 4096, ((Format(2, 128), 4096),))
    )


@given(bits=st.integers(1, 8), width=st.integers(1, 300), rows=st.integers(1, 40), group=st.sampled_from([8, 32, 128]))
def test_every_bit_is_counted(bits, width, rows, group):
    """Codes alone are a lower bound; scales and zeros come on top, exactly."""
    layout = Layout(rows, width, ((Format(bits, group), width),))
    specs = tensor_specs(layout)
    assert storage_bits(layout) == 8 * sum(spec.nbytes for spec in specs.values())
    groups = -(-width // group)
    assert storage_bits(layout) >= rows * width * bits + 16 * rows * groups
    assert specs["scale_0"].shape == (rows, groups)


def test_missing_and_misshapen_tensors_are_named():
    weight = make_weight("mixed")
    tensors = pack(weight)
    with pytest.raises(ValueError, match=r"layer\.scale_1 is missing"):
        check_tensors({k: v for k, v in tensors.items() if k != "scale_1"}, weight.layout, "layer")
    with pytest.raises(ValueError, match=r"layer\.codes_2 is \[12, 5\]"):
        unpack({**tensors, "codes_2": tensors["codes_2"][:, :-1]}, weight.layout, "layer")
    with pytest.raises(ValueError, match=r"scale_0 is .*float32"):
        unpack({**tensors, "scale_0": tensors["scale_0"].float()}, weight.layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_features": 49}, "do not sum to 49"),
        ({"segments": [{"grid": "hexagonal"}]}, "hexagonal"),
        ({"ordering": "identity"}, "does not go with blocks"),
        ({"block": None}, "layout of l: block is None"),
        ({"ordering": 64}, "layout of l: ordering is 64; known are identity, map, order"),
        ({"ordering": [1]}, "ordering is "),
        ({"outliers": -1}, "outliers is -1"),
        ({"outliers": 10**9}, "outliers is 1000000000"),
        ({"out_features": True}, "out_features is True"),
        ({"in_features": "48"}, "in_features is '48'"),
        ({"segments": None}, "layout of l"),
        ({"segments": []}, "do not sum"),
        ({"row_gain_dtype": "int9"}, "row_gain_dtype is 'int9'; known are float16"),
    ],
)
def test_damaged_layouts_are_refused(change, message):
    value = {**layout_to_json(make_weight("mixed").layout), **change}
    with pytest.raises(ValueError, match=message):
        layout_from_json(value, "l")
    incomplete = {key: v for key, v in value.items() if key != "segments"}
    with pytest.raises(ValueError, match="segments"):
        layout_from_json(incomplete, "l")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symmetric": [1, 2, 3]}, r"symmetric is \[1, 2, 3\]; wanted true or false"),
        ({"symmetric": 1}, "symmetric is 1"),
        ({"bits": 3.0}, "bits is 3.0"),
        ({"bits": 9}, "bits is 9"),
        ({"group_size": None}, "group_size is None"),
        ({"width": -8}, "width is -8"),
        ({"scale_dtype": "uint8"}, "scale_dtype is 'uint8'; known are float16"),
        ({"gain_dtype": "uint8"}, "gain_dtype is 'uint8'"),
        ({"grid": ["uniform"]}, "grid is "),
        ({"grid": "mx", "bits": 4}, "scale_dtype is 'float16'; known are uint8"),
        ({"activation": 3}, "activation is 3"),
    ],
)
def test_damaged_segments_are_refused(change, message):
    value = layout_to_json(make_weight("mixed").layout)
    value["segments"][0] |= change
    with pytest.raises(ValueError, match=f"layout of l: {message}"):
        layout_from_json(value, "l")


def flipped_map(tensors):
    tensors["permutation"][0] ^= 1


def doubled_order(tensors):
    tensors["permutation"][1] = tensors["permutation"][0]


def far_column(tensors):
    tensors["outlier_columns"][-1] = 127


def falling_rows(tensors):
    tensors["outlier_rows"][1] = 100


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("mixed", flipped_map, r"l\.permutation gives the segments .*; the layout says"),
        ("mixed_ragged", flipped_map, r"l\.permutation gives the segments .*; the layout says"),
        ("reordered", doubled_order, r"l\.permutation is not an order of 0 to"),
        ("outliers", far_column, r"l\.outlier_columns holds \d+ to 127; the layer has inputs 0 to"),
        ("outliers", falling_rows, r"l\.outlier_rows does not rise from 0 to"),
    ],
)
def test_index_tensors_that_contradict_the_layout_are_refused(kind, damage, message):
    weight = make_weight(kind)
    tensors = {name: tensor.clone() for name, tensor in pack(weight).items()}
    check_indices(tensors, weight.layout, "l")
    damage(tensors)
    with pytest.raises(ValueError, match=message):
        check_indices(tensors, weight.layout, "l")


def test_formats_and_layouts_check_themselves():
    with pytest.raises(ValueError, match="bits is 9"):
        Format(9, 32)
    with pytest.raises(ValueError, match="group_size is 0"):
        Format(2, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "grid mx stores"),
        ({"group_size": 16}, "grid mx stores"),
        ({"scale_dtype": torch.float16}, "grid mx stores"),
        ({"symmetric": False}, "grid mx stores"),
        ({"grid": "mx_e2m3", "bits": 4}, "grid mx_e2m3 stores"),
        ({"grid": "uniform", "scale_dtype": torch.float16, "activation": "ceil"}, "only mx quantizes its input"),
    ],
)
def test_mx_formats_check_themselves(changes, message):
    fields = {"bits": 6, "group_size": 32, "grid": "mx", "scale_dtype": torch.uint8, "symmetric": True}
    Format(**fields)
    with pytest.raises(ValueError, match=message):
        Format(**{**fields, **changes})


def test_an_unknown_activation_is_refused():
    layout = Layout(4, 32, ((Format(4, 32, "mx", torch.uint8, True, activation="ceil"), 32),))
    value = layout_to_json(layout)
    assert layout_from_json(value) == layout
    value["segments"][0]["activation"] = "tanh"
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        layout_from_json(value)
