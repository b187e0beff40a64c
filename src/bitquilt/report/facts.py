"""Everything known about one checkpoint: `read_facts` gathers it from config.json, report.json, plan.json and
evaluation.json. `check_hashes` compares the files with the report, `damaged_scales` looks for NaN.

Only config.json and the weights must exist. `Facts.absent` lists every other part that is missing and how to get it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bitquilt.core.json_files import read_json
from bitquilt.core.packing import bits_per_weight, not_finite, tensor_specs
from bitquilt.core.types import Layout, run_lengths
from bitquilt.errors import UserError, VerificationError
from bitquilt.model.checkpoint import Checkpoint, open_checkpoint
from bitquilt.model.config import QUANT_METHOD, read_layouts
from bitquilt.model.hashes import sha256_now
from bitquilt.report.evaluation import ModelSize, fp16_bytes, model_size
from bitquilt.report.evaluation_records import FILE, Record, read_records
from bitquilt.report.run_facts import RunFacts, number, read_run, section

Runs = list[tuple[int, int]]

_FIGURES = ("output_error", "weight_error", "loss", "predicted_loss", "seconds")

_PARTS = {"codes": "codes", "zero": "zeros", "permutation": "order of channels", "outlier": "outliers"}


@dataclass(frozen=True)
class LayerFacts:
    """One quantized layer.

    `runs`: (bits, channels) from the first input channel to the last, or in stored order where no report or plan tells
    which channel went where (`in_order` False). `groups`: one digit per column group. `loudest_first`: the groups are
    MX blocks, counted from the largest inputs on."""

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


class Absent(NamedTuple):
    """A part that this checkpoint does not hold, and how to get it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Facts:
    """What a page or a table says about one checkpoint. `parts`: bytes by what they store."""

    checkpoint: Checkpoint
    name: str
    size: ModelSize
    fp16_bytes: int
    layers: dict[str, LayerFacts]
    parts: dict[str, int]
    run: RunFacts
    evaluations: list[Record]
    absent: tuple[Absent, ...] = ()

    @property
    def recipe_name(self) -> str:
        """The recipe's name; "unknown" without a report."""
        return str(self.run.recipe.get("name", "unknown"))

    @property
    def folder_bytes(self) -> int:
        """Bytes of the whole folder, or of the weights where the report does not say."""
        return self.run.folder_bytes or self.size.bytes

    @property
    def ratio(self) -> float:
        """The checkpoint's bytes over those of the same model in 16 bits."""
        return self.size.bytes / self.fp16_bytes


def read_facts(folder: str | Path, evaluations: Sequence[Path] = ()) -> Facts:
    """Return the facts of a bitquilt checkpoint; `evaluations` are files to read besides its own.

    Raises UserError for a model that bitquilt did not quantize, a damaged file, and figures of another checkpoint.
    """
    checkpoint = open_checkpoint(folder)
    method = checkpoint.model_config.quantized_by
    if method != QUANT_METHOD:
        what = "is full precision" if method is None else f"was quantized by another tool ({method})"
        raise UserError(f"{folder} {what}; wanted a checkpoint that bitquilt quantize wrote")
    layouts = read_layouts(checkpoint.config)
    size = model_size(checkpoint.folder)
    assert size is not None  # it has layouts
    run = read_run(checkpoint.folder)
    solved = section(run.stored, "layers") or _planned(checkpoint.folder)
    layers = {name: _layer(name, layout, section(solved, name)) for name, layout in layouts.items()}
    records = _records(checkpoint.folder, evaluations, size)
    return Facts(
        checkpoint=checkpoint,
        name=checkpoint.folder.resolve().name if Path(folder).is_dir() else str(folder),
        size=size,
        fp16_bytes=fp16_bytes(checkpoint.folder),
        layers=layers,
        parts=_bytes_by_part(checkpoint, layouts),
        run=run,
        evaluations=records,
        absent=_absent(run, layers, records),
    )


def check_hashes(facts: Facts) -> int:
    """Read every file of weights, compare it with report.json and return how many there are.

    Raises UserError if the report holds no hashes, VerificationError naming the first file that differs.
    """
    folder, known = facts.checkpoint.folder, section(facts.run.stored, "files")
    if not known:
        raise UserError(
            f"{folder} has no hashes to compare with: report.json is missing or of an earlier version; quantize again"
        )
    used = {info.file.name for info in facts.checkpoint.tensors.values()}
    for name in sorted(known.keys() | used):
        asked = section(known, name).get("sha256")
        path = folder / name
        if name not in used or asked is None:
            where = "which the model does not use" if asked else "of which report.json knows nothing"
            raise VerificationError(f"{folder} is not as it was written: {name}, {where}; copy or quantize it again")
        if (got := sha256_now(path)) != asked:
            raise VerificationError(
                f"{path} is not as it was written: sha256 {got}, report.json says {asked}; copy or quantize it again"
            )
    return len(known)


def damaged_scales(checkpoint: Checkpoint, layers: Iterable[str]) -> list[str]:
    """Names of the stored tensors of these layers that hold NaN or infinity; codes are not read."""
    found, layouts = [], read_layouts(checkpoint.config)
    for path in layers:
        names = [n for n in checkpoint.tensors if n.rpartition(".")[0] == path and not n.startswith(f"{path}.codes_")]
        tensors = {name.rpartition(".")[2]: tensor for name, tensor in checkpoint.read(names).items()}
        found += [f"{path}.{name}" for name in not_finite(tensors, layouts.get(path))]
    return found


def _planned(folder: Path) -> dict[str, Any]:
    """The plan's layers, used where a report is missing; {} for a damaged plan."""
    try:
        value = read_json(folder / "plan.json")
    except (OSError, ValueError):
        return {}
    return section(value, "layers") if isinstance(value, dict) else {}


def _layer(name: str, layout: Layout, solved: Mapping[str, Any]) -> LayerFacts:
    groups, group_size = _groups(solved, layout.in_features)
    if groups is not None:
        runs, counts = _channels(groups, group_size, layout.in_features), Counter(map(int, groups))
    else:
        group_size = layout.segments[0][0].group_size
        runs = [(form.bits, columns) for form, columns in layout.segments]
        stored: Counter[int] = Counter()
        for bits, columns in runs:
            stored[bits] += columns
        counts = Counter({bits: -(-columns // group_size) for bits, columns in stored.items()})
    microscaled = any(form.grid.startswith("mx") for form, _ in layout.segments)
    return LayerFacts(
        name=name,
        out_features=layout.out_features,
        in_features=layout.in_features,
        runs=runs,
        in_order=groups is not None,
        groups=groups,
        group_size=group_size,
        counts={bits: counts[bits] for bits in sorted(counts)},
        nominal_bits=layout.nominal_bits,
        bpw=bits_per_weight(layout),
        outliers=layout.outliers,
        loudest_first=groups is not None and microscaled,
        **{key: number(solved.get(key)) for key in _FIGURES},
    )


def _groups(solved: Mapping[str, Any], width: int) -> tuple[str | None, int]:
    """One digit per column group and the group size, if they fit a layer of `width` columns; else None and 0."""
    groups, size = solved.get("bits"), solved.get("group_size")
    if not isinstance(groups, str) or not isinstance(size, int) or size < 1 or len(groups) != -(-width // size):
        return None, 0
    return (groups, size) if set(groups) <= set("12345678") else (None, 0)


def _channels(groups: str, size: int, width: int) -> Runs:
    runs = [(bits, count * size) for bits, count in run_lengths([int(digit) for digit in groups])]
    runs[-1] = (runs[-1][0], runs[-1][1] - (size * len(groups) - width))
    return runs


def _bytes_by_part(checkpoint: Checkpoint, layouts: Mapping[str, Layout]) -> dict[str, int]:
    """Bytes of the quantized layers by what they store, and bytes of all other tensors, the largest first."""
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
            if record.bytes not in (None, size.bytes):
                raise UserError(
                    f"{file} was measured on a model of {record.bytes} bytes, but {folder} has {size.bytes} bytes: "
                    "it is another checkpoint; give an evaluation of this one"
                )
            records.append(record)
    return records


def _absent(run: RunFacts, layers: Mapping[str, LayerFacts], records: Sequence[Record]) -> tuple[Absent, ...]:
    lost = "bitquilt quantize writes it; this checkpoint lost it, or another program saved it again"
    missing = []
    if not run.stored:
        missing.append(Absent("report.json: settings, errors, events, machine and time of the run", lost))
    else:
        if not run.stages:
            missing.append(Absent("time and memory per stage", "quantize again with this version of bitquilt"))
        if not any(layer.output_error is not None for layer in layers.values()):
            missing.append(Absent("output errors of the layers", "use a recipe that reads calibration data"))
        if not any(layer.predicted_loss is not None for layer in layers.values()):
            missing.append(Absent("predicted loss per layer", "quantize to a budget such as --size"))
    if any(not layer.in_order for layer in layers.values()):
        missing.append(Absent("bits of each channel: pictures show the stored order", lost))
    if not any(record.kl_mean is not None for record in records):
        what = "KL divergence from the reference" if records else "KL divergence and perplexity"
        missing.append(Absent(what, "bitquilt eval DIR --reference MODEL --text FILE measures and keeps it"))
    return tuple(missing)
