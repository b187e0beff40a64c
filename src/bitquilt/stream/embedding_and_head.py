"""Embedding and head in few bits, on request: rounded before the blocks, so that these see the embedding's errors.

open_tables(job) -> None            # their files are in place, the model computes with the rounded tables
"""

import json
import time
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bitquilt.core.packing import layout_from_json, layout_to_json, pack
from bitquilt.core.plan_file import OuterBits
from bitquilt.core.types import Format, Layout, check_finite
from bitquilt.errors import UserError
from bitquilt.layer.nearest import round_symmetric
from bitquilt.model.embedding import QuantizedEmbedding, embedding_path, put_embedding
from bitquilt.model.linear import QuantizedLinear, linear_weight, replace_module
from bitquilt.model.structure import Skeleton
from bitquilt.stream.job import Job, head_path
from bitquilt.stream.workdir import read_tensors, write_json, write_tensors

MIN_BITS, MAX_BITS = 2, 8
GROUP_SIZE = 32  # as everybody's 4- and 8-bit tables: 4.5 and 8.5 true bits per weight
_STEMS = {"embedding": "embedding", "head": "rounded-head"}  # of files; head.safetensors is one that a recipe solved


@dataclass(frozen=True)
class Table:
    """A table as it will be stored, from headers alone. `kind`: "embedding" or "head"; `tied`: it is both."""

    kind: str
    path: str
    bits: int
    layout: Layout
    tied: bool

    @property
    def weights(self) -> int:
        """How many."""
        return self.layout.out_features * self.layout.in_features

    @property
    def looked_up(self) -> bool:
        """Whether only rows of it are read, never the whole."""
        return self.kind == "embedding" and not self.tied

    @property
    def config(self) -> dict[str, Any]:
        """What it changes in config.json, beside the layouts."""
        return {"tie_word_embeddings": self.tied}


def tables_to_be(skeleton: Skeleton, outer: OuterBits, layers: Container[str] = ()) -> tuple[Table, ...]:
    """The tables to round, the embedding first. `layers`: what the recipe solves, by path.

    Raises UserError where one cannot be rounded, or not to so many bits, or is the recipe's already.
    """
    found = []
    for kind, bits in outer.given.items():
        if not MIN_BITS <= bits <= MAX_BITS:
            raise UserError(f"{kind} bits is {bits}; wanted {MIN_BITS} to {MAX_BITS}")
        path = _embedding(skeleton) if kind == "embedding" else _head(skeleton, layers)
        rows, width = _weight(skeleton, path).shape
        form = Format(bits, GROUP_SIZE, symmetric=True)
        tied = f"{path}.weight" in skeleton.model.all_tied_weights_keys.values()
        found.append(Table(kind, path, bits, Layout(rows, width, ((form, width),)), tied))
    return tuple(found)


def _embedding(skeleton: Skeleton) -> str:
    path = embedding_path(skeleton.model)
    if path is None:
        kind = type(skeleton.model).__name__
        raise UserError(
            f"the embedding of {kind} does more than look up rows: it stays as it is; leave out embedding bits"
        )
    if f"{path}.weight" not in skeleton.parameters.values():
        raise UserError(f"the embedding {path} is not stored as one table: it stays as it is; leave out embedding bits")
    return path


def _head(skeleton: Skeleton, layers: Container[str]) -> str:
    path = head_path(skeleton, "--head-bits")
    if path in layers:
        raise UserError(
            f"--include-head leaves the head {path} to the recipe, --head-bits rounds it to nearest; give one of them"
        )
    return path


def _weight(skeleton: Skeleton, path: str) -> Tensor:
    """`[rows, columns]`"""
    return linear_weight(skeleton.model.get_submodule(path))


def committed_tables(folder: Path) -> list[dict[str, Any]]:
    """The records of the tables that are done, the embedding's first."""
    records = [folder / f"{stem}.json" for stem in _STEMS.values()]
    return [json.loads(path.read_text()) for path in records if path.is_file()]


def open_tables(job: Job) -> None:
    """Put the rounded tables into the model, whose outer weights are in memory; round them first if need be.

    From then on the model's full-precision tables are not read again. Raises UserError for one with NaN or Inf.
    """
    for table in tables_to_be(job.skeleton, job.outer):
        if not (job.folder / f"{_STEMS[table.kind]}.json").is_file():
            _round(job, table)
        _put(job, table)


def _put(job: Job, table: Table) -> None:
    skeleton, path, prefix = job.skeleton, table.path, f"{table.path}."
    stem = job.folder / _STEMS[table.kind]
    record = json.loads(stem.with_suffix(".json").read_text())
    stored = read_tensors(stem.with_suffix(".safetensors"))
    tensors = {key.removeprefix(prefix): value for key, value in stored.items()}
    layout = layout_from_json(record["layers"][path]["layout"], path)
    if table.kind == "embedding":
        put_embedding(skeleton.model, path, QuantizedEmbedding.from_tensors(tensors, layout))
    else:
        put_head(skeleton, path, tensors, layout)
    sources = skeleton.sources[""]
    sources[:] = [name for name in sources if skeleton.parameters.get(name) != f"{path}.weight"]


def put_head(skeleton: Skeleton, path: str, tensors: dict[str, Tensor], layout: Layout) -> None:
    """Put a head of packed `tensors` into the model; it keeps its bias."""
    bias = getattr(skeleton.model.get_submodule(path), "bias", None)
    module = QuantizedLinear.from_tensors(tensors, layout, None if bias is None else bias.data)
    replace_module(skeleton.model, path, module)


def _round(job: Job, table: Table) -> None:
    started, path = time.perf_counter(), table.path
    weight = _weight(job.skeleton, path)
    try:
        check_finite(path, weight=weight)
    except ValueError as bad:
        raise UserError(f"{bad}; the checkpoint is damaged, download or convert it again") from None
    stored = round_symmetric(weight, table.bits, GROUP_SIZE)
    stem = job.folder / _STEMS[table.kind]
    file = stem.with_suffix(".safetensors")
    write_tensors(file, {f"{path}.{key}": value for key, value in pack(stored).items()})
    rounded = QuantizedLinear.from_weight(stored).dequantize()
    error = float((rounded - weight).square().sum() / weight.square().sum().clamp_min(1e-30))
    seconds = round(time.perf_counter() - started, 3)
    entry = {
        "layout": layout_to_json(stored.layout),
        "bits": str(table.bits) * -(-weight.shape[1] // GROUP_SIZE),
        "group_size": GROUP_SIZE,
        "output_error": None,
        "weight_error": error,
        "loss": None,
        "seconds": seconds,
    }
    record = {
        "block": path,
        "file": file.name,
        "layers": {path: entry},
        "events": [],
        "seconds": seconds,
        "planned": False,
        "tied": table.tied,
    }
    write_json(stem.with_suffix(".json"), record)
