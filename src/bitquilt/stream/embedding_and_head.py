"""Embedding and head in few bits, stored before the blocks, so that these see the embedding's errors.

`rounded_tables` says which tables are rounded to one width on request; `model.free_tables` which share a budget with
the layers. `put_tables` stores both kinds and puts them into the model, `put_head` puts in any quantized head.
"""

import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitquilt.core.packing import pack
from bitquilt.core.plan_file import OuterBits
from bitquilt.core.recipe import Plannable, Recipe
from bitquilt.core.types import Event, Format, Layout, QuantizedWeight
from bitquilt.errors import UserError
from bitquilt.layer.grids.blocks import BLOCK_WIDTHS, block_format, block_type, round_blocks
from bitquilt.layer.nearest import round_symmetric
from bitquilt.layer.table import solve_rows
from bitquilt.model.free_tables import TABLE_GROUP_SIZE, Table, part_name
from bitquilt.model.linear import QuantizedLinear, linear_weight, replace_module
from bitquilt.model.replace import embedding_path, put_embedding
from bitquilt.model.structure import Skeleton
from bitquilt.model.tables.embedding import QuantizedEmbedding
from bitquilt.model.tables.mixed_rows import MixedEmbedding, MixedHead
from bitquilt.ops.block_types import BLOCK_TYPES
from bitquilt.stream.job import Job, check_weights, head_path
from bitquilt.stream.records import TABLE_STEMS, BlockRecord, LayerRecord, read_record, write_record
from bitquilt.stream.workdir import read_tensors, tensors_of, tensors_sum, write_tensors

MIN_BITS, MAX_BITS = 2, 8
GROUP_SIZE = 32  # as in common 4- and 8-bit tables: 4.5 and 8.5 true bits per weight


@dataclass(frozen=True)
class RoundedTable:
    """A table as it will be stored, known from headers alone. `kind`: "embedding" or "head"; `tied`: it is both."""

    kind: str
    path: str
    bits: int
    layout: Layout
    tied: bool

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.layout.out_features * self.layout.in_features

    @property
    def looked_up(self) -> bool:
        """Whether only single rows are read, never the whole table."""
        return self.kind == "embedding" and not self.tied

    @property
    def config(self) -> dict[str, Any]:
        """Changed entries of config.json besides the layouts."""
        return {"tie_word_embeddings": self.tied}


def rounded_tables(
    skeleton: Skeleton, outer: OuterBits, recipe: Recipe, layers: Container[str] = ()
) -> tuple[RoundedTable, ...]:
    """Return the tables to round, the embedding first. `layers`: paths of the layers that the recipe solves.

    A recipe that solves on blocks has tables in blocks too.

    Raises UserError for a table that cannot be rounded, for a number of bits out of range, and for a head in `layers`.
    """
    found = []
    for kind, bits in outer.given.items():
        if not MIN_BITS <= bits <= MAX_BITS:
            raise UserError(f"{kind} bits is {bits}; wanted {MIN_BITS} to {MAX_BITS}")
        path = _embedding(skeleton) if kind == "embedding" else _head(skeleton, layers)
        rows, width = _weight(skeleton, path).shape
        form = Format(bits, GROUP_SIZE, symmetric=True)
        if isinstance(recipe, Plannable) and recipe.plan_terms.zeros == "blocks":
            if bits not in BLOCK_WIDTHS or width % GROUP_SIZE:
                raise UserError(
                    f"{kind} bits is {bits}, of {width} columns; blocks have {BLOCK_WIDTHS} bits of a multiple of 32"
                )
            form = block_format(block_type(bits, width))
        tied = f"{path}.weight" in skeleton.model.all_tied_weights_keys.values()
        found.append(RoundedTable(kind, path, bits, Layout(rows, width, ((form, width),)), tied))
    return tuple(found)


def _embedding(skeleton: Skeleton) -> str:
    path = embedding_path(skeleton.model)
    if path is None:
        kind = type(skeleton.model).__name__
        raise UserError(
            f"the embedding of {kind} does more than look up and scale rows and cannot be rounded; leave out embedding "
            "bits"
        )
    if f"{path}.weight" not in skeleton.parameters.values():
        raise UserError(f"the embedding {path} is not stored as one table; leave out embedding bits")
    return path


def _head(skeleton: Skeleton, layers: Container[str]) -> str:
    path = head_path(skeleton, "--head-bits")
    if path in layers:
        raise UserError(
            f"--include-head leaves the head {path} to the recipe, --head-bits rounds it to nearest; give one of them"
        )
    return path


def _weight(skeleton: Skeleton, path: str) -> Tensor:
    """The table `[rows, columns]`."""
    return linear_weight(skeleton.model.get_submodule(path))


def config_changes(tables: Iterable[RoundedTable | Table]) -> dict[str, Any]:
    """Entries of config.json that differ from the source's once these tables are stored, besides the layouts."""
    return {key: value for table in tables for key, value in table.config.items()}


def committed_tables(folder: Path) -> list[BlockRecord]:
    """Return the records of the tables that are done, the embedding's first."""
    records = [read_record(folder / f"{stem}.json") for stem in TABLE_STEMS.values()]
    return [record for record in records if record is not None]


def put_tables(job: Job) -> Job:
    """Put the rounded tables into the model, whose outer weights are in memory, and round them first if need be.

    Return the job with a skeleton that no longer reads the full-precision tables. Raises UserError for a table with
    NaN or Inf.
    """
    tables: list[RoundedTable | Table] = [*rounded_tables(job.skeleton, job.outer, job.recipe), *job.tables]
    for table in tables:
        record = read_record(job.folder / f"{TABLE_STEMS[table.kind]}.json")
        if record is None:
            record = _round(job, table) if isinstance(table, RoundedTable) else _solve(job, table)
        _put(job, table, record)
    return replace(job, skeleton=job.skeleton.without({f"{table.path}.weight" for table in tables}))


def _put(job: Job, table: RoundedTable | Table, record: BlockRecord) -> None:
    """Put a stored table into the model."""
    stored, model = read_tensors(job.folder / record.file), job.skeleton.model
    if isinstance(table, Table):
        parts = {name.rpartition(".")[2]: (tensors_of(name, stored), x.layout) for name, x in record.layers.items()}
        if table.kind == "embedding":
            put_embedding(model, table.path, MixedEmbedding.of(parts))
        else:
            head = MixedHead.of(parts)
            head.register_parameter("bias", getattr(model.get_submodule(table.path), "bias", None))
            replace_module(model, table.path, head)
        return
    tensors, layout = tensors_of(table.path, stored), record.layers[table.path].layout
    if table.kind == "embedding":
        put_embedding(model, table.path, QuantizedEmbedding.from_tensors(tensors, layout))
    else:
        put_head(job.skeleton, table.path, tensors, layout)


def put_head(skeleton: Skeleton, path: str, tensors: dict[str, Tensor], layout: Layout) -> None:
    """Put a head of packed `tensors` into the model; it keeps its bias."""
    bias = getattr(skeleton.model.get_submodule(path), "bias", None)
    module = QuantizedLinear.from_tensors(tensors, layout, None if bias is None else bias.data)
    replace_module(skeleton.model, path, module)


def _round(job: Job, table: RoundedTable) -> BlockRecord:
    started, path = time.perf_counter(), table.path
    weight = _checked_weight(job, path)
    form = table.layout.segments[0][0]
    if form.grid in BLOCK_TYPES:
        stored = round_blocks(weight, BLOCK_TYPES[form.grid])
    else:
        stored = round_symmetric(weight, table.bits, GROUP_SIZE)
    return _commit(job, table, {path: (stored, weight)}, (), started)


def _solve(job: Job, table: Table) -> BlockRecord:
    """Store the rows at the bits that the job's plan gives them."""
    started, bits = time.perf_counter(), torch.from_numpy(job.table_rows[table.path])
    weight, use = _checked_weight(job, table.path), job.uses.get(table.path)
    solved = solve_rows(weight, bits, use, TABLE_GROUP_SIZE)
    layers = {part_name(table.path, width): (stored, weight[stored.rows]) for width, stored in solved.items()}
    why = "rows are rounded to nearest: nothing is known of their use; give --sensitivities"
    events = () if use is not None else (Event(table.path, "no row statistics", why),)
    return _commit(job, table, layers, events, started)


def _checked_weight(job: Job, path: str) -> Tensor:
    check_weights({path: job.skeleton.model.get_submodule(path)})
    return _weight(job.skeleton, path)


def _relative_error(rounded: Tensor, weight: Tensor) -> float:
    """Sum of squared errors over that of squared weights; with one temporary: tables are large."""
    wrong, right = torch.linalg.vector_norm(rounded - weight), torch.linalg.vector_norm(weight)
    return float((wrong.double() / right.double().clamp_min(1e-15)).square())


def _commit(
    job: Job,
    table: RoundedTable | Table,
    layers: Mapping[str, tuple[QuantizedWeight, Tensor]],
    events: tuple[Event, ...],
    started: float,
) -> BlockRecord:
    """Write the stored weights of a table's `layers`, by path with their full-precision values, and the record."""
    stem = job.folder / TABLE_STEMS[table.kind]
    file = stem.with_suffix(".safetensors")
    tensors: dict[str, Tensor] = {}
    records, seconds = {}, round(time.perf_counter() - started, 3)
    for path, (stored, weight) in layers.items():
        packed = pack(stored)
        tensors |= {f"{path}.{key}": value for key, value in packed.items()}
        rounded = QuantizedLinear.from_tensors(packed, stored.layout).dequantize()
        form, width = stored.layout.segments[0]
        records[path] = LayerRecord(
            layout=stored.layout,
            bits=str(form.bits) * -(-width // form.group_size),
            group_size=form.group_size,
            output_error=None,
            weight_error=_relative_error(rounded, weight),
            loss=None,
            seconds=seconds,
        )
    write_tensors(file, tensors)
    record = BlockRecord(
        block=table.path,
        file=file.name,
        tensors_sum=tensors_sum(tensors),
        layers=records,
        events=events,
        seconds=seconds,
        planned=False,
        tied=table.tied,
    )
    write_record(stem.with_suffix(".json"), record)
    return record
