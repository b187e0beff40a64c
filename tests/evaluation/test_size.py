"""What a full-precision model takes, loaded and on disk."""

import json
from pathlib import Path

import pytest
import torch

from bitquilt.errors import UserError
from bitquilt.evaluation import ModelSize, full_precision_size

from .conftest import tiny_llama


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.float16, 16), (torch.bfloat16, 16)])
def test_bits_are_those_stored(tmp_path: Path, dtype: torch.dtype, bits: int) -> None:
    model = tiny_llama(0, tie_word_embeddings=True).to(dtype)
    model.save_pretrained(tmp_path)
    stored = full_precision_size(tmp_path)
    assert stored == ModelSize((tmp_path / "model.safetensors").stat().st_size, bits, bits)
    loaded = full_precision_size(model)
    assert loaded is not None
    assert (loaded.bpw, loaded.nominal_bits) == (bits, bits)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert loaded.bytes == sum(p.numel() for p in model.parameters()) * bits // 8 + buffers


def test_shards_are_added_up(tmp_path: Path) -> None:
    tiny_llama(0).save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    size = full_precision_size(str(tmp_path))
    assert size is not None
    assert size.bytes == sum(shard.stat().st_size for shard in shards)


def test_a_quantized_model_is_not_guessed_at(tmp_path: Path) -> None:
    model = tiny_llama(0)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "x"}}))
    assert full_precision_size(tmp_path) is None
    model.config.quantization_config = {"quant_method": "x"}
    assert full_precision_size(model) is None


def test_folders_without_whole_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.safetensors files"):
        full_precision_size(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file"):
        full_precision_size(tmp_path)
