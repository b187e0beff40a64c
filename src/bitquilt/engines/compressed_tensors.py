"""Packed integers of compressed-tensors, which vLLM, SGLang and transformers read: `COMPRESSED_TENSORS`.

`weight_packed` int32 `[out, in * bits / 32]` is the bit stream of the codes, `weight_scale` `[out, groups]`,
`weight_zero_point` int32 `[out * bits / 32, groups]` the zeros, packed along the outputs, and `weight_shape`. Layers
whose zeros are all half the range store none. Every width and group size has an entry in config.json with the layers
that have it. Widths of 3, 5, 6 and 7 bits are dense, as compressed-tensors writes them from 0.18 on.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitquilt.core.packing import TensorSpec
from bitquilt.engines.affine import Affine, centred, integers
from bitquilt.engines.engine import Container, Engine, ModelSettings
from bitquilt.model.encoded.weights import PackedIntegers
from bitquilt.ops.bits import pack_bits

_ROLES = {"weight_packed": "codes", "weight_scale": "scale", "weight_zero_point": "zero", "weight_shape": "shape"}


def tensors(weight: Affine, held: Container, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a layer by name, scales as `dtype`."""
    if held.middle:
        codes, scale = centred(weight, held.bits)
        zeros = {}
    else:
        wide, scale, zero = integers(weight)
        codes = wide.to(torch.uint8)
        zeros = {"weight_zero_point": _words(zero.t().to(torch.uint8), held.bits).t().contiguous()}
    shape = torch.tensor(codes.shape)
    return {
        "weight_packed": _words(codes, held.bits),
        "weight_scale": scale.to(dtype),
        **zeros,
        "weight_shape": shape,
    }


def _words(codes: Tensor, bits: int) -> Tensor:
    """The bit stream of each row in whole words, int32."""
    stream = pack_bits(codes.contiguous(), bits)
    return pad(stream, (0, -stream.shape[1] % 4)).view(torch.int32)


def decode(stored: Mapping[str, Tensor], held: Container) -> Tensor:
    """Return the weight fp32 `[out, in]` of the stored tensors."""
    rows, columns = stored["weight_shape"].tolist()
    parts = {role: stored[name] for name, role in _ROLES.items() if name in stored}
    return PackedIntegers(held.bits, (rows, columns), held.group_size, None).decode(parts)


def specs(shape: tuple[int, int], held: Container, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Return the shapes and types of what `tensors` makes of a weight of `shape`."""
    (rows, columns), groups = shape, shape[1] // held.group_size
    zero = TensorSpec((-(-rows * held.bits // 32), groups), torch.int32)
    return {
        "weight_packed": TensorSpec((rows, columns * held.bits // 32), torch.int32),
        "weight_scale": TensorSpec((rows, groups), dtype),
        **({} if held.middle else {"weight_zero_point": zero}),
        "weight_shape": TensorSpec((2,), torch.int64),
    }


def config(model: ModelSettings, layers: Mapping[str, Container]) -> dict[str, Any]:
    """Return the source's config with an entry for each form of layers."""
    forms: dict[Container, list[str]] = {}
    for path, held in layers.items():
        forms.setdefault(held, []).append(path)
    groups = {
        f"group_{i}": {
            "targets": paths,
            "weights": {
                "num_bits": held.bits,
                "type": "int",
                "symmetric": held.middle,
                "strategy": "group",
                "group_size": held.group_size,
            },
        }
        for i, (held, paths) in enumerate(forms.items())
    }
    entry = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(model.plain),
        "config_groups": groups,
    }
    return {**model.stated, "quantization_config": entry}


COMPRESSED_TENSORS = Engine(
    title="vLLM (compressed-tensors)",
    bits=(2, 3, 4, 5, 6, 7, 8),
    group_sizes=(32, 64, 128),
    families=("gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"),
    windows=None,
    zeros="integer",
    alike="fused",
    tables=False,
    zero_rule="stored",
    tensors=tensors,
    decode=decode,
    specs=specs,
    config=config,
    metadata="pt",
)
