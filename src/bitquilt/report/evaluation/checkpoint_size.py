"""How big is a model? `model_size(model) -> ModelSize`, of a loaded one or of files, quantized by bitquilt or not."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from bitquilt.core.packing import tensor_specs
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.config import QUANT_METHOD, config_of, read_config, read_layouts, total_bpw, total_nominal_bits
from bitquilt.model.linear import QuantizedLinear

# Bits per element by the name a safetensors header gives the type; integers hold no full-precision weights.
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
_FP16_BYTES = 2


@dataclass(frozen=True)
class ModelSize:
    """What a model takes: bytes of its tensors, true bits per weight of its linear layers (with scales,
    zeros and maps), and the nominal bits that papers state."""

    bytes: int
    bpw: float
    nominal_bits: float


def model_size(model: nn.Module | str | Path) -> ModelSize | None:
    """The size of a loaded model, of a folder, or of a hub id that is in the cache. None where another tool
    has quantized the model, or where there is nothing to size.

    bytes: of a folder its safetensors files, header included; of a loaded model its tensors. For a full-precision
    model bpw and nominal bits are the stored width of its weights.
    UserError: a folder without safetensors, a damaged file or config."""
    if isinstance(model, nn.Module):
        return _quantized_module_size(model) or full_precision_size(model)
    folder = _folder(model)
    if folder is None:
        return None
    if read_config(_config(folder)).quantized_by != QUANT_METHOD:
        return full_precision_size(folder)
    layouts = read_layouts(_config(folder))
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return ModelSize(total, total_bpw(layouts), total_nominal_bits(layouts))


def fp16_bytes(folder: str | Path) -> int:
    """Bytes of the tensors of the model in `folder` if every weight took 16 bits: what its size is compared to.

    Quantized by bitquilt or not; tensors that are no floats count as stored. UserError: see `open_checkpoint`."""
    checkpoint = open_checkpoint(folder)
    layouts = read_layouts(checkpoint.config) if checkpoint.model_config.quantized_by == QUANT_METHOD else {}
    packed = {f"{path}.{key}" for path, layout in layouts.items() for key in tensor_specs(layout)}
    total = sum(_FP16_BYTES * layout.in_features * layout.out_features for layout in layouts.values())
    for name, info in checkpoint.tensors.items():
        if name not in packed:
            elements = 1
            for length in info.shape:
                elements *= length
            total += _FP16_BYTES * elements if info.dtype.startswith(("F", "BF")) else info.nbytes
    return total


def full_precision_size(model: nn.Module | str | Path) -> ModelSize | None:
    """The size of a loaded model (tensors shared by two modules counted once), or, of a folder, of its
    safetensors files as stored, header included. None for a quantized one.

    UserError: a folder without safetensors, a damaged file."""
    if isinstance(model, nn.Module):
        return _loaded_size(model)
    folder = Path(model)
    if read_config(_config(folder)).quantized_by is not None:
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


def _folder(model: str | Path) -> Path | None:
    """The folder itself, or the snapshot of a hub id that loading has put into the cache."""
    if Path(model).is_dir():
        return Path(model)
    from transformers.utils import cached_file

    config = cached_file(str(model), "config.json")
    return None if config is None else Path(config).parent


def _config(folder: Path) -> dict[str, object]:
    config = folder / "config.json"
    return dict(json.loads(config.read_text(encoding="utf-8"))) if config.is_file() else {}


def _quantized_module_size(model: nn.Module) -> ModelSize | None:
    layouts = {name: module.layout for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    if not layouts:
        return None
    total = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    return ModelSize(total, total_bpw(layouts), total_nominal_bits(layouts))


def _loaded_size(model: nn.Module) -> ModelSize | None:
    if config_of(model).quantized_by is not None:
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
