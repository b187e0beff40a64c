"""Exports to the GPTQ layout and to compressed-tensors, read by our own reader, compressed-tensors and transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bitquilt
from bitquilt.engines.affine import affine
from bitquilt.engines.engine import Engine
from bitquilt.engines.known import ENGINES
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.config import read_layouts
from bitquilt.model.linear import QuantizedLinear
from tests.engines.test_affine import stored

VLLM, GPTQ = ENGINES["vllm"], ENGINES["gptq"]
WIDE = {"hidden_size": 64, "intermediate_size": 96}
FAMILIES = ("llama", "llama-tied-bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2")


def check(engine: Engine, bits: tuple[int, ...], *, symmetric: bool, held: int) -> None:
    """Convert a random weight, and compare shapes and values."""
    weight = stored(bits, 32, 32 * len(bits), symmetric)
    form = engine.container(weight.layout)
    assert form.bits == held
    made = engine.tensors(affine(weight, form.group_size), form, torch.float16)
    specs = engine.specs((8, 32 * len(bits)), form, torch.float16)
    assert {k: (tuple(t.shape), t.dtype) for k, t in made.items()} == {k: (s.shape, s.dtype) for k, s in specs.items()}
    ours = QuantizedLinear.from_weight(weight).dequantize()
    torch.testing.assert_close(engine.decode(made, form), ours, rtol=0, atol=0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_zeros_keep_their_width_in_compressed_tensors(bits):
    check(VLLM, (bits, bits), symmetric=False, held=bits)


@pytest.mark.parametrize("bits", range(1, 8))
def test_steps_without_a_zero_take_one_bit_more(bits):
    check(VLLM, (bits, bits), symmetric=True, held=bits + 1)
    check(GPTQ, (bits, bits), symmetric=True, held=4 if bits < 4 else 8)


def test_several_widths_take_the_widest():
    check(VLLM, (2, 4, 3, 4), symmetric=False, held=4)
    check(GPTQ, (2, 3, 2, 3), symmetric=False, held=4)


def test_eight_bits_with_any_zero_do_not_fit_the_gptq_layout():
    with pytest.raises(ValueError, match=r"its codes take 9 bits with their zeros.*--set zeros=middle"):
        GPTQ.container(stored((8,), 32, 32).layout)
    assert GPTQ.container(stored((8,), 32, 32).layout, middle=True).bits == 8


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of an export as our reader of foreign checkpoints decodes it."""
    checkpoint = open_checkpoint(folder)
    assert checkpoint.source.weights
    return checkpoint.read(checkpoint.tensors)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("recipe", ["rtn", "gptq", "quilt"])
def test_a_run_for_the_gptq_layout_is_exact(recipe, bits, make_model, quantize_tiny, tmp_path):
    model = make_model("llama", dtype=torch.float16, **WIDE)
    quantize_tiny(model, tmp_path / "ours", recipe, bits=bits, group_size=32, engine="gptq")
    promised = bitquilt.plan(model, recipe, bits=bits, group_size=32, engine="gptq").summary["exported_bytes"]
    done = bitquilt.export(tmp_path / "ours", tmp_path / "theirs", "gptq")
    assert {(form.bits, form.group_size) for form in done.layers.values()} == {(bits, 32)}
    assert done.difference.absolute == 0
    assert done.bytes == promised
    read, ours = exported(tmp_path / "theirs"), bitquilt.load(tmp_path / "ours")
    for path in done.layers:
        weight = ours.get_submodule(path).dequantize()
        torch.testing.assert_close(read[f"{path}.weight"].float(), weight.half().float(), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_compressed_tensors_as_we_do(family, make_model, quantize_tiny, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    import transformers

    model = make_model(family, dtype=torch.float16, **WIDE)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    quantize_tiny(model, ours, "gptq", bits=3, group_size=32, engine="vllm", zeros="middle")
    done = bitquilt.export(ours, theirs, "vllm")
    assert {form.bits for form in done.layers.values()} == {3}
    ids = torch.tensor([[5, 9, 33, 21, 60]])
    with torch.no_grad():
        expected = bitquilt.load(ours, dtype=torch.float32)(ids).logits
        found = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32)(ids).logits
    # the scales are float16 in both; transformers casts decompressed weights to float16 or float32 by version
    assert float((expected - found).abs().max()) < 2e-3 * float(expected.abs().max())


def test_compressed_tensors_decompresses_zeros_as_we_do(make_model, quantize_tiny, tmp_path):
    pack = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="compressed-tensors is not installed"
    )
    model = make_model("llama", dtype=torch.float16, **WIDE)
    options = {"group_size": 32, "engine": "vllm", "bits": 2.5}
    quantize_tiny(model, tmp_path / "ours", "quilt", **options)
    done = bitquilt.export(tmp_path / "ours", tmp_path / "theirs", "vllm")
    assert len({form.bits for form in done.layers.values()}) > 1
    assert done.difference.absolute == 0
    tensors = {k: v for file in (tmp_path / "theirs").glob("*.safetensors") for k, v in load_file(file).items()}
    ours = bitquilt.load(tmp_path / "ours")
    for path, form in done.layers.items():
        weight = ours.get_submodule(path).dequantize()
        rows, groups = tensors[f"{path}.weight_scale"].shape
        codes = pack.unpack_from_int32(tensors[f"{path}.weight_packed"], form.bits, weight.shape)
        zero = tensors[f"{path}.weight_zero_point"]
        zero = pack.unpack_from_int32(zero, form.bits, torch.Size((rows, groups)), packed_dim=0)
        steps = (codes.float().view(rows, groups, -1) - zero.float().unsqueeze(2)).view(rows, -1)
        scale = tensors[f"{path}.weight_scale"].float().repeat_interleave(form.group_size, dim=1)
        torch.testing.assert_close(steps * scale, weight, rtol=0, atol=0)
    read = exported(tmp_path / "theirs")
    assert all(f"{path}.weight" in read for path in done.layers)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]


def test_fused_layers_share_their_form(make_model, quantize_tiny, tmp_path):
    model = make_model("llama", **WIDE)
    quantize_tiny(model, tmp_path / "tied", "rtn", bits=3.5, group_size=32, engine="vllm")
    layouts = read_layouts(json.loads((tmp_path / "tied" / "config.json").read_text()))
    widths = {path.rpartition(".")[2]: layout.nominal_bits for path, layout in layouts.items() if ".0." in path}
    assert widths["q_proj"] == widths["k_proj"] == widths["v_proj"]
    assert widths["gate_proj"] == widths["up_proj"]
    quantize_tiny(model, tmp_path / "free", "rtn", bits=3.5, group_size=32, scope="layers")
    done = bitquilt.export(tmp_path / "free", tmp_path / "theirs", "vllm")
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        assert len({form for path, form in done.layers.items() if ".0." in path and path.endswith(names)}) == 1


def test_what_these_files_cannot_hold(make_model, quantize_tiny, tmp_path):
    model = make_model("llama", **WIDE)

    def refuse(message: str, **options: object) -> None:
        with pytest.raises(UserError, match=message):
            quantize_tiny(model, tmp_path / "out", "gptq", **{"group_size": 32, **options})
        assert not list(tmp_path.iterdir())

    refuse("holds one width in the whole model; give --bits 4 or --bits 8", bits=3, engine="gptq")
    refuse("holds one width in the whole model", bits=4.5, engine="gptq")
    refuse("holds embedding and head in 16", bits=4, engine="vllm", embedding_bits=4)
    refuse("symmetric stores no zeros, and zeros is middle", bits=4, engine="gptq", symmetric=True)
