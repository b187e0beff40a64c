"""The operators `quantized_matmul(x, ...) -> [..., out]` and `dequantize(...) -> fp32 [out, in]` in `torch.library`.

Eager mode, `torch.compile` and export see one op each. `ops.reference` defines both and explains the arguments. torch
picks the body by device: `reference` anywhere, `cpu_kernels` on a CPU, `gpu` on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from bitquilt.ops import cpu_kernels, gpu, reference

_WEIGHT_SCHEMA = (
    "Tensor[] codes, Tensor[] scales, Tensor[] zeros, int[] layout, Tensor? permutation, int block, "
    "Tensor? outlier_values, Tensor? outlier_columns, Tensor? outlier_rows"
)
torch.library.define("bitquilt::dequantize", f"({_WEIGHT_SCHEMA}, int out_features) -> Tensor")
torch.library.define(
    "bitquilt::quantized_matmul", f"(Tensor x, {_WEIGHT_SCHEMA}, Tensor? bias, int out_features) -> Tensor"
)
# CompositeExplicitAutograd: the body for every device that has none of its own.
torch.library.impl("bitquilt::dequantize", "CompositeExplicitAutograd", reference.dequantize)
torch.library.impl("bitquilt::quantized_matmul", "CompositeExplicitAutograd", reference.quantized_matmul)
if cpu_kernels.built():
    torch.library.impl("bitquilt::dequantize", "cpu", cpu_kernels.dequantize)
    torch.library.impl("bitquilt::quantized_matmul", "cpu", cpu_kernels.quantized_matmul)
if gpu.has_triton():
    torch.library.impl("bitquilt::dequantize", "cuda", gpu.dequantize)
    torch.library.impl("bitquilt::quantized_matmul", "cuda", gpu.quantized_matmul)

quantized_matmul = torch.ops.bitquilt.quantized_matmul
dequantize = torch.ops.bitquilt.dequantize


def _dequantize_shape(
    codes: list[Tensor], scales: list[Tensor], zeros: list[Tensor], layout: list[int], *rest: Any
) -> Tensor:
    in_features = sum(layout[reference.LAYOUT_FIELDS - 1 :: reference.LAYOUT_FIELDS])
    return codes[0].new_empty((rest[-1], in_features), dtype=torch.float32)


def _matmul_shape(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[-1]))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, *weight, bias, out_features = inputs
    ctx.weight, ctx.out_features = weight, out_features
    ctx.bias = None if bias is None else (bias.dtype, bias.requires_grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients reach the input and the bias; the packed weight is fixed."""
    weight = dequantize(*ctx.weight, ctx.out_features)
    grad_bias = None
    if ctx.bias is not None and ctx.bias[1]:
        grad_bias = grad.reshape(-1, ctx.out_features).sum(0).to(ctx.bias[0])
    nothing = [None] * 2
    lists = [[None] * len(tensors) for tensors in ctx.weight[:3]]
    return (grad @ weight.to(grad.dtype), *lists, *nothing, None, None, None, None, grad_bias, None)


torch.library.register_fake("bitquilt::dequantize", _dequantize_shape)
torch.library.register_fake("bitquilt::quantized_matmul", _matmul_shape)
torch.library.register_autograd("bitquilt::quantized_matmul", _backward, setup_context=_save_for_backward)
