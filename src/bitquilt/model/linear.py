"""`QuantizedLinear`, a linear layer on packed codes, and `replace_linears`, which puts such layers into a model."""

import threading
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitquilt import ops
from bitquilt.core.packing import (
    bits_per_weight,
    check_indices,
    check_tensors,
    not_finite,
    op_layout,
    pack,
    tensor_specs,
)
from bitquilt.core.types import Layout, QuantizedWeight
from bitquilt.errors import UserError
from bitquilt.ops import cpu_kernels, gpu
from bitquilt.ops.gpu_order import ARRANGED, arrange, arrangeable
from bitquilt.ops.large_pages import place
from bitquilt.ops.reference import LAYOUT_FIELDS, as_stored
from bitquilt.ops.stored_weight import Handle, StoredWeight, state

_PAGED_BYTES = 2**16  # smaller layers stay where they are: a page holds hundreds of them
# Classes of transformers that compute the same product as nn.Linear.
_CONV1D = ("transformers.pytorch_utils", "Conv1D")
_FALCON = ("transformers.models.falcon.modeling_falcon", "FalconLinear")
_settling = threading.Lock()


class _Ready:
    """A module's handle for the kernels, valid while the module has the buffers that it was made from.

    Copies and pickles of the module start without one.
    """

    def __init__(self) -> None:
        self.handle: Handle | None = None
        self._seen: list[tuple[str, Tensor, tuple[int, int]]] = []

    def of(self, buffers: Mapping[str, Tensor | None]) -> Handle | None:
        for name, tensor, before in self._seen:
            if buffers[name] is not tensor or state(tensor) != before:
                return None
        return self.handle

    def set(self, handle: Handle, buffers: Mapping[str, Tensor | None]) -> None:
        self._seen = [(name, t, state(t)) for name, t in buffers.items() if t is not None]
        self.handle = handle

    def __deepcopy__(self, memo: Any) -> "_Ready":
        return _Ready()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Ready, ()


class QuantizedLinear(nn.Module):
    """y = x W^T + b on packed codes. Input `[..., in]`, output `[..., out]`, any floating dtype.

    `packing.tensor_specs(layout)` names and shapes the buffers. They keep their dtype through `.to(dtype)`, `.half()`
    and `.bfloat16()`: scales are part of the solved weight. The bias is an ordinary parameter. On a GPU some codes are
    in another order (`arrange`).
    """

    def __init__(
        self,
        layout: Layout,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.in_features, self.out_features = layout.in_features, layout.out_features
        self._op_layout = op_layout(layout)
        self._ready = _Ready()
        for name, spec in tensor_specs(layout).items():
            self.register_buffer(name, torch.zeros(spec.shape, dtype=spec.dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], layout: Layout, bias: Tensor | None = None) -> Self:
        """Make a module of packed tensors. Raises ValueError for a tensor that disagrees with `layout`."""
        check_tensors(tensors, layout, "weight")
        module = cls(layout, bias is not None, device="meta")
        for name in tensor_specs(layout):
            module.register_buffer(name, tensors[name])
        if bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=False)
        return module

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> Self:
        """Make a module of a solved weight."""
        return cls.from_tensors(pack(weight), weight.layout, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b `[..., out]` of x `[..., in]`, in the dtype of x."""
        bias = None if self.has_row_gains else self.bias
        if not torch.compiler.is_compiling() and cpu_kernels.direct(x, self.bias):
            handle = self._ready.of(self._buffers)
            if handle is None or handle.level != cpu_kernels.level():
                handle = self.settle()
            if handle is not None:
                return self._by_row(cpu_kernels.product(x, handle, bias))
        output: Tensor = ops.quantized_matmul(x, *self._stored(), bias, self.out_features)
        return self._by_row(output)

    @property
    def has_row_gains(self) -> bool:
        """Whether each output is also multiplied by a factor of its row."""
        return self.layout.row_gain_dtype is not None

    def _by_row(self, product: Tensor) -> Tensor:
        """Apply the gains of rows and the bias, which the operator left out because it knows no gains."""
        if not self.has_row_gains:
            return product
        output = product * self.get_buffer("row_gains").to(product.dtype)
        return output if self.bias is None else output + self.bias.to(product.dtype)

    def settle(self) -> Handle | None:
        """Move the weight to large pages (`ops.large_pages`) and return its handle; the first product does so.

        Returns None where the kernels leave the layer to the reference. The buffers keep names, shapes and contents;
        the old ones are freed, so at most one layer is held twice.
        """
        with _settling:
            stored = {name: t for name, t in self._buffers.items() if t is not None}
            handle = cpu_kernels.handle(self._stored(), self.out_features)
            if handle is None or any(t.device.type != "cpu" for t in stored.values()):
                return None
            if self._ready.handle is None and sum(t.numel() * t.itemsize for t in stored.values()) >= _PAGED_BYTES:
                self._buffers.update(zip(stored, place(list(stored.values())), strict=True))
                handle = cpu_kernels.handle(self._stored(), self.out_features)
                assert handle is not None
            self._ready.set(handle, self._buffers)
            return handle

    def arrange(self) -> None:
        """Put codes in the order in which a GPU reads them (`ops.gpu_order`), where there is one.

        Moving a layer to a GPU and loading it there call this; moving it back and `state_dict` use the stored order.
        """
        for i in range(len(self.layout.segments)):
            grid, bits, group_size, width = self._op_layout[LAYOUT_FIELDS * i : LAYOUT_FIELDS * (i + 1)]
            if arrangeable(grid, bits, group_size, width):
                self._buffers[f"codes_{i}"] = arrange(self.get_buffer(f"codes_{i}"), grid, bits, width)
                self._op_layout[LAYOUT_FIELDS * i] += ARRANGED

    @property
    def arranged(self) -> bool:
        """Whether some codes are in a GPU's order."""
        return any(grid >= ARRANGED for grid in self._op_layout[::LAYOUT_FIELDS])

    def _stored_codes(self) -> dict[str, Tensor]:
        """Codes of the arranged segments, in the order of the checkpoint."""
        codes = [self.get_buffer(f"codes_{i}") for i in range(len(self.layout.segments))]
        stored, _ = as_stored(codes, self._op_layout, self.out_features)
        pairs = enumerate(zip(stored, codes, strict=True))
        return {f"codes_{i}": part for i, (part, now) in pairs if part is not now}

    def _restore(self) -> None:
        """Undo `arrange`."""
        self._buffers.update(self._stored_codes())
        self._op_layout = op_layout(self.layout)

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle. Python's pickle knows no float8 tensors, so they pass as bytes."""
        state = dict(self.__dict__)
        state["_buffers"] = {
            name: tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.float8_e4m3fn else tensor
            for name, tensor in self._buffers.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, spec in tensor_specs(self.layout).items():
            tensor = self._buffers[name]
            if tensor is not None and tensor.dtype != spec.dtype:
                self._buffers[name] = tensor.view(spec.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: codes for name, codes in self._stored_codes().items()})

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        arranged = self.arranged
        self._restore()
        super()._load_from_state_dict(*arguments, **keywords)
        if arranged:
            self.arrange()

    def dequantize(self) -> Tensor:
        """Return the weight fp32 `[out, in]` that this module computes with."""
        weight: Tensor = ops.dequantize(*self._stored(), self.out_features)
        return weight * self.get_buffer("row_gains").float().unsqueeze(1) if self.has_row_gains else weight

    @property
    def weight(self) -> Tensor:
        """The weight, dequantized on each access, for model code that reads its dtype, device or shape."""
        dtype = self.bias.dtype if self.bias is not None else torch.float32
        return self.dequantize().to(dtype)

    def _stored(self) -> StoredWeight:
        segments = range(len(self.layout.segments))
        empty = torch.empty(0, device=self._buffers["scale_0"].device)  # type: ignore[union-attr]
        buffers = self._buffers
        zeros = [buffers.get(f"zero_{i}", buffers.get(f"gain_{i}")) for i in segments]
        return StoredWeight(
            [buffers[f"codes_{i}"] for i in segments],  # type: ignore[misc]
            [buffers[f"scale_{i}"] for i in segments],  # type: ignore[misc]
            [empty if zero is None else zero for zero in zeros],
            self._op_layout,
            permutation=buffers.get("permutation"),
            block=self.layout.block,
            outlier_values=buffers.get("outlier_values"),
            outlier_columns=buffers.get("outlier_columns"),
            outlier_rows=buffers.get("outlier_rows"),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Let `.to()` and the like move the packed tensors but never cast them."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._ready = _Ready()
        self._restore()
        stored = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, tensor in stored.items():
            self._buffers[name] = keep_dtype(tensor)
        if self.get_buffer("codes_0").is_cuda and gpu.in_use():
            self.arrange()
        return self

    def extra_repr(self) -> str:
        """Shape, code widths and true bits per weight."""
        widths = " ".join(f"{width}x{form.bits}bit" for form, width in self.layout.segments)
        return f"in={self.in_features}, out={self.out_features}, {widths}, bpw={bits_per_weight(self.layout):.3f}"


def is_linear(module: nn.Module) -> bool:
    """Whether a layer multiplies by one matrix and adds a bias, as `nn.Linear`, GPT-2's `Conv1D` and Falcon's layer do.

    Other subclasses are left alone, because they may do more than the product.
    """
    return type(module) is nn.Linear or _is(module, _FALCON) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer is GPT-2's, which stores `[in, out]`."""
    return _is(module, _CONV1D)


def _is(module: nn.Module, kind: tuple[str, str]) -> bool:
    """Whether the module's class is this one of transformers', by its name: transformers may not be imported."""
    return (type(module).__module__, type(module).__name__) == kind


def linear_weight(module: nn.Module) -> Tensor:
    """Return the weight of an `is_linear` module as `[out, in]`."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    return weight.t() if is_transposed(module) else weight


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at the dotted `path` below `root`."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def replace_linears(root: nn.Module, layouts: Mapping[str, Layout], dtype: torch.dtype | None = None) -> None:
    """Put an empty `QuantizedLinear` at each path of `layouts`, on the device of the layer it replaces.

    Raises ValueError for a layer that does not exist, is not linear, or has another shape.
    """
    for path, layout in layouts.items():
        try:
            module = root.get_submodule(path)
        except AttributeError:
            raise ValueError(f"the checkpoint quantizes {path}, but the model has no such layer") from None
        if not is_linear(module):
            raise ValueError(f"the checkpoint quantizes {path}, but the model has a {type(module).__name__} there")
        weight = linear_weight(module)
        if tuple(weight.shape) != (layout.out_features, layout.in_features):
            raise ValueError(
                f"{path} is {list(weight.shape)} in the model, but the checkpoint's layout says "
                f"[{layout.out_features}, {layout.in_features}]"
            )
        bias = module.bias is not None
        replace_module(root, path, QuantizedLinear(layout, bias, device=weight.device, dtype=dtype or weight.dtype))


def check_values(tensors: Mapping[str, Tensor], layout: Layout, name: str) -> None:
    """Raise UserError naming the first stored tensor whose values contradict the layout or are not finite."""
    try:
        check_indices(tensors, layout, name)
    except ValueError as error:
        raise UserError(f"{error}; copy or quantize the checkpoint again") from None
    if bad := not_finite(tensors, layout):
        raise UserError(f"tensor {name}.{bad[0]} holds NaN or infinity; copy or quantize the checkpoint again")
