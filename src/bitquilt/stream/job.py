"""What a run is asked to do, and to which layers: the value every part of the runtime is handed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitquilt.core.plan_file import OuterBits
from bitquilt.core.recipe import Recipe
from bitquilt.core.types import LayerPlan
from bitquilt.errors import UserError
from bitquilt.model.linear import is_linear, linear_weight
from bitquilt.model.structure import Skeleton, linear_layers

_HOST = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Job:
    """A run's inputs: model, method, calibration ids `[samples, tokens]` (None if the recipe needs none)."""

    skeleton: Skeleton
    recipe: Recipe
    ids: Tensor | None
    folder: Path
    batch_size: int
    skip: tuple[str, ...] = ()
    include_head: bool = False
    outer: OuterBits = field(default_factory=OuterBits)
    plans: Mapping[str, LayerPlan] | None = None
    device: torch.device = _HOST  # where blocks are computed; what is outside them stays on the host
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # for the report, by layer

    def batches(self) -> list[slice]:
        """Rows of `ids` that go through a block together; the last batch may be smaller."""
        count = 0 if self.ids is None else len(self.ids)
        return [slice(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]


def targets(skeleton: Skeleton, path: str, block: nn.Module, skip: Sequence[str]) -> dict[str, nn.Module]:
    """The block's layers to quantize, by full path: linear, read unchanged, not skipped on request."""
    plain = set(skeleton.parameters.values())
    found = {}
    for name, module in linear_layers(block).items():
        full = f"{path}.{name}"
        if f"{full}.weight" in plain and not any(fnmatch(full, pattern) for pattern in skip):
            found[full] = module
    return found


def all_targets(skeleton: Skeleton, skip: Sequence[str], include_head: bool) -> dict[str, nn.Module]:
    """Every layer a run will quantize, by full path, without weights.

    Raises UserError if there is none, or if the head is asked for and cannot be quantized.
    """
    found: dict[str, nn.Module] = {}
    for path in skeleton.blocks:
        found |= targets(skeleton, path, skeleton.model.get_submodule(path), skip)
    if include_head:
        path = head_path(skeleton)
        found[path] = skeleton.model.get_submodule(path)
    if not found:
        raise UserError("every linear layer is skipped: nothing to quantize")
    return found


def head_path(skeleton: Skeleton, asked: str = "--include-head") -> str:
    """The path of the layer that makes logits. Raises UserError where it is none of its own; `asked`: by which flag."""
    head = skeleton.model.get_output_embeddings()
    path = next((name for name, module in skeleton.model.named_modules() if module is head), None)
    if head is None or path is None or not is_linear(head):
        raise UserError(f"{type(skeleton.model).__name__} has no linear head to quantize; leave out {asked}")
    if f"{path}.weight" not in skeleton.parameters.values() or skeleton.model.config.tie_word_embeddings:
        raise UserError(
            f"the head {path} shares its weight with the embedding, whose rows are looked up; leave out {asked}, "
            "give --embedding-bits: it rounds both"
        )
    return path


def shapes(layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """`[out, in]` of each layer."""
    weights = {name: linear_weight(module) for name, module in layers.items()}
    return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
