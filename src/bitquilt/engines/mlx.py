"""MLX's affine layers: `tensors` packs one, `decode` reads it as MLX computes, `config` is the folder's config.json,
`MLX` all of it.

`weight` uint32 `[out, in * bits / 32]` is the little-endian bit stream of `ops.bits`; `scales` and `biases`
`[out, groups]` have the model's 16-bit type: weight = scales * code + biases.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitquilt.core.packing import TensorSpec
from bitquilt.engines.affine import Affine
from bitquilt.engines.engine import Container, Engine, ModelSettings
from bitquilt.errors import UserError
from bitquilt.ops.bits import pack_bits, unpack_bits

_WINDOWED, _FULL = "sliding_attention", "full_attention"


def tensors(weight: Affine, held: Container, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a layer by name, scales and biases as `dtype`."""
    words = pack_bits(weight.codes, held.bits).view(torch.int32).view(torch.uint32)
    return {"weight": words, "scales": weight.scale.to(dtype), "biases": weight.bias.to(dtype)}


def decode(stored: Mapping[str, Tensor], held: Container) -> Tensor:
    """Return the weight fp32 `[out, in]` that MLX computes with."""
    scales, biases = stored["scales"].float(), stored["biases"].float()
    codes = unpack_bits(stored["weight"].view(torch.uint8), held.bits, scales.shape[1] * held.group_size)
    return Affine(codes, scales, biases).decode()


def specs(shape: tuple[int, int], held: Container, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Return the shapes and types of what `tensors` makes of a weight of `shape`."""
    rows, columns = shape
    scales = TensorSpec((rows, columns // held.group_size), dtype)
    return {"weight": TensorSpec((rows, columns * held.bits // 32), torch.uint32), "scales": scales, "biases": scales}


def config(model: ModelSettings, layers: Mapping[str, Container]) -> dict[str, Any]:
    """Return MLX's config: all settings of the model, because MLX has other defaults, and the `layers` by path.

    Raises UserError for an order of windowed layers that MLX cannot be told about.
    """
    values = {**model.known, **model.stated}
    default = next(iter(layers.values()))
    entries = {path: {"group_size": held.group_size, "bits": held.bits} for path, held in layers.items()}
    quantization = {"group_size": default.group_size, "bits": default.bits, **entries}
    return {**values, **_rotary(values), **_windows(values), "quantization": quantization}


def _rotary(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings as MLX reads them: transformers 5 nests what used to be entries of the config."""
    nested = values.get("rope_parameters")
    if not isinstance(nested, dict):
        return {}
    settings = {}
    if _WINDOWED in nested:  # Gemma 3: one base for layers with a window, another for the rest
        settings["rope_local_base_freq"] = nested[_WINDOWED]["rope_theta"]
        nested = nested[_FULL]
    kind = nested.get("rope_type", "default")
    scaling = None if kind == "default" else {**nested, "type": kind}
    return {**settings, "rope_theta": nested["rope_theta"], "rope_scaling": scaling}


def _windows(values: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 3's layers with a sliding window as MLX reads them. Raises UserError as `config` does."""
    kinds = values.get("layer_types")
    if values.get("model_type") != "gemma3_text" or not kinds:
        return {}
    pattern = kinds.index(_FULL) + 1 if _FULL in kinds else len(kinds) + 1
    if kinds != [_WINDOWED if (i + 1) % pattern else _FULL for i in range(len(kinds))]:
        raise UserError(f"layer_types is {kinds}; MLX knows Gemma 3 with full attention in every n-th layer only")
    return {"sliding_window_pattern": pattern}


MLX = Engine(
    title="MLX",
    bits=(1, 2, 3, 4, 5, 6, 8),
    group_sizes=(32, 64, 128),
    families=("gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"),
    windows=("gemma3_text",),
    zeros="free",
    alike="none",
    tables=True,
    zero_rule="fitted",
    tensors=tensors,
    decode=decode,
    specs=specs,
    config=config,
    metadata="mlx",
)
