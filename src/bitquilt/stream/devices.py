"""Where is a run computed, and what of it stays there? choose_device(name) -> torch.device."""

import shutil
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bitquilt.core.recipe import PlansModel, Recipe, TunesModel
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import Checkpoint

# Of the device's free memory: the rest is for a block, its gradients and the solvers' matrices.
_ACTIVATIONS_SHARE = 1 / 4


def choose_device(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:1`, or `auto`: the first GPU where there is one. UserError: unknown, or not here."""
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
    """Whether activations of so many bytes may stay on the device between two blocks: not on a CPU, which reads them
    from their file."""
    if device.type != "cuda":
        return False
    free, _total = torch.cuda.mem_get_info(device)
    return nbytes <= _ACTIVATIONS_SHARE * free


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device, or on the host."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def move(module: nn.Module, device: torch.device) -> None:
    """What of the module has values, in place; what is on the meta device stays there."""
    module._apply(lambda t: t if t.is_meta else t.to(device))


def to_device(values: Any, device: torch.device) -> Any:
    """Every tensor in nested `values`."""
    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, values)


def check_disk(work: Path, checkpoint: Checkpoint, recipe: Recipe, tokens: int) -> None:
    """Raise UserError when the disk cannot hold what the run will certainly write: the hidden states of `tokens`."""
    width = checkpoint.model_config.hidden_size
    there = sum(path.stat().st_size for path in work.glob("activations-*.f32"))
    wanted = max(0, _copies(recipe) * 4 * tokens * width - there)
    free = shutil.disk_usage(work).free
    if wanted > free:
        raise UserError(
            f"the calibration activations need {wanted / 1e9:.1f} GB in {work}, {free / 1e9:.1f} GB are free; "
            "give --work-dir on another disk, or fewer --samples"
        )


def _copies(recipe: Recipe) -> int:
    """Of the calibration's hidden states that lie on the disk at once: a block's inputs and outputs, those of the
    full-precision model beside them, or, in a pass before the first block or for one after the last, what the first
    block reads."""
    if recipe.needs.full_model:
        return 5 if isinstance(recipe, TunesModel) and recipe.tune_batch else 4
    return 3 if isinstance(recipe, PlansModel) else 2
