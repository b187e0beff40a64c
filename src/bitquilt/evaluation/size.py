"""How big is a model? `ModelSize`, and `full_precision_size(model)` of one that is not quantized."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from bitquilt.errors import UserError

# Bits per element by the name a safetensors header gives the type; integers hold no full-precision weights.
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}


@dataclass(frozen=True)
class ModelSize:
    """What a model takes: bytes of its tensors, true bits per weight of its linear layers (with scales,
    zeros and maps), and the nominal bits that papers state."""

    bytes: int
    bpw: float
    nominal_bits: float


def full_precision_size(model: nn.Module | str | Path) -> ModelSize | None:
    """The size of a loaded model (tensors shared by two modules counted once), or, of a folder, of its
    safetensors files as stored, header included. None for a quantized one: its own tools know its size.

    UserError: a folder without safetensors, a damaged file."""
    if isinstance(model, nn.Module):
        return _loaded_size(model)
    folder = Path(model)
    config = folder / "config.json"
    if config.is_file() and "quantization_config" in json.loads(config.read_text(encoding="utf-8")):
        return None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no .safetensors files; give the folder of a model saved as safetensors")
    bits, weights = 0, 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (no mapping: it has no __iter__)
                    entry = opened.get_slice(name)
                    shape, dtype = entry.get_shape(), entry.get_dtype()
                    if len(shape) == 2 and dtype in _BITS:
                        bits += _BITS[dtype] * shape[0] * shape[1]
                        weights += shape[0] * shape[1]
        except SafetensorError as error:
            raise UserError(f"{file} is not a whole safetensors file ({error}); fetch it again") from None
    return _size(sum(file.stat().st_size for file in files), bits, weights)


def _loaded_size(model: nn.Module) -> ModelSize | None:
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        return None
    total, bits, weights = 0, 0, 0
    for tensor in (*model.parameters(), *model.buffers()):
        total += tensor.numel() * tensor.element_size()
        if tensor.ndim == 2 and tensor.is_floating_point():
            bits += 8 * tensor.element_size() * tensor.numel()
            weights += tensor.numel()
    return _size(total, bits, weights)


def _size(total: int, bits: int, weights: int) -> ModelSize | None:
    return ModelSize(total, bits / weights, bits / weights) if weights else None
