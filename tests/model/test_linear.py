"""The one module: its shapes, its dtypes, its bias, and what may be replaced by it."""

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from bitquilt.core.types import Layer, Layout, QuantizedWeight, uniform_plan
from bitquilt.model.linear import QuantizedLinear, is_linear, linear_weight, replace_linears
from bitquilt.recipes.rtn import RTN
from tests.weights import codebook_segment, make_weight, naive_dense, put_product, uniform_segment

OUT, IN = 24, 40


def solved(bits: int = 3, group_size: int = 16) -> tuple[QuantizedWeight, torch.Tensor]:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    recipe = RTN(bits=bits, group_size=group_size)
    return recipe.quantize(Layer("layer", weight, None, None), uniform_plan(IN, bits, group_size), None).weight, weight


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_dequantized_product(bits: int, bias: bool) -> None:
    quantized, original = solved(bits)
    shift = torch.arange(OUT, dtype=torch.float32) if bias else None
    module = QuantizedLinear.from_weight(quantized, shift)
    x = torch.randn(2, 5, IN)
    torch.testing.assert_close(module(x), nn.functional.linear(x, module.dequantize(), shift))
    assert float((module.dequantize() - original).abs().max()) < 8 / 2**bits
    assert torch.equal(module.weight, module.dequantize())
    assert module(x[0, 0]).shape == (OUT,)
    assert module(x[:, :0]).shape == (2, 0, OUT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    quantized, _ = solved()
    module = QuantizedLinear.from_weight(quantized, torch.ones(OUT))
    x = torch.randn(3, IN).to(dtype)
    expected = nn.functional.linear(x, module.dequantize().to(dtype), torch.ones(OUT, dtype=dtype))
    assert module(x).dtype == dtype
    # A faster body may round elsewhere than the reference: see tests/ops.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(module(x), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["shared_table", "outliers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 40])
def test_gains_of_rows_come_after_the_product_and_before_the_bias(kind: str, dtype: torch.dtype, tokens: int) -> None:
    plain = make_weight(kind)
    out, width = plain.layout.out_features, plain.layout.in_features
    gains = (4 * torch.rand(out, generator=torch.Generator().manual_seed(1)) + 0.1).to(torch.float8_e4m3fn)
    shift = torch.arange(out, dtype=torch.float32)
    module = QuantizedLinear.from_weight(replace(plain, row_gains=gains), shift)
    dense = gains.float().unsqueeze(1) * naive_dense(plain)
    torch.testing.assert_close(module.dequantize(), dense)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = nn.functional.linear(x.double(), dense.double(), shift.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-5}[dtype]
    for moved in (module, module.to(dtype)):
        assert moved.get_buffer("row_gains").dtype == torch.float8_e4m3fn
        output = moved(x)
        assert output.dtype == dtype
        assert float((output - expected).abs().max()) < tolerance * float(expected.abs().max())
    x = x.float().requires_grad_()
    module.float()(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(dim=0).expand(tokens, width), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casts_move_the_bias_alone(cast: str) -> None:
    module = QuantizedLinear.from_weight(solved()[0], torch.ones(OUT))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    getattr(module, cast)()
    assert module.bias.dtype == {"half": torch.half, "float": torch.float, "double": torch.double}.get(
        cast, torch.bfloat16
    )
    for name, buffer in module.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])


def test_to_meta_and_back_keeps_shapes_and_types() -> None:
    module = QuantizedLinear.from_weight(solved()[0]).to("meta")
    assert all(buffer.is_meta for buffer in module.buffers())
    empty = module.to_empty(device="cpu")
    wanted = {
        name: (buffer.shape, buffer.dtype) for name, buffer in QuantizedLinear.from_weight(solved()[0]).named_buffers()
    }
    assert {name: (buffer.shape, buffer.dtype) for name, buffer in empty.named_buffers()} == wanted


def test_tensors_that_disagree_with_the_layout_are_named() -> None:
    quantized, _ = solved()
    good = dict(QuantizedLinear.from_weight(quantized).named_buffers())
    missing = {name: tensor for name, tensor in good.items() if name != "zero_0"}
    with pytest.raises(ValueError, match=r"tensor weight\.zero_0 is missing"):
        QuantizedLinear.from_tensors(missing, quantized.layout)
    with pytest.raises(ValueError, match=r"tensor weight\.scale_0 is \[24, 2\]"):
        QuantizedLinear.from_tensors({**good, "scale_0": good["scale_0"][:, :2]}, quantized.layout)


def test_it_says_what_it_is() -> None:
    assert repr(QuantizedLinear.from_weight(solved()[0])).startswith("QuantizedLinear(in=40, out=24, 40x3bit, bpw=")


def test_a_copy_shares_nothing() -> None:
    module = QuantizedLinear.from_weight(solved()[0])
    copied = copy.deepcopy(module)
    copied.scale_0.zero_()
    assert float(module.dequantize().abs().max()) > 0


class Wrapped(nn.Linear):
    """Does something beside the product."""


def test_only_plain_linear_layers_are_linear() -> None:
    assert is_linear(nn.Linear(2, 3))
    assert is_linear(Conv1D(3, 2))
    assert not is_linear(Wrapped(2, 3))
    assert not is_linear(nn.Embedding(2, 3))
    assert linear_weight(nn.Linear(2, 3)).shape == linear_weight(Conv1D(3, 2)).shape == (3, 2)


@pytest.mark.parametrize(
    ("path", "module", "match"),
    [
        ("gone", nn.Linear(IN, OUT), "quantizes gone, but the model has no such layer"),
        ("layer", nn.LayerNorm(IN), "quantizes layer, but the model has a LayerNorm there"),
        ("layer", nn.Linear(OUT, IN), r"layer is \[40, 24\] in the model, but the checkpoint's layout says \[24, 40\]"),
    ],
)
def test_a_layer_that_does_not_fit_is_named(path: str, module: nn.Module, match: str) -> None:
    layouts: dict[str, Layout] = {path: solved()[0].layout}
    root: Any = nn.ModuleDict({"layer": module})
    with pytest.raises(ValueError, match=match):
        replace_linears(root, layouts)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_replacing_keeps_bias_device_and_type(kind: Any) -> None:
    layer = nn.Linear(IN, OUT) if kind is nn.Linear else Conv1D(OUT, IN)
    root = nn.ModuleDict({"layer": layer.to("meta", torch.bfloat16)})
    replace_linears(root, {"layer": solved()[0].layout})
    new = root["layer"]
    assert isinstance(new, QuantizedLinear)
    assert all(tensor.is_meta for tensor in (*new.buffers(), new.bias))
    assert new.bias.dtype == torch.bfloat16
    assert not new.bias.requires_grad


@pytest.mark.parametrize("kind", ["mixed", "shared_table", "outliers"])
def test_a_layer_that_is_dropped_takes_its_memory_along(kind: str) -> None:
    """What the kernels remember of a weight must not keep it: a run drops a block after the other."""
    module = QuantizedLinear.from_weight(make_weight(kind))
    module(torch.randn(2, module.in_features))
    module.dequantize()
    held = [weakref.ref(tensor) for tensor in module.buffers()]
    del module
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


def mixed_weight() -> QuantizedWeight:
    parts = (
        uniform_segment(3, 128, 128),
        uniform_segment(2, 128, 128, 1),
        uniform_segment(6, 64, 8, 2),
        codebook_segment(3, 41, 3),
    )
    return QuantizedWeight(parts)


def test_an_arranged_layer_is_the_same_layer() -> None:
    """Whoever asks for its tensors gets the checkpoint's; whoever multiplies gets the product."""
    module = QuantizedLinear.from_weight(mixed_weight())
    stored = {name: t.clone() for name, t in module.state_dict().items()}
    x = torch.randn(2, module.in_features, requires_grad=True)
    expected, dense = module(x), module.dequantize()
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    module.arrange()
    assert module.arranged
    assert not torch.equal(module.codes_0, stored["codes_0"])
    assert torch.equal(module.codes_1, stored["codes_1"])
    assert torch.equal(module.codes_2, stored["codes_2"])
    assert module.codes_3.shape != stored["codes_3"].shape
    for same in (module, copy.deepcopy(module)):
        assert torch.equal(same.dequantize(), dense)
        torch.testing.assert_close(same(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.autograd.grad(same(x).sum(), x)[0], gradient)
        found = same.state_dict(prefix="a.")
        assert found.keys() == {f"a.{name}" for name in stored}
        assert all(torch.equal(found[f"a.{name}"], t) for name, t in stored.items())
    module.arrange()
    assert torch.equal(module.dequantize(), dense)  # twice is once


def test_an_arranged_layer_moves_and_loads() -> None:
    module, other = (QuantizedLinear.from_weight(mixed_weight()) for _ in range(2))
    other.codes_0.fill_(0)
    dense = module.dequantize()
    other.arrange()
    other.load_state_dict(module.state_dict())
    assert other.arranged
    assert torch.equal(other.dequantize(), dense)
    other.to("cpu")
    assert not other.arranged
    assert torch.equal(other.codes_0, module.codes_0)
    assert torch.equal(other.dequantize(), dense)


def _shared(module: nn.Module) -> None:
    module.share_memory()


def _tensors_shared(module: nn.Module) -> None:
    for tensor in module.buffers():
        tensor.share_memory_()


def _sent(module: nn.Module) -> None:
    ForkingPickler.dumps(module)


def _cast(module: nn.Module) -> None:
    module.to(torch.bfloat16).to(torch.float32)


def _set(module: nn.Module) -> None:
    for tensor in module.buffers():
        tensor.set_(tensor.clone())


def _data_replaced(module: nn.Module) -> None:
    for tensor in module.buffers():
        tensor.data = tensor.clone()


def _swapped(module: nn.Module) -> None:
    for tensor in module.buffers():
        with pytest.raises(RuntimeError, match="weakref"):  # torch refuses to swap a tensor that is remembered
            torch.utils.swap_tensors(tensor, tensor.clone())


MOVES = [_shared, _tensors_shared, _sent, _cast, _set, _data_replaced, _swapped]


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("columns", [40, 4096])  # in place, and in large pages
def test_a_storage_that_moves_in_place_is_found_again(move: Callable[[nn.Module], None], columns: int) -> None:
    """The old memory is unmapped or another tensor's: a remembered address would read it, or end the process."""
    module = QuantizedLinear.from_weight(QuantizedWeight((uniform_segment(3, columns, 8, rows=OUT),)))
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    one, many = module(x), module(x.repeat(20, 1))
    dense = module.dequantize()
    for _ in range(2):
        move(module)
        rubbish = [torch.full_like(tensor, 1) for tensor in module.buffers()]  # takes freed memory
        assert torch.equal(module(x), one)
        assert torch.equal(module(x.repeat(20, 1)), many)
        assert torch.equal(module.dequantize(), dense)
        del rubbish


def test_a_module_passed_to_a_spawned_process_works_there_and_here() -> None:
    module = QuantizedLinear.from_weight(QuantizedWeight((uniform_segment(3, IN, 8, rows=OUT),)))
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    before = module(x)
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=put_product, args=(module, x, results))
    child.start()
    assert torch.tensor(results.get(timeout=120)).equal(before)
    child.join()
    assert child.exitcode == 0
    assert torch.equal(module(x), before)


def test_falcons_own_linear_class_is_a_linear_layer_and_other_subclasses_are_not() -> None:
    class Strange(FalconLinear):
        pass

    made = [kind(4, 3) for kind in (nn.Linear, FalconLinear, Strange)]
    assert [is_linear(layer) for layer in made] == [True, True, False]
    layer, x = FalconLinear(8, 6), torch.randn(3, 8)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))  # the class still is one
