"""Exports as folders: what is written, what is said about it, and what is refused before anything is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitquilt
from bitquilt.errors import UserError, VerificationError
from bitquilt.model.config import read_layouts
from bitquilt.recipes.cmpq.cmpq import CMPQ
from bitquilt.recipes.rtn import RTN

WIDE = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def quantized(make_model, quantize_tiny, tmp_path_factory) -> Path:
    """A tiny Llama of 4 bits in groups of 32. Do not write there."""
    out = tmp_path_factory.mktemp("export") / "ours"
    quantize_tiny(make_model("llama", **WIDE), out, "rtn", bits=4, group_size=32)
    return out


def test_an_export_says_what_it_holds_and_how_far_it_is_off(quantized, tmp_path):
    done = bitquilt.export(quantized, tmp_path / "theirs", "mlx")
    assert done.folder == tmp_path / "theirs"
    assert done.bytes == sum(path.stat().st_size for path in done.folder.iterdir())
    assert {(held.bits, held.group_size) for held in done.layers.values()} == {(4, 32)}
    assert (done.wider, done.window) == ((), None)
    written = {k: v for file in done.folder.glob("*.safetensors") for k, v in load_file(file).items()}
    ours = bitquilt.load(quantized)
    apart = 0.0
    for path, held in done.layers.items():
        words, scales, biases = (written[f"{path}.{key}"] for key in ("weight", "scales", "biases"))
        codes = words.view(torch.uint8)
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).float()
        spread = [part.float().repeat_interleave(held.group_size, dim=1) for part in (scales, biases)]
        apart = max(apart, float((spread[0] * codes + spread[1] - ours.get_submodule(path).dequantize()).abs().max()))
    assert apart == pytest.approx(done.difference.absolute, rel=1e-3)
    config = json.loads((done.folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert "transformers_weights" not in config
    assert config["quantization"]["model.layers.0.mlp.up_proj"] == {"group_size": 32, "bits": 4}
    kept = {name for name in written if not name.startswith(tuple(f"{path}." for path in done.layers))}
    source = load_file(next(iter(Path(quantized).glob("*-00003-of-*.safetensors"))))
    assert kept >= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} & set(source)


def test_mixed_layers_take_their_widest_width_and_the_export_says_so(make_model, quantize_tiny, tmp_path):
    model = make_model("llama", hidden_size=256, intermediate_size=256)  # eight groups to a layer
    quantize_tiny(model, tmp_path / "ours", "rtn", bits=2.5, group_size=32)
    done = bitquilt.export(tmp_path / "ours", tmp_path / "theirs", "mlx")
    assert done.wider
    layouts = read_layouts(json.loads((tmp_path / "ours" / "config.json").read_text()))
    for path in done.wider:
        widths = {form.bits for form, _ in layouts[path].segments}
        assert min(widths) < max(widths) <= done.layers[path].bits
    assert done.difference.relative < 2**-10


def refused(folder: Path, out: Path, message: str, error: type[Exception] = UserError) -> None:
    before = sorted(out.parent.iterdir())
    with pytest.raises(error, match=message):
        bitquilt.export(folder, out, "mlx")
    assert sorted(out.parent.iterdir()) == before


def test_what_the_engine_cannot_hold_is_refused_by_layer(make_model, quantize_tiny, tmp_path):
    quantize_tiny(make_model("llama", **WIDE), tmp_path / "eight", "rtn", bits=4, group_size=8)
    refused(tmp_path / "eight", tmp_path / "out", r"MLX cannot hold 14 of 14 layers. model.layers.0.*groups of 8")
    quantize_tiny(make_model("llama", **WIDE), tmp_path / "free", CMPQ(bits=3))
    refused(tmp_path / "free", tmp_path / "out", "its grid is codebook")


def test_other_families_and_full_precision_are_refused_by_name(make_model, quantize_tiny, tmp_path):
    model = make_model("opt", hidden_size=64, ffn_dim=64, word_embed_proj_dim=64)
    refused(model, tmp_path / "out", "is in full precision; give a checkpoint")
    quantize_tiny(model, tmp_path / "opt", "rtn", bits=4, group_size=32)
    refused(tmp_path / "opt", tmp_path / "out", "exports for MLX were compared with gemma2, .*; this one is opt")


def test_unknown_engines_and_full_folders_are_refused(quantized, tmp_path):
    with pytest.raises(UserError, match="no engine is called 'lmx'; wanted mlx or vllm"):
        bitquilt.export(quantized, tmp_path / "out", "lmx")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    refused(quantized, tmp_path / "out", "exists already; give another output folder")


def test_damage_is_refused_before_anything_is_written(quantized, tmp_path):
    flipped = tmp_path / "flipped"
    shutil.copytree(quantized, flipped)
    file = next(iter(flipped.glob("*-00001-of-*.safetensors")))
    content = bytearray(file.read_bytes())
    content[-5] ^= 16
    file.write_bytes(bytes(content))
    refused(flipped, tmp_path / "out", "not as it was written", VerificationError)
    (flipped / "report.json").unlink()  # without hashes only the values remain to be checked
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".scale_0"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    refused(flipped, tmp_path / "out", f"tensor {name} holds NaN or infinity")
    save_file({**tensors, name: tensors[name][:-1].clone()}, file, metadata={"format": "pt"})
    refused(flipped, tmp_path / "out", rf"tensor {name} is \[\d+, \d\] F16; config.json wants")


MLX_WIDTHS = {1, 2, 3, 4, 5, 6, 8}


def widths_of(folder: Path) -> dict[str, set[int]]:
    layouts = read_layouts(json.loads((folder / "config.json").read_text()))
    return {path: {form.bits for form, _ in layout.segments} for path, layout in layouts.items()}


@pytest.mark.parametrize(
    ("family", "recipe", "budget", "selection"),
    [
        ("llama", "quilt", {"size": 62_000}, {"embedding_bits": 6, "head_bits": 4}),
        ("llama-tied-bias", "gptq", {"bpw": 5.6}, {"embedding_bits": 5}),
        ("gemma3", "rtn", {"bits": 7}, {}),  # a width that MLX has not: some layers take 6, others 8
        ("phi3", "slim-llm", {}, {}),  # its own rule mixes widths inside a layer
        ("qwen2", "gptq", {}, {}),
    ],
)
def test_a_run_for_an_engine_promises_the_bytes_of_its_folder(
    family, recipe, budget, selection, make_model, quantize_tiny, token_file, tmp_path
):
    model = make_model(family, dtype=torch.bfloat16, **WIDE)
    options = {"bits": 4, **selection}
    given = None
    if set(budget) == {"bits"}:
        options["bits"] = budget["bits"]
    elif budget:
        del options["bits"]
        given = bitquilt.Budget.of(**budget)
    table = tmp_path / "table"
    bitquilt.measure_model(model, table, recipe, token_file, samples=6, seq_len=16, group_size=32)
    wanted = {"budget": given, "sensitivities": table, "engine": "mlx", "group_size": 32, **options}
    promised = bitquilt.plan(model, recipe, **wanted)
    if promised.wish.budget is None:
        wanted["sensitivities"] = None
    made = {**wanted, "calibration": token_file, "samples": 6, "seq_len": 16}
    bitquilt.quantize(model, recipe, out=tmp_path / "ours", **made)
    found = widths_of(tmp_path / "ours")
    assert all(len(widths) == 1 and widths <= MLX_WIDTHS for widths in found.values())
    done = bitquilt.export(tmp_path / "ours", tmp_path / "theirs", "mlx")
    assert done.wider == ()
    assert done.bytes == promised.summary["exported_bytes"]
    if given is not None and given.kind == "size":
        assert 0.9 * given.value < done.bytes <= given.value
        assert len({min(widths) for widths in found.values()}) > 1


def test_what_an_engine_cannot_hold_is_refused_before_the_run(make_model, quantize_tiny, tmp_path):
    model = make_model("llama", **WIDE)

    def refuse(message: str, recipe: object = "rtn", **options: object) -> None:
        with pytest.raises(UserError, match=message):
            quantize_tiny(model, tmp_path / "out", recipe, engine="mlx", **options)
        assert not list(tmp_path.iterdir())

    refuse("groups of 8, MLX holds equal groups", group_size=8)
    refuse("one width per layer, which is the allocation layers, not global", scope="global", bits=2.5, group_size=32)
    refuse("how much memory MLX takes is not known", RTN(group_size=32), budget=bitquilt.Budget.of(vram="1GB", ctx=8))
    refuse("its grid is codebook", CMPQ(bits=3))
    model = make_model("opt")
    refuse("compared with gemma2, .* this one is opt", group_size=32)
