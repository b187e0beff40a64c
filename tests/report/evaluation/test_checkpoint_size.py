"""What a full-precision model takes, loaded and on disk."""

import json
from pathlib import Path

import pytest
import torch

import bitquilt
from bitquilt.errors import UserError
from bitquilt.report.evaluation import ModelSize, fp16_bytes, model_size

from .conftest import tiny_llama


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.float16, 16), (torch.bfloat16, 16)])
def test_bits_are_those_stored(tmp_path: Path, dtype: torch.dtype, bits: int) -> None:
    model = tiny_llama(0, tie_word_embeddings=True).to(dtype)
    model.save_pretrained(tmp_path)
    stored = model_size(tmp_path)
    assert stored == ModelSize((tmp_path / "model.safetensors").stat().st_size, bits, bits)
    loaded = model_size(model)
    assert loaded is not None
    assert (loaded.bpw, loaded.nominal_bits) == (bits, bits)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert loaded.bytes == sum(p.numel() for p in model.parameters()) * bits // 8 + buffers


def test_shards_are_added_up(tmp_path: Path) -> None:
    tiny_llama(0).save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    size = model_size(str(tmp_path))
    assert size is not None
    assert size.bytes == sum(shard.stat().st_size for shard in shards)


def test_a_quantized_model_is_not_guessed_at(tmp_path: Path) -> None:
    model = tiny_llama(0)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "x"}}))
    assert model_size(tmp_path) is None
    model.config.quantization_config = {"quant_method": "x"}
    assert model_size(model) is None


def test_folders_without_whole_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="safetensors"):
        model_size(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        model_size(tmp_path)


def test_a_model_of_ours_is_sized_from_its_layouts(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_llama(0).to(torch.bfloat16).save_pretrained(source)
    bitquilt.quantize(source, "rtn", out=out, bits=3, group_size=16)
    stored, loaded = model_size(out), model_size(bitquilt.load(out))
    assert stored is not None
    assert loaded is not None
    assert stored.bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    entry = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (stored.bpw, stored.nominal_bits) == (loaded.bpw, loaded.nominal_bits) == (entry["bpw"], 3)
    assert stored.bpw > 3
    tensors = sum(f.stat().st_size - header_bytes(f) for f in out.glob("*.safetensors"))
    rotary = sum(b.numel() * b.element_size() for b in tiny_llama(0).buffers())
    assert loaded.bytes == tensors + rotary
    # sixteen bits per weight: the bytes of the source, quantized or not
    source_file = source / "model.safetensors"
    assert fp16_bytes(source) == fp16_bytes(out) == source_file.stat().st_size - header_bytes(source_file)


def header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")
