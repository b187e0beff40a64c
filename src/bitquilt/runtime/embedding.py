"""The token embedding in few bits, on request: quantized first, so that every block sees its errors.

open_embedding(job) -> record | None      # its files are in place, the model reads the quantized table
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitquilt.errors import UserError
from bitquilt.models.embedding import QuantizedEmbedding, embedding_path, put_embedding
from bitquilt.models.structure import Skeleton
from bitquilt.packing import layout_from_json, layout_to_json, pack
from bitquilt.runtime.job import Job
from bitquilt.runtime.workdir import read_tensors, write_json, write_tensors
from bitquilt.solvers.symmetric import round_symmetric
from bitquilt.types import Format, Layout, check_finite

MIN_BITS, MAX_BITS = 2, 8
GROUP_SIZE = 32  # as everybody's 4- and 8-bit tables: 4.5 and 8.5 true bits per weight
_FILE, _RECORD = "embedding.safetensors", "embedding.json"


@dataclass(frozen=True)
class Embedding:
    """A table as it will be stored, from headers alone; `tied`: the head shares it."""

    path: str
    bits: int
    layout: Layout
    tied: bool

    @property
    def weights(self) -> int:
        """How many."""
        return self.layout.out_features * self.layout.in_features

    @property
    def config(self) -> dict[str, Any]:
        """What it changes in config.json, beside the layouts."""
        return {"tie_word_embeddings": self.tied}


def embedding_to_be(skeleton: Skeleton, bits: int | None) -> Embedding | None:
    """The embedding in so many bits, None without. Raises UserError where it cannot be quantized, or not to these."""
    if bits is None:
        return None
    path = _check(skeleton, bits)
    rows, width = skeleton.model.get_parameter(f"{path}.weight").shape
    form = Format(bits, GROUP_SIZE, symmetric=True)
    tied = f"{path}.weight" in skeleton.model.all_tied_weights_keys.values()
    return Embedding(path, bits, Layout(rows, width, ((form, width),)), tied)


def _check(skeleton: Skeleton, bits: int) -> str:
    """The path of the embedding."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise UserError(f"embedding bits is {bits}; wanted {MIN_BITS} to {MAX_BITS}")
    path = embedding_path(skeleton.model)
    if path is None:
        kind = type(skeleton.model).__name__
        raise UserError(
            f"the embedding of {kind} does more than look up rows: it stays as it is; leave out embedding bits"
        )
    if f"{path}.weight" not in skeleton.parameters.values():
        raise UserError(f"the embedding {path} is not stored as one table: it stays as it is; leave out embedding bits")
    return path


def committed_embedding(folder: Path) -> dict[str, Any] | None:
    """The embedding's record, if it is done."""
    path = folder / _RECORD
    return dict(json.loads(path.read_text())) if path.is_file() else None


def open_embedding(job: Job) -> None:
    """Put the quantized table into the model, whose outer weights are in memory; quantize it first if need be.

    From then on the model's full-precision table is not read again. Raises UserError for a table with NaN or Inf.
    """
    embedding = embedding_to_be(job.skeleton, job.embedding_bits)
    if embedding is None:
        return
    path = embedding.path
    if committed_embedding(job.folder) is None:
        _quantize(job, embedding)
    record = committed_embedding(job.folder)
    assert record is not None
    prefix = f"{path}."
    tensors = {key.removeprefix(prefix): value for key, value in read_tensors(job.folder / _FILE).items()}
    table = QuantizedEmbedding.from_tensors(tensors, layout_from_json(record["layers"][path]["layout"], path))
    put_embedding(job.skeleton.model, path, table)
    sources = job.skeleton.sources[""]
    sources[:] = [name for name in sources if job.skeleton.parameters.get(name) != f"{path}.weight"]


def _quantize(job: Job, embedding: Embedding) -> None:
    started, path = time.perf_counter(), embedding.path
    weight = job.skeleton.model.get_parameter(f"{path}.weight").data
    try:
        check_finite(path, weight=weight)
    except ValueError as bad:
        raise UserError(f"{bad}; the checkpoint is damaged, download or convert it again") from None
    stored = round_symmetric(weight, embedding.bits, GROUP_SIZE)
    write_tensors(job.folder / _FILE, {f"{path}.{key}": value for key, value in pack(stored).items()})
    table = QuantizedEmbedding.from_weight(stored)
    error = float((table.dequantize() - weight).square().sum() / weight.square().sum().clamp_min(1e-30))
    groups = -(-weight.shape[1] // GROUP_SIZE)
    entry = {
        "layout": layout_to_json(stored.layout),
        "bits": str(embedding.bits) * groups,
        "group_size": GROUP_SIZE,
        "output_error": None,
        "weight_error": error,
        "loss": None,
    }
    seconds = round(time.perf_counter() - started, 3)
    entry["seconds"] = seconds
    record = {
        "block": path,
        "file": _FILE,
        "layers": {path: entry},
        "events": [],
        "seconds": seconds,
        "planned": False,
        "tied": embedding.tied,
    }
    write_json(job.folder / _RECORD, record)
