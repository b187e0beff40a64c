"""`Job` says what a run quantizes and how; `CalibratedJob` adds the token ids it calibrates with.

`targets`, `all_targets` and `head_path` find the layers to quantize, `shapes` returns their dimensions,
`open_block` holds one block with its layers in memory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitquilt.core.plan_file import OuterBits
from bitquilt.core.recipe import Recipe
from bitquilt.core.training import Training
from bitquilt.core.types import LayerPlan, check_finite
from bitquilt.errors import UserError
from bitquilt.layer.table import RowUse
from bitquilt.model.experts import expert_paths, refuse_parts
from bitquilt.model.free_tables import Table
from bitquilt.model.linear import is_linear, linear_weight
from bitquilt.model.structure import Skeleton, gates, linear_layers

_HOST = torch.device("cpu")


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """A run without calibration data: model, recipe and work directory `folder`.

    `device`: where blocks are computed; what is outside them stays on the host. `notes`: for the report, by layer.
    `tables`: embedding and head whose rows share the budget, `table_rows`: bits of every row, uint8 `[rows]`, and
    `uses`: how much the rows matter, where that was measured, by path.
    """

    skeleton: Skeleton
    recipe: Recipe
    folder: Path
    skip: tuple[str, ...] = ()
    include_head: bool = False
    outer: OuterBits = field(default_factory=OuterBits)
    plans: Mapping[str, LayerPlan] | None = None
    device: torch.device = _HOST
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    table_rows: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    uses: Mapping[str, RowUse] = field(default_factory=dict)

    def calibrated(self, ids: Tensor, batch_size: int) -> "CalibratedJob":
        """Return the job with token ids to calibrate with."""
        return CalibratedJob(**vars(self), ids=ids, batch_size=batch_size)


@dataclass(frozen=True, eq=False, kw_only=True)
class CalibratedJob(Job):
    """A run with calibration data: token `ids` `[samples, tokens]`, `batch_size` samples per forward pass."""

    ids: Tensor
    batch_size: int

    @property
    def batches(self) -> list[slice]:
        """Rows of `ids` that pass through a block together; the last batch may be smaller."""
        count = len(self.ids)
        return [slice(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]

    @property
    def trains(self) -> bool:
        """Whether this run trains anything."""
        return self.recipe.training != Training()


@dataclass(frozen=True, eq=False)
class LoadedBlock:
    """A block with its weights: its number, path and module, and its layers to quantize by full path.

    The head counts as the block after the last; its module is the model.
    """

    number: int
    path: str
    module: nn.Module
    linears: Mapping[str, nn.Module]

    def only(self, names: Iterable[str]) -> "LoadedBlock":
        """Return the block with some of its layers."""
        return replace(self, linears={name: self.linears[name] for name in names})


@contextmanager
def open_block(job: Job, i: int, tensors: dict[str, Tensor] | None = None) -> Iterator[LoadedBlock]:
    """Hold block i on the job's device until the context closes. `tensors`: its weights, where they are read already.

    Raises UserError for a damaged or incomplete checkpoint.
    """
    path = job.skeleton.blocks[i]
    with job.skeleton.resident(path, job.device, tensors) as module:
        yield LoadedBlock(i, path, module, targets(job.skeleton, path, module, job.skip))


def targets(skeleton: Skeleton, path: str, block: nn.Module, skip: Sequence[str]) -> dict[str, nn.Module]:
    """Return the block's layers to quantize by full path: linear, stored unchanged or as experts, no gates, none that
    match `skip`. Raises UserError where `skip` matches some of the experts that are stored together."""
    plain, experts = set(skeleton.parameters.values()), expert_paths(block)
    found = {}
    linears = linear_layers(block)
    small = gates(linears)
    for name, module in linears.items():
        full, stored = f"{path}.{name}", name in experts or f"{path}.{name}.weight" in plain
        if name not in small and stored and not any(fnmatch(full, pattern) for pattern in skip):
            found[full] = module
    if experts:
        refuse_parts(block, path, {name.removeprefix(f"{path}.") for name in found})
    return found


def all_targets(skeleton: Skeleton, skip: Sequence[str], include_head: bool) -> dict[str, nn.Module]:
    """Return every layer a run will quantize by full path, without weights.

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
    """Return the path of the linear layer that makes the logits.

    Raises UserError, naming the flag `asked`, if there is none or if it shares its weight with the embedding.
    """
    head = skeleton.model.get_output_embeddings()
    path = next((name for name, module in skeleton.model.named_modules() if module is head), None)
    if head is None or path is None or not is_linear(head):
        raise UserError(f"{type(skeleton.model).__name__} has no linear head to quantize; leave out {asked}")
    if f"{path}.weight" not in skeleton.parameters.values() or skeleton.model.config.tie_word_embeddings:
        raise UserError(
            f"the head {path} shares its weight with the embedding, whose rows are looked up; leave out {asked}, "
            "or give --embedding-bits, which rounds both"
        )
    return path


def check_weights(linears: Mapping[str, nn.Module]) -> None:
    """Raise UserError naming the layer whose weight holds NaN or Inf, before others compute with it."""
    try:
        for name, module in linears.items():
            check_finite(name, weight=linear_weight(module))
    except ValueError as error:
        raise UserError(f"{error}; the checkpoint is damaged, download or convert it again") from None


def shapes(layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Return `[out, in]` of each layer."""
    weights = {name: linear_weight(module) for name, module in layers.items()}
    return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
