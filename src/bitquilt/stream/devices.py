"""Devices: `choose_device` finds one by name, `move` and `to_device` move what it needs, `free_bytes` and
`stays_on_device` say what fits."""

from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bitquilt.errors import UserError

# Share of the device's free memory; the rest is for a block, its gradients and the solvers' matrices.
_ACTIVATIONS_SHARE = 1 / 4


def choose_device(name: str) -> torch.device:
    """Return the device `cpu`, `cuda`, `cuda:1`, or with `auto` the first GPU if there is one.

    Raises UserError for a name that is unknown or a GPU that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (kind == "cpu" and number):
        raise UserError(f"device is {name!r}; known are cpu, cuda, cuda:N and auto")
    if kind == "cpu":
        return torch.device("cpu")
    index, count = int(number or 0), torch.cuda.device_count()
    if index >= count:
        here = f"{count} GPUs" if count else "no GPU that torch can use"
        raise UserError(f"device is {name!r}, but this machine has {here}; leave out --device, or see bitquilt doctor")
    return torch.device("cuda", index)


def stays_on_device(nbytes: int, device: torch.device) -> bool:
    """Whether `nbytes` of activations may stay on the device between two blocks; a CPU reads them from their file."""
    if device.type != "cuda":
        return False
    free, _total = torch.cuda.mem_get_info(device)
    return nbytes <= _ACTIVATIONS_SHARE * free


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, or of the host for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def move(module: nn.Module, device: torch.device) -> None:
    """Move the module in place, except for its tensors on the meta device, which have no values."""
    module._apply(lambda t: t if t.is_meta else t.to(device))


def to_device(values: Any, device: torch.device) -> Any:
    """Return nested `values` with every tensor moved to `device`."""
    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, values)
