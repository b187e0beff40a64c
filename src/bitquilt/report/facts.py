"""What is known about a checkpoint? `read_facts(folder) -> Facts`, from its config, report.json, plan.json and
evaluation.json. Only config and weights must be there; of every other part, `absent` says what is missing and how to
get it. Everything a file may hold is checked here: behind this door numbers are numbers.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitquilt.core.packing import bits_per_weight, tensor_specs
from bitquilt.core.types import Layout, run_lengths
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import Checkpoint, open_checkpoint
from bitquilt.model.config import QUANT_METHOD, read_layouts
from bitquilt.report.evaluation import ModelSize, fp16_bytes, model_size
from bitquilt.report.remembered import FILE, Record, number, read_records

Runs = list[tuple[int, int]]

_PARTS = {"codes": "codes", "zero": "zeros", "permutation": "order of channels", "outlier": "outliers"}


@dataclass(frozen=True)
class LayerFacts:
    """One quantized layer. `runs`: (bits, channels) from the first input channel to the last; in stored order where
    no report or plan says which channel went where (`in_order` False). `groups`: one digit per column group.
    `loudest_first`: what is counted from first to last are MX blocks, those with the largest inputs first."""

    name: str
    out_features: int
    in_features: int
    runs: Runs
    in_order: bool
    groups: str | None
    group_size: int
    counts: dict[int, int]
    nominal_bits: float
    bpw: float
    outliers: int
    loudest_first: bool
    output_error: float | None = None
    weight_error: float | None = None
    loss: float | None = None
    predicted_loss: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Absent:
    """A part that this checkpoint does not hold, and what would give it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Facts:
    """Everything that a page or a table says about one checkpoint. `parts`: bytes by what they store, `report`:
    report.json or {}, `source`: the sha256 of the model it was made from."""

    checkpoint: Checkpoint
    name: str
    size: ModelSize
    fp16_bytes: int
    layers: dict[str, LayerFacts]
    parts: dict[str, int]
    report: dict[str, Any]
    evaluations: list[Record]
    absent: tuple[Absent, ...] = field(default=())

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe's name and fields, {} where unknown."""
        return section(section(self.report, "fingerprint"), "recipe")

    @property
    def source(self) -> str | None:
        """The sha256 of the full-precision model."""
        found = section(section(self.report, "fingerprint"), "model").get("sha256")
        return found if isinstance(found, str) else None


def read_facts(folder: str | Path, evaluations: Sequence[Path] = ()) -> Facts:
    """Of the bitquilt checkpoint in `folder`; `evaluations` are files to read besides its own.

    Raises UserError: no checkpoint of ours, a damaged file, figures that were measured on another checkpoint.
    """
    checkpoint = open_checkpoint(folder)
    method = checkpoint.model_config.quantized_by
    if method != QUANT_METHOD:
        what = "is full precision" if method is None else f"was quantized by another tool ({method})"
        raise UserError(f"{folder} {what}; wanted a checkpoint that bitquilt quantize wrote")
    layouts = read_layouts(checkpoint.config)
    size = model_size(checkpoint.folder)
    assert size is not None  # it has layouts
    report = _report(checkpoint.folder)
    solved = section(report, "layers") or _planned(checkpoint.folder)
    layers = {name: _layer(name, layout, section(solved, name)) for name, layout in layouts.items()}
    records = _records(checkpoint.folder, evaluations, size)
    return Facts(
        checkpoint, checkpoint.folder.resolve().name if Path(folder).is_dir() else str(folder), size,
        fp16_bytes(checkpoint.folder), layers, _bytes_by_part(checkpoint, layouts), report, records,
        _absent(report, layers, records),
    )  # fmt: skip


def section(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object under `key`; {} where there is none, or something else."""
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def items(value: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects in the list under `key`."""
    inner = value.get(key)
    return [item for item in inner if isinstance(item, dict)] if isinstance(inner, list) else []


def _report(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: {error}; copy it again, or move it away: what it does not say is then left out"
        ) from None
    if not isinstance(value, dict) or "fingerprint" not in value:
        raise UserError(f"{path} was not written by bitquilt; move it away: what it does not say is then left out")
    return value


def _planned(folder: Path) -> dict[str, Any]:
    """The plan's layers, where a report is missing; a damaged plan says nothing."""
    try:
        value = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return section(value, "layers") if isinstance(value, dict) else {}


def _layer(name: str, layout: Layout, solved: Mapping[str, Any]) -> LayerFacts:
    groups, size = solved.get("bits"), solved.get("group_size")
    width = layout.in_features
    stored: Counter[int] = Counter()
    for form, columns in layout.segments:
        stored[form.bits] += columns
    known = (
        isinstance(groups, str)
        and isinstance(size, int)
        and size > 0
        and len(groups) == -(-width // size)
        and all(digit in "12345678" for digit in groups)
    )
    if known:
        assert isinstance(groups, str)
        assert isinstance(size, int)
        runs = _channels(groups, size, width)
        counts = Counter(map(int, groups))
    else:
        groups, size = None, layout.segments[0][0].group_size
        runs = [(form.bits, columns) for form, columns in layout.segments]
        counts = Counter({bits: -(-columns // size) for bits, columns in stored.items()})
    loudest_first = known and any(form.grid.startswith("mx") for form, _ in layout.segments)
    return LayerFacts(
        name, layout.out_features, width, runs, known, groups, size, {bits: counts[bits] for bits in sorted(counts)},
        layout.nominal_bits, bits_per_weight(layout), layout.outliers, loudest_first,
        *(number(solved.get(key)) for key in ("output_error", "weight_error", "loss", "predicted_loss", "seconds")),
    )  # fmt: skip


def _channels(groups: str, size: int, width: int) -> Runs:
    runs = [(bits, count * size) for bits, count in run_lengths([int(digit) for digit in groups])]
    runs[-1] = (runs[-1][0], runs[-1][1] - (size * len(groups) - width))
    return runs


def _bytes_by_part(checkpoint: Checkpoint, layouts: Mapping[str, Layout]) -> dict[str, int]:
    """Bytes of the tensors: of the quantized layers by what they store, then the tensors nobody quantized."""
    parts: Counter[str] = Counter()
    packed = set()
    for path, layout in layouts.items():
        grids = {str(i): form.grid for i, (form, _) in enumerate(layout.segments)}
        for key, spec in tensor_specs(layout).items():
            kind, _, index = key.partition("_")
            codebook = kind == "scale" and grids[index] == "codebook"
            parts["codebooks" if codebook else _PARTS.get(kind, "scales")] += spec.nbytes
            packed.add(f"{path}.{key}")
    parts["not quantized"] = sum(info.nbytes for name, info in checkpoint.tensors.items() if name not in packed)
    return {name: count for name, count in parts.most_common() if count}


def _records(folder: Path, files: Sequence[Path], size: ModelSize) -> list[Record]:
    own = folder / FILE
    records = read_records(own) if own.is_file() else []
    for file in files:
        for record in read_records(file):
            told = record.get("bytes")
            if number(told) is not None and told != size.bytes:
                raise UserError(
                    f"{file} was measured on a model of {told} bytes, {folder} has {size.bytes}: another checkpoint; "
                    "give the evaluation of this one"
                )
            records.append(record)
    return records


def _absent(
    report: Mapping[str, Any], layers: Mapping[str, LayerFacts], records: Sequence[Record]
) -> tuple[Absent, ...]:
    again = "written by bitquilt quantize; this checkpoint lost it, or was saved again by another program"
    newer = "quantize again with this version to have it"
    missing = []
    if not report:
        missing.append(Absent("the run's report (report.json): settings, errors, events, machine, time", again))
    else:
        if not items(report, "stages"):
            missing.append(Absent("time and memory per stage: an older run", newer))
        if not any(layer.output_error is not None for layer in layers.values()):
            missing.append(Absent("errors of the layers' outputs", "the recipe ran without calibration data"))
        if not any(layer.predicted_loss is not None for layer in layers.values()):
            missing.append(Absent("a predicted loss per layer", "quantize to a global budget"))
    if any(not layer.in_order for layer in layers.values()):
        missing.append(Absent("which channel has which bits: pictures show the stored order", again))
    if not any(number(record.get("kl_mean")) is not None for record in records):
        fix = "bitquilt eval DIR --reference MODEL --text FILE remembers it"
        what = "KL to the reference" if records else "KL and perplexity"
        missing.append(Absent(what, fix))
    return tuple(missing)
