"""The Triton body of the operators: `quantized_matmul` and `dequantize` check a weight and launch the kernels.

Tensors are on an NVIDIA GPU, or on a CPU under Triton's interpreter in tests. A product of up to `MAX_FUSED` tokens is
fused (`ops.gpu.matmul_kernel`); for more, the weight is written out in the input's dtype and the library multiplies.
Whatever x's dtype, sums are fp32. Nothing is copied to the host, so a CUDA graph can capture a product; it cannot
capture the first one of a weight, which checks it. `use_tiling` forces a tiling, to measure it.
"""

import functools
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from bitquilt.ops import reference
from bitquilt.ops.gpu import tuned_tilings as tuned
from bitquilt.ops.gpu.activation_tiles import Tile
from bitquilt.ops.gpu.dequantize_kernel import dense_kernel, outlier_kernel
from bitquilt.ops.gpu.matmul_kernel import product_kernel
from bitquilt.ops.gpu.prepared_weight import QUADS, PreparedSegment, PreparedWeight, prepared
from bitquilt.ops.gpu.tiling import MAX_FUSED, MAX_QUADS, Tiling, choose_tiling, for_quads
from bitquilt.ops.gpu.unpack_codes import has_ptx
from bitquilt.ops.stored_weight import StoredWeight

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_DENSE_ROWS = 32
_tiling: Tiling | None = None


def use_tiling(tiling: Tiling | None) -> None:
    """Split every fused product like this, to measure it; None returns to the measured and chosen tilings."""
    global _tiling
    _tiling = tiling


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
        raise ValueError(f"x is on {x.device}, the weight on {found.device}; move one of them with .to(device)")
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


def dense(weight: StoredWeight, found: PreparedWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight `[out, in]` in `dtype`; outliers are added in that dtype."""
    out = torch.empty((found.rows, found.columns), dtype=dtype, device=found.device)
    forms = tuple((*part.form, 0 if not part.arranged else 2 if part.read >= QUADS else 1) for part in found.parts)
    sizes = tuple(part.byte_sizes() for part in found.parts)
    stored = (found.stored(weight, name) for name in ("codes", "scales", "zeros"))
    grid = (triton.cdiv(found.rows, _DENSE_ROWS), found.chunks)
    with on(found.device):
        arguments = (out, found.channels, *stored, sizes, found.rows, found.columns)
        dense_kernel[grid](*arguments, FORMS=forms, BN=_DENSE_ROWS, enable_fp_fusion=False)
        if found.outliers:
            outlier_kernel[(found.rows,)](out, *_outliers(weight), found.columns)
    return out


def forms(parts: tuple[PreparedSegment, ...], dtype: torch.dtype) -> tuple[tuple[Any, ...], ...]:
    """Return what `product_kernel` is compiled for: its FORMS."""
    return tuple((*part.form, part.read, _takes_ptx() and has_ptx(part.form[1], DTYPES[dtype])) for part in parts)


def _product(x: Tensor, weight: StoredWeight, found: PreparedWeight, bias: Tensor | None, out: Tensor) -> None:
    tokens = len(x)
    tiling = _tiling or tiling_of(found, tokens)
    if found.quads:
        tiling = for_quads(tiling)
    compiled = forms(found.parts, x.dtype)
    looks_up = any(form[-1] and form[4] >= QUADS for form in compiled)
    scales = found.tables(weight, x.dtype) if looks_up else found.stored(weight, "scales")
    tiles = triton.cdiv(found.rows, tiling.rows), triton.cdiv(tokens, tiling.tokens)
    gathered = x
    if found.channels is not None and found.runs is None:
        gathered = x.index_select(1, found.channels)
    codes = found.codes(weight)
    sizes = tuple(part.sizes(planes[0].numel()) for part, planes in zip(found.parts, codes, strict=True))
    gather = found.runs is not None
    tile = Tile(tiling.rows, tiling.tokens, tiling.stack, tiling.stages, gather, interpreted())
    with on(found.device):
        partial = counters = None
        if tiling.parts > 1:
            partial = torch.empty((tiling.parts, *out.shape), device=x.device)
            counters = found.counter(tiles[0] * tiles[1])
        inputs, stored = (gathered, x, found.runs), (codes, scales, found.stored(weight, "zeros"), sizes)
        outliers = _outliers(weight) if found.outliers else None
        counts = (found.rows, tokens, found.columns, found.chunks, tiling.parts)
        product_kernel[(tiles[0] * tiling.parts, tiles[1])](
            *inputs,
            *stored,
            outliers,
            bias,
            out,
            partial,
            counters,
            *counts,
            FORMS=compiled,
            TILE=tile,
            num_warps=tiling.warps,
        )


def _outliers(weight: StoredWeight) -> tuple[Tensor | None, ...]:
    return weight.outlier_values, weight.outlier_columns, weight.outlier_rows


def tiling_of(found: PreparedWeight, tokens: int) -> Tiling:
    """Return the tiling of a product with a weight: measured on this GPU, or else from `choose_tiling`."""
    if tokens <= tuned.MAX_TOKENS and (measured := tuned.known_tilings(found.device)):
        known = measured.get(tuned.key(found.rows, found.chunks, found.bits, tokens, found.kind))
        if known is not None:
            return known
    return choose_tiling(found.rows, found.chunks, tokens, processors(found.device), found.quads)


def _linear(x: Tensor, weight: StoredWeight, found: PreparedWeight, bias: Tensor | None, out: Tensor) -> Tensor:
    dtype = x.dtype  # fp32 where a segment rounds its input
    result = torch.nn.functional.linear(x, dense(weight, found, dtype), None if bias is None else bias.to(dtype))
    return result.to(out.dtype).view(out.shape)


@functools.cache
def _takes_ptx() -> bool:
    """Whether inline PTX works: neither under the interpreter nor on a GPU before sm_80."""
    if interpreted() or not torch.cuda.is_available() or torch.version.hip:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def interpreted() -> bool:
    """Whether the kernels run under Triton's interpreter (`TRITON_INTERPRET=1` when they were imported)."""
    return not isinstance(product_kernel, triton.runtime.JITFunction)


@functools.cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors; 4 under the interpreter, so that tests split rows."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on(device: torch.device) -> Any:
    """Make `device` current, where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
