"""The op against plain arithmetic on the codes, for every kind of storage."""

import pytest
import torch

from bitquilt import ops
from bitquilt.model.linear import QuantizedLinear
from tests.weights import KINDS, make_weight, naive_dense

FLOAT8 = ("shared_table",)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_a_dense_product_with_the_decoded_weight(kind, dtype):
    weight = make_weight(kind)
    dense = naive_dense(weight)
    module = QuantizedLinear.from_weight(weight, torch.arange(dense.shape[0], dtype=torch.float32))
    x = torch.randn(3, 5, dense.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.nn.functional.linear(x, dense.to(dtype), module.bias.to(dtype))
    assert torch.equal(module.dequantize(), dense)
    output = module(x)
    assert output.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    module = QuantizedLinear.from_weight(make_weight(kind), torch.zeros(12))
    x = torch.randn(4, module.in_features, requires_grad=True)
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    tests = every[1:] if kind in FLOAT8 else every  # the first multiplies its arguments: no float8
    arguments = (x, *module._stored(), module.bias, module.out_features)
    torch.library.opcheck(ops.quantized_matmul.default, arguments, test_utils=tests)
    torch.library.opcheck(ops.dequantize.default, (*module._stored(), module.out_features), test_utils=tests)


@pytest.mark.parametrize("kind", ["mixed", "outliers", "shared_table"])
def test_compiled_module_equals_eager(kind):
    module = QuantizedLinear.from_weight(make_weight(kind))
    x = torch.randn(4, module.in_features)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_gradients_reach_input_and_bias():
    weight = make_weight("mixed")
    module = QuantizedLinear.from_weight(weight, torch.zeros(12))
    module.bias.requires_grad_(True)
    x = torch.randn(3, module.in_features, requires_grad=True)
    upstream = torch.randn(3, 12)
    module(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ naive_dense(weight))
    torch.testing.assert_close(module.bias.grad, upstream.sum(0))


def test_empty_and_non_contiguous_input():
    module = QuantizedLinear.from_weight(make_weight("mixed"))
    assert module(torch.randn(0, module.in_features)).shape == (0, 12)
    x = torch.randn(module.in_features, 6).t()
    torch.testing.assert_close(module(x), module(x.contiguous()))
