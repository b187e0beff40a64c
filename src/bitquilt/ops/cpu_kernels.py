"""The native body of the operators on a CPU: `quantized_matmul`, `dequantize`, and `product` for a weight's `handle`.

`BITQUILT_ISA` forces an instruction set: avx512, avx2, neon, portable, or reference for none of them; under
TRITON_INTERPRET=1 also triton, the GPU's kernels interpreted, to test them. Without the extension (no compiler when the
package was installed) the reference computes everything. `BITQUILT_ACTIVATIONS` chooses between `exact` (16 or 24 bits
per activation) and `int8`, which only avx512 uses.
"""

import ctypes
import functools
import os
import threading
from typing import Any

import torch
from torch import Tensor

from bitquilt.errors import UserError
from bitquilt.ops import gpu, reference
from bitquilt.ops.large_pages import reserve
from bitquilt.ops.stored_weight import Handle, StoredWeight, handle_of

try:
    import bitquilt._kernels as _kernels
except ImportError:
    _kernels = None  # type: ignore[assignment]

REFERENCE, TRITON = "reference", "triton"
MODES = ("exact", "int8")
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Rows unpacked at a time for torch's product of many tokens (fp32, fp16, or no matrix tiles), per thread and at most.
# 512 tokens, 4096 x 11008, 3 bits: on one thread 53 ms in parts of 1024 rows, 55 in parts of 512 or 2048, 57 of 256;
# on two 28 ms in parts of 2048 rows, 29 of 1024, 51 of 512, which torch does not split (bf16 itself: 47 and 24).
_TILE_ROWS, _MOST_ROWS = 1024, 4096
# Tokens at a time on the matrix units. They are copied, 22 KB each at 11008 columns; unpacking again costs 3 %.
_MOST_TOKENS = 2048
# Bytes of a fixed-point activation (avx512). 16 bits per group exceed bf16 and fp16 for all but a group's smallest.
_DIGITS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}
_local = threading.local()


def built() -> bool:
    """Whether the package was installed with its kernels."""
    return _kernels is not None


def native() -> Any:
    """Return the extension, for the bodies in other files; None where it was not built."""
    return _kernels


def _choice(variable: str, here: list[str], reason: str) -> str:
    wanted = os.environ.get(variable, here[0])
    if wanted not in here:
        raise UserError(f"{variable} is {wanted!r}; {reason} {', '.join(here)}")
    return wanted


@functools.cache
def level() -> str:
    """The instruction set in use, or "reference". Raises UserError if `BITQUILT_ISA` asks for one that is missing."""
    here = [*(_kernels.levels() if built() else []), REFERENCE]
    here += [TRITON] if built() and os.environ.get("TRITON_INTERPRET") == "1" and gpu.has_triton() else []
    return _choice("BITQUILT_ISA", here, "this processor has" if built() else "the kernels are not built; there is")


def matrix_units(level: str) -> bool:
    """Whether products of many bf16 tokens are computed on the processor's matrix tiles."""
    return level == "avx512" and _kernels.matrix_units()


@functools.cache
def _mode_of_environment() -> str:
    return _choice("BITQUILT_ACTIVATIONS", list(MODES), "known are")


_mode: str | None = None


def activations() -> str:
    """The rounding of activations: "exact" or "int8". UserError: `BITQUILT_ACTIVATIONS` is neither."""
    return _mode or _mode_of_environment()


def use_activations(mode: str | None) -> None:
    """Choose the rounding for this process; None returns to the environment's choice. ValueError: an unknown mode."""
    global _mode
    if mode is not None and mode not in MODES:
        raise ValueError(f"activations are {mode!r}; known are {', '.join(MODES)}")
    _mode = mode


def handle(weight: StoredWeight, out_features: int) -> Handle | None:
    """Return the weight's handle for `product`, or None where the kernels leave it to the reference."""
    if level() in (REFERENCE, TRITON):
        return None
    return handle_of(weight, out_features, level(), _kernels.Handle)


def direct(x: Tensor, bias: Tensor | None) -> bool:
    """Whether `product` may bypass the operator: a plain CPU tensor, no gradient, and no tracing."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype not in TYPES or _kernels is None:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def product(x: Tensor, handle: Handle, bias: Tensor | None) -> Tensor:
    """Multiply x `[..., in]` fp32, fp16 or bf16: `[..., out]`. ValueError: shapes that do not go together.

    Up to 16 tokens never write the weight out; for more it is unpacked some rows at a time.
    """
    in_features, out_features = handle.in_features, handle.out_features
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x is {list(x.shape)}; the layer takes [..., {in_features}]")
    if bias is not None and bias.numel() != out_features:
        raise ValueError(f"bias holds {bias.numel()} entries; the layer has {out_features} outputs")
    tokens = x.numel() // in_features
    if tokens > _kernels.MAX_TOKENS:
        return _linear(x, handle, None if bias is None else bias.to(x.dtype))
    output = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    if tokens:
        flat = x if x.is_contiguous() else x.contiguous()
        shift = None if bias is None else bias.to(torch.float32).contiguous()
        digits = 1 if activations() == "int8" else _DIGITS[x.dtype]
        address = 0 if shift is None else shift.data_ptr()
        given = (flat.data_ptr(), TYPES[x.dtype], tokens, in_features)
        handle.native.matmul(*given, address, output.data_ptr(), digits, torch.get_num_threads())
    return output


def quantized_matmul(x: Tensor, *arguments: Any) -> Tensor:
    """Compute `reference.quantized_matmul` by `product`."""
    if level() == TRITON:
        return gpu.quantized_matmul(x, *arguments)
    *stored, bias, out_features = arguments
    found = handle(StoredWeight(*stored), out_features) if x.dtype in TYPES else None
    if found is None:
        return reference.quantized_matmul(x, *arguments)
    return product(x, found, bias)


def dequantize(*arguments: Any) -> Tensor:
    """Compute `reference.dequantize`, bit for bit."""
    if level() == TRITON:
        return gpu.dequantize(*arguments)
    *stored, out_features = arguments
    found = handle(StoredWeight(*stored), out_features)
    if found is None:
        return reference.dequantize(*arguments)
    return dense(found, torch.empty((out_features, found.in_features)))


def kmeans(x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compute `grids.kmeans.kmeans_reference` natively: contiguous fp64 `[columns, n]`, on all threads."""
    columns, n = x.shape
    centroids = torch.empty((columns, k), dtype=torch.float64)
    boundaries = torch.empty((columns, k + 1), dtype=torch.int64)
    found = (centroids.data_ptr(), boundaries.data_ptr())
    _kernels.kmeans(x.data_ptr(), w.data_ptr(), columns, n, k, *found, torch.get_num_threads())
    return centroids, boundaries


def decoder(sizes: list[int], epsilon: float, scale: float) -> Any:
    """Make `csrc/decoder.h`'s Decoder. ValueError: sizes that do not go together."""
    return _kernels.Decoder(sizes, epsilon, scale)


def read_bandwidth(size: int, threads: int, rounds: int = 3) -> float:
    """Bytes per second of reading `size` bytes of memory once, the fastest of the rounds."""
    return float(_kernels.read_bandwidth(size, threads, rounds))


def dense(handle: Handle, out: Tensor, first: int = 0, as_stored: bool = False) -> Tensor:
    """Write the weight's rows from `first` on into `out` `[rows, in]`, contiguous, fp32, fp16 or bf16.

    `as_stored`: the columns in stored order.
    """
    last = first + out.shape[0]
    handle.native.dequantize(first, last, as_stored, out.data_ptr(), TYPES[out.dtype], torch.get_num_threads())
    return out


def in_stored_order(x: Tensor, handle: Handle) -> Tensor:
    """Return x `[..., in]` with its channels in the order of the weight's columns; x itself if that is the same."""
    if not handle.native.reordered:
        return x
    x = x.contiguous()
    out = torch.empty_like(x)
    tokens = x.numel() // handle.in_features
    handle.native.reorder(x.data_ptr(), x.itemsize, tokens, out.data_ptr(), torch.get_num_threads())
    return out


def _linear(x: Tensor, handle: Handle, bias: Tensor | None) -> Tensor:
    """Multiply by the weight, unpacked some rows at a time into memory that is kept.

    A layer of 4096 x 11008 unpacked whole costs 22 000 page faults, as long again as its product with 512 tokens.
    """
    rows = handle.out_features
    x = in_stored_order(x, handle)  # cheaper than to reorder the weight
    if x.dtype == torch.bfloat16 and matrix_units(handle.level):
        return _on_matrix_units(x.contiguous(), handle, bias)
    parts = []
    part = min(_TILE_ROWS * torch.get_num_threads(), _MOST_ROWS)
    for first in range(0, max(rows, 1), part):  # one part, empty, of a layer without outputs
        count = min(part, rows - first)
        out = _tile(count * handle.in_features, x.dtype).view(count, handle.in_features)
        tile = dense(handle, out, first, as_stored=True)
        parts.append(torch.nn.functional.linear(x, tile, None if bias is None else bias[first : first + count]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _on_matrix_units(x: Tensor, handle: Handle, bias: Tensor | None) -> Tensor:
    """Compute `_linear` by csrc/amx.cpp; x is bf16, in stored order."""
    flat, threads = x.reshape(-1, handle.in_features), torch.get_num_threads()
    out = torch.empty((*x.shape[:-1], handle.out_features), dtype=x.dtype)
    shift = None if bias is None else bias.float().contiguous()
    parts = zip(flat.split(_MOST_TOKENS), out.view(len(flat), handle.out_features).split(_MOST_TOKENS), strict=True)
    for part, to in parts if handle.out_features else ():
        memory = _tile(handle.native.prefill_bytes(len(part), threads), torch.uint8)
        address = 0 if shift is None else shift.data_ptr()
        given = (part.data_ptr(), len(part), handle.in_features)
        handle.native.prefill(*given, address, to.data_ptr(), memory.data_ptr(), threads)
    return out


def _tile(count: int, dtype: torch.dtype) -> Tensor:
    """Return `[count]` entries that this thread alone writes to."""
    size = count * dtype.itemsize
    kept: Tensor | None = getattr(_local, "tile", None)
    if kept is None or kept.numel() < size:
        kept = _local.tile = reserve(size) if size else torch.empty(0, dtype=torch.uint8)
    return kept[:size].view(dtype)


def _use_torch_threads() -> None:
    """Tell the native code where torch's OpenMP team begins; csrc/pool.h says why."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if "libgomp" in line or "libiomp5" in line}
        for path in sorted(paths, key=lambda path: "torch" not in path):
            start = ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
            if start:
                _kernels.use_team(start)
                return
    except (OSError, AttributeError, IndexError):
        pass  # the native code starts threads of its own


if built():
    _use_torch_threads()
