"""`GPTQ_FILES`: the GPTQ layout of vLLM, SGLang and gptqmodel, symmetric and without an order of the columns.

One width and one group size in the whole model. `qweight` int32 `[in * bits / 32, out]` is packed along the inputs,
`qzeros` holds half the range less one in every place (format 1), `scales` `[groups, out]`, `g_idx` the group of each
input. `model.encoded` reads it back.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitquilt.core.packing import TensorSpec
from bitquilt.engines.affine import Affine, centred
from bitquilt.engines.engine import Container, Engine, ModelSettings
from bitquilt.model.encoded.weights import GptqWeight
from bitquilt.ops.bits import pack_bits


def tensors(weight: Affine, held: Container, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a layer by name, scales as `dtype`."""
    codes, scale = centred(weight, held.bits)
    zero = torch.full(scale.t().shape, 2 ** (held.bits - 1) - 1, dtype=torch.uint8)
    group = torch.arange(codes.shape[1], dtype=torch.int32) // held.group_size
    return {
        "qweight": pack_bits(codes, held.bits).view(torch.int32).t().contiguous(),
        "qzeros": pack_bits(zero, held.bits).view(torch.int32),
        "scales": scale.t().contiguous().to(dtype),
        "g_idx": group,
    }


def decode(stored: Mapping[str, Tensor], held: Container) -> Tensor:
    """Return the weight fp32 `[out, in]` of the stored tensors."""
    names = {"codes": "qweight", "zero": "qzeros", "scale": "scales", "group": "g_idx"}
    shape = (stored["scales"].shape[1], len(stored["g_idx"]))
    encoding = GptqWeight(held.bits, shape, held.group_size, minus_one=True)
    return encoding.decode({role: stored[name] for role, name in names.items()})


def specs(shape: tuple[int, int], held: Container, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Return the shapes and types of what `tensors` makes of a weight of `shape`."""
    (rows, columns), groups = shape, shape[1] // held.group_size
    return {
        "qweight": TensorSpec((columns * held.bits // 32, rows), torch.int32),
        "qzeros": TensorSpec((groups, rows * held.bits // 32), torch.int32),
        "scales": TensorSpec((groups, rows), dtype),
        "g_idx": TensorSpec((columns,), torch.int32),
    }


def config(model: ModelSettings, layers: Mapping[str, Container]) -> dict[str, Any]:
    """Return the source's config with the entry that names the layout; a head in full precision has no entry."""
    form = next(iter(layers.values()))
    entry = {
        "quant_method": "gptq",
        "bits": form.bits,
        "group_size": form.group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        # gptqmodel and vLLM leave these out; a name in it is a regular expression
        **({"dynamic": {f"-:{re.escape(path)}$": {} for path in model.plain}} if model.plain else {}),
    }
    return {**model.stated, "quantization_config": entry}


GPTQ_FILES = Engine(
    title="the GPTQ layout",
    bits=(4, 8),
    group_sizes=(32, 64, 128),
    families=("gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"),
    windows=None,
    zeros="middle",
    alike="all",
    tables=False,
    zero_rule="middle",
    tensors=tensors,
    decode=decode,
    specs=specs,
    config=config,
    metadata="pt",
)
