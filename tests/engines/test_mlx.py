"""Exports in MLX itself: weights by `mlx`, logits by `mlx_lm`. `pip install mlx[cpu] mlx-lm` installs them."""

import json

import numpy as np
import pytest
import torch

import bitquilt
from bitquilt.engines.affine import affine
from bitquilt.engines.known import ENGINES
from bitquilt.errors import UserError
from tests.engines.test_affine import stored

MLX = ENGINES["mlx"]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
# the name of the tests' family -> fields besides WIDE, options of the run
FAMILIES = {
    "llama": ({}, {"include_head": True}),
    "llama-tied-bias": ({}, {"embedding_bits": 4}),
    "mistral": ({}, {"head_bits": 6}),
    "qwen2": ({}, {}),
    "qwen3": ({}, {}),
    "gemma2": ({}, {}),
    "gemma3": ({}, {}),
    "phi3": ({}, {}),
    "olmo2": ({}, {}),
}


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_mlx_reads_every_width_as_we_do(bits, group_size):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    weight = stored((bits,) * 2, group_size, 2 * group_size)
    held = MLX.container(weight.layout)
    made = MLX.tensors(affine(weight, held.group_size), held, torch.float16)
    parts = [mx.array(made["weight"].view(torch.int32).numpy()).view(mx.uint32)]
    parts += [mx.array(made[key].numpy()).astype(mx.float32) for key in ("scales", "biases")]
    theirs = mx.dequantize(*parts, group_size=held.group_size, bits=held.bits)
    np.testing.assert_allclose(np.array(theirs), MLX.decode(made, held).numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_computes_our_logits(family, make_model, quantize_tiny, tmp_path):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    load_model = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed").load_model
    fields, options = FAMILIES[family]
    dtype = torch.float16
    model = make_model(family, dtype=dtype, **{**WIDE, **fields})
    quantize_tiny(model, tmp_path / "ours", "gptq", bits=4, group_size=32, **options)
    done = bitquilt.export(tmp_path / "ours", tmp_path / "theirs", "mlx")
    assert 0 < done.difference.relative < 2**-10
    ids = torch.tensor([[5, 9, 33, 21, 60]])  # within every family's window
    with torch.no_grad():
        ours = bitquilt.load(tmp_path / "ours", dtype=torch.float32)(ids).logits[0]
    found, config = load_model(tmp_path / "theirs")
    theirs = torch.tensor(np.array(found(mx.array(ids.numpy())).astype(mx.float32)))[0]
    assert float((ours - theirs).abs().max()) < 0.02 * float(ours.abs().max())  # mlx computes in float16
    assert set(config["quantization"]) - {"group_size", "bits"} == set(done.layers)


def test_a_rotary_base_of_its_own_reaches_mlx(make_model, quantize_tiny, tmp_path):
    rope = {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}
    model = make_model("llama", rope_parameters=rope, **WIDE)
    quantize_tiny(model, tmp_path / "ours", "rtn", bits=4, group_size=32)
    bitquilt.export(tmp_path / "ours", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["rope_theta"] == 500.0
    assert config["rope_scaling"] == {**rope, "type": "linear"}


def test_gemma_with_another_order_of_windows_is_refused(make_model, quantize_tiny, tmp_path):
    kinds = ["full_attention", "sliding_attention"]
    model = make_model("gemma3", layer_types=kinds, **WIDE)
    quantize_tiny(model, tmp_path / "ours", "rtn", bits=4, group_size=32)
    with pytest.raises(UserError, match="every n-th layer only"):
        bitquilt.export(tmp_path / "ours", tmp_path / "theirs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]
