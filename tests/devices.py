"""A second device that need not exist: `with SecondDevice() as device:` tensors "on" it compute on the CPU, and an
operation that mixes them with the host's raises as a GPU would.

A tensor there is a wrapper that names `device` as its own and holds the values. Everything torch does with it comes
through `SecondDevice`, as does every tensor made with `device=`. As on a GPU the host's tensors may take part where
they have no dimension, and as indices; numpy, native code and generators of the host are refused.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("second")  # for the whole process: who uses this module runs in one of its own
DEVICE = torch.device("second", 0)


class Wrapped(Tensor):
    """A tensor on the second device."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "Wrapped":
        made: Wrapped = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), dtype=values.dtype, device=DEVICE
        )
        made.values = values
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        """Works from a GPU too."""
        return self.values.tolist()

    def data_ptr(self) -> int:
        """An address there is of no use here."""
        raise RuntimeError(f"native code asks for the address of a tensor on {DEVICE}")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Wrapped({self.values!r})"


@torch.library.impl("aten::empty_strided", "PrivateUse1")
def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    """What torch itself asks for, past every mode: a number becomes a tensor on the device."""
    return Wrapped(torch.empty_strided(size, stride, dtype=dtype))


@torch.library.impl("aten::empty.memory_format", "PrivateUse1")
def _empty(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Wrapped(torch.empty(size, dtype=dtype))


@torch.library.impl("aten::_copy_from", "PrivateUse1")
def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    source, place = (t.values if isinstance(t, Wrapped) else t for t in (source, target))
    place.copy_(source)
    return target


class SecondDevice(TorchDispatchMode):
    """See the module; `operations` counts what was computed there."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(v, Wrapped) for v in tree_flatten((args, kwargs))[0]) or _names_device(kwargs):
            self.operations += 1
            return dispatch(func, args, kwargs)
        return func(*args, **kwargs)


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Carry out `func` on the values; the result lies where the arguments do, or where `device=` says."""
    flat = tree_flatten((args, kwargs))[0]
    tensors = [v for v in flat if isinstance(v, Tensor)]
    wrapped = any(isinstance(t, Wrapped) for t in tensors)
    copies = func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
    indexes = "index" in func.__name__ and func.__name__.split(".")[0] in ("index", "index_put", "index_put_",
                                                                          "_index_put_impl_")  # fmt: skip
    if wrapped and not copies and not indexes:
        for t in tensors:
            if not isinstance(t, Wrapped) and t.dim() > 0:
                raise RuntimeError(f"{func}: a tensor {list(t.shape)} of the host meets one of {DEVICE}")
    if _names_device(kwargs) and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{func}: a generator of the host makes numbers on {DEVICE}")
    to = kwargs.get("device")
    if to is not None:
        kwargs = kwargs | {"device": torch.device("cpu") if torch.device(to) == DEVICE else to}
    kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory" or not _is_ours(to)}
    there = _is_ours(to) if to is not None else wrapped
    plain_args, plain_kwargs = tree_map(lambda v: v.values if isinstance(v, Wrapped) else v, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    mine = {id(t.values): t for t in tensors if isinstance(t, Wrapped)}

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in mine:
            return mine[id(value)]
        host = copies and func == torch.ops.aten.copy_.default and not isinstance(args[0], Wrapped)
        return Wrapped(value) if there and not host else value

    out = tree_map(back, result)
    if isinstance(args[0] if args else None, Wrapped) and func.__name__.split(".")[0] in ("resize_", "set_", "t_"):
        raise RuntimeError(f"{func} changes a tensor's shape in place")
    return out


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _names_device(kwargs: dict[str, Any]) -> bool:
    return _is_ours(kwargs.get("device"))
