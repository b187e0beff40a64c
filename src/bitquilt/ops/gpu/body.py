"""The Triton body of the operators, for tensors on an NVIDIA GPU; on a CPU under Triton's interpreter, to test it.

Up to `config.MAX_FUSED` tokens the product is fused (`ops.gpu.product`); for more the weight is written out in the
input's dtype and the library multiplies. Whatever x's dtype, sums are fp32. Nothing is copied to the host, so a product
can be captured in a CUDA graph; the first one of a weight, which checks it, cannot.
"""

import functools
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from bitquilt.ops import reference
from bitquilt.ops.gpu import tuned_tilings as tuned
from bitquilt.ops.gpu.dense import dense_kernel, outlier_kernel
from bitquilt.ops.gpu.product import product_kernel
from bitquilt.ops.gpu.tiling import MAX_FUSED, MAX_QUADS, Config, choose, for_quads
from bitquilt.ops.gpu.unpack import has_ptx
from bitquilt.ops.gpu.weight import QUADS, Part, Prepared, prepared
from bitquilt.ops.handles import StoredWeight

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_DENSE_ROWS = 32
_config: Config | None = None


def use_config(config: Config | None) -> None:
    """Cut every fused product like this, to measure it; None: as was measured (`ops.gpu.tuned`), or as `config.choose`
    says."""
    global _config
    _config = config


def quantized_matmul(x: Tensor, *arguments: Any) -> Tensor:
    """`reference.quantized_matmul` on the kernels. ValueError: tensors that do not go together."""
    *stored, bias, out_features = arguments
    weight = StoredWeight(*stored)
    found = prepared(weight, out_features) if x.dtype in DTYPES else None
    if found is None:
        return reference.quantized_matmul(x, *arguments)
    if x.dim() == 0 or x.shape[-1] != found.columns:
        raise ValueError(f"x is {list(x.shape)}; the layer takes [..., {found.columns}]")
    if x.device != found.device:
        raise ValueError(f"x lies on {x.device}, the weight on {found.device}; move one of them with .to(device)")
    if bias is not None and (bias.numel() != found.rows or bias.device != found.device):
        raise ValueError(
            f"bias holds {bias.numel()} entries on {bias.device}; the layer has {found.rows} outputs on {found.device}"
        )
    out = torch.empty((*x.shape[:-1], found.rows), dtype=x.dtype, device=x.device)
    tokens = x.numel() // found.columns
    if tokens == 0:
        return out
    if reference.rounds_input(weight.layout):
        channels = None if found.channels is None else found.channels.to(torch.int64)
        x = reference.quantize_input(x, weight.layout, channels)
    flat = x.reshape(tokens, found.columns).contiguous()
    if tokens > (MAX_QUADS if found.quads else MAX_FUSED):
        return _linear(flat, weight, found, bias, out)
    _product(flat, weight, found, bias, out)
    return out


def dequantize(*arguments: Any) -> Tensor:
    """`reference.dequantize`, bit for bit."""
    *stored, out_features = arguments
    weight = StoredWeight(*stored)
    found = prepared(weight, out_features)
    if found is None:
        return reference.dequantize(*arguments)
    return dense(weight, found, torch.float32)


def dense(weight: StoredWeight, found: Prepared, dtype: torch.dtype) -> Tensor:
    """The weight `[out, in]` in `dtype`, outliers added in it."""
    out = torch.empty((found.rows, found.columns), dtype=dtype, device=found.device)
    forms = tuple((*part.form, 0 if not part.arranged else 2 if part.read >= QUADS else 1) for part in found.parts)
    sizes = tuple(
        (p.start, p.width, p.sizes(0)[2] if p.read >= QUADS else p.row_bytes, 0, p.groups, p.zero_bytes, p.first_chunk)
        for p in found.parts
    )
    with on(found.device):
        dense_kernel[(triton.cdiv(found.rows, _DENSE_ROWS), found.chunks)](
            out, out if found.channels is None else found.channels, found.stored(weight, "codes"),
            found.stored(weight, "scales"), found.stored(weight, "zeros"), sizes, found.rows, found.columns,
            FORMS=forms, GATHER=found.channels is not None, BN=_DENSE_ROWS, enable_fp_fusion=False,
        )  # fmt: skip
        if found.outliers:
            outlier_kernel[(found.rows,)](
                out, weight.outlier_values, weight.outlier_columns, weight.outlier_rows, found.columns
            )
    return out


def forms(parts: tuple[Part, ...], dtype: torch.dtype) -> tuple[tuple[Any, ...], ...]:
    """What `product_kernel` is compiled for."""
    return tuple((*part.form, part.read, _takes_ptx() and has_ptx(part.form[1], DTYPES[dtype])) for part in parts)


def _product(x: Tensor, weight: StoredWeight, found: Prepared, bias: Tensor | None, out: Tensor) -> None:
    tokens = len(x)
    config = _config or cut(found, tokens)
    if found.quads:
        config = for_quads(config)
    compiled = forms(found.parts, x.dtype)
    ptx = any(form[-1] and form[4] >= QUADS for form in compiled)
    scales = found.tables(weight, x.dtype) if ptx else found.stored(weight, "scales")
    tiles = triton.cdiv(found.rows, config.rows), triton.cdiv(tokens, config.tokens)
    shared = config.parts > 1
    gathered = x
    if found.channels is not None and found.runs is None:
        gathered = x.index_select(1, found.channels)
    codes = found.codes(weight)
    sizes = tuple(part.sizes(planes[0].numel()) for part, planes in zip(found.parts, codes, strict=True))
    with on(found.device):
        partial = torch.empty((config.parts, *out.shape), device=x.device) if shared else out
        counters = found.counter(tiles[0] * tiles[1]) if shared else out
        product_kernel[(tiles[0] * config.parts, tiles[1])](
            gathered, x, x if found.runs is None else found.runs, codes, scales, found.stored(weight, "zeros"), sizes,
            weight.outlier_values if found.outliers else x, weight.outlier_columns if found.outliers else x,
            weight.outlier_rows if found.outliers else x, x if bias is None else bias, out, partial, counters,
            found.rows, tokens, found.columns, found.chunks, config.parts,
            FORMS=compiled, GATHER=found.runs is not None, HAS_OUTLIERS=found.outliers,
            HAS_BIAS=bias is not None, SHARED=shared, BN=config.rows, BT=config.tokens, S=config.stack,
            STAGES=config.stages, WIDE=interpreted(), num_warps=config.warps,
        )  # fmt: skip


def cut(found: Prepared, tokens: int) -> Config:
    """How a product of a weight is cut into programs."""
    if tokens <= tuned.MAX_TOKENS and (measured := tuned.cuts(found.device)):
        known = measured.get(tuned.key(found.rows, found.chunks, found.bits, tokens, found.kind))
        if known is not None:
            return known
    return choose(found.rows, found.chunks, tokens, processors(found.device), found.quads)


def _linear(x: Tensor, weight: StoredWeight, found: Prepared, bias: Tensor | None, out: Tensor) -> Tensor:
    dtype = x.dtype  # fp32 where a segment rounds its input
    result = torch.nn.functional.linear(x, dense(weight, found, dtype), None if bias is None else bias.to(dtype))
    return result.to(out.dtype).view(out.shape)


@functools.cache
def _takes_ptx() -> bool:
    """Not under the interpreter, nor on a GPU before sm_80."""
    if interpreted() or not torch.cuda.is_available() or torch.version.hip:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def interpreted() -> bool:
    """Whether the kernels run under Triton's interpreter (`TRITON_INTERPRET=1` when they were imported)."""
    return not isinstance(product_kernel, triton.runtime.JITFunction)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors; 4 under the interpreter, so that tests share rows out."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
