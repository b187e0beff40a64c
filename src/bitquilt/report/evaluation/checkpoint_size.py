"""Sizes of models: `model_size` of a loaded model or of its files, `fp16_bytes` to compare a size with."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from bitquilt.core.packing import tensor_specs
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.config import QUANT_METHOD, config_of, read_layouts, total_bpw, total_nominal_bits
from bitquilt.model.linear import QuantizedLinear

# Bytes per element by the name a safetensors header gives the type; integers hold no full-precision weights.
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_FP16_BYTES = 2


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model's tensors, true bits per weight of its linear layers (scales, zeros and maps included), and the
    nominal bits that papers state."""

    bytes: int
    bpw: float
    nominal_bits: float


def model_size(model: nn.Module | str | Path) -> ModelSize | None:
    """Return the size of a loaded model, of a folder, or of a hub id; None if another tool quantized it and its
    weights cannot be decoded.

    A folder's bytes are those of its safetensors files, headers included; a loaded model's are those of its tensors,
    each counted once. For a full-precision model, bpw and nominal bits are the stored width of its matrices.
    Raises UserError as `open_checkpoint` does."""
    if isinstance(model, nn.Module):
        return _loaded_size(model)
    checkpoint = open_checkpoint(model)
    total = sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors"))
    if checkpoint.model_config.quantized_by == QUANT_METHOD:
        layouts = read_layouts(checkpoint.config)
        return ModelSize(total, total_bpw(layouts), total_nominal_bits(layouts))
    source = checkpoint.source
    if source.bits_per_weight is not None and source.code_bits is not None:
        return ModelSize(total, source.bits_per_weight, source.code_bits)
    if checkpoint.model_config.quantized_by is not None:
        return None
    stored = (info for info in checkpoint.tensors.values() if len(info.shape) == 2 and info.dtype in _FLOATS)
    return _full_precision(total, ((math.prod(info.shape), _FLOATS[info.dtype]) for info in stored))


def fp16_bytes(folder: str | Path) -> int:
    """Return the bytes of the model in `folder`, quantized by bitquilt or not, if every weight took 16 bits.

    Integer tensors count as stored. Raises UserError as `open_checkpoint` does."""
    checkpoint = open_checkpoint(folder)
    layouts = read_layouts(checkpoint.config) if checkpoint.model_config.quantized_by == QUANT_METHOD else {}
    packed = {f"{path}.{key}" for path, layout in layouts.items() for key in tensor_specs(layout)}
    total = sum(_FP16_BYTES * layout.in_features * layout.out_features for layout in layouts.values())
    for name, info in checkpoint.tensors.items():
        if name not in packed:
            floats = info.dtype.startswith(("F", "BF"))
            total += _FP16_BYTES * math.prod(info.shape) if floats else info.nbytes
    return total


def _loaded_size(model: nn.Module) -> ModelSize | None:
    tensors = [*model.parameters(), *model.buffers()]
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    layouts = {name: module.layout for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    if layouts:
        return ModelSize(total, total_bpw(layouts), total_nominal_bits(layouts))
    if config_of(model).quantized_by is not None:
        return None
    weights = (tensor for tensor in tensors if tensor.ndim == 2 and tensor.is_floating_point())
    return _full_precision(total, ((tensor.numel(), tensor.element_size()) for tensor in weights))


def _full_precision(total: int, weights: Iterable[tuple[int, int]]) -> ModelSize | None:
    """The size of a model whose matrices have these counts of elements and bytes per element; None without any."""
    counted = list(weights)
    elements = sum(count for count, _ in counted)
    bits = 8 * sum(count * size for count, size in counted)
    return ModelSize(total, bits / elements, bits / elements) if elements else None
