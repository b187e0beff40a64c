"""`bitquilt inspect DIR`: where a checkpoint's bits went, or what would be quantized in a full-precision model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, TypeVar

from rich.text import Text
from typer import Option

from bitquilt.cli.options import AnyModel
from bitquilt.cli.output import Json, calm, plain_table, print_fact, print_json, print_untouched, stdout
from bitquilt.cli.quantize import print_bits_and_size, print_budget, print_events, print_source
from bitquilt.core.events import Untouched
from bitquilt.core.units import percent_text, ratio_text, size_text, time_text
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import Checkpoint, open_checkpoint
from bitquilt.model.config import QUANT_METHOD
from bitquilt.model.outline import open_outline
from bitquilt.planning.untouched import untouched_tensors
from bitquilt.recipes import usual_options
from bitquilt.report.evaluation import fp16_bytes, model_size
from bitquilt.report.evaluation_records import Record, newest
from bitquilt.report.facts import Facts, LayerFacts, check_hashes, damaged_scales, read_facts
from bitquilt.report.run_facts import RunFacts, section
from bitquilt.stream.job import all_targets

# Terminal colours of the digits 1 to 8, from red for few bits to blue for many.
_COLOURS = ("red", "red", "dark_orange", "yellow", "green", "cyan", "blue", "blue", "magenta")
# Characters of a layer's bar: at most one per group, at most _BAR, and as many as the terminal has room for.
_BAR, _LEAST_BAR = 48, 8
_GAP = 3  # characters between two columns of a table
# Parts of report.json that --json repeats.
_OF_THE_RUN = ("untouched", "events", "budget", "prediction", "machine", "stages", "seconds", "peak_memory_bytes")

Layers = Mapping[str, LayerFacts]
T = TypeVar("T")


@dataclass(frozen=True)
class _StoredWeight:
    """A weight as a full-precision model stores it."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class _FullPrecision:
    """A model that can be quantized, as --json prints it: weights that would be quantized, and tensors that would not.

    `source`: how another tool quantized it, None for full precision.
    """

    folder: str
    quantized: bool
    model_class: str
    blocks: int
    bpw: float | None
    nominal_bits: float | None
    source: dict[str, object] | None
    bytes: int
    ratio_to_fp16: float
    untouched: tuple[Untouched, ...]
    layers: dict[str, _StoredWeight]


def inspect(
    folder: AnyModel,
    layer: Annotated[
        str | None, Option(metavar="PATTERN", help="Show only layers whose path matches, such as '*.mlp.*'.")
    ] = None,
    bit_map: Annotated[
        bool, Option("--map", help="Show a line of digits per layer, its bits from channel to channel, and no table.")
    ] = False,
    verify: Annotated[
        bool, Option("--verify", help="Read all files and compare them with the hashes in report.json.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Read the headers and the scales and print what they say."""
    with calm(models=False):
        checkpoint = open_checkpoint(folder)
        method = checkpoint.model_config.quantized_by
        checkpoint.refuse_undecodable()
        if method not in (None, QUANT_METHOD) and not checkpoint.source.weights:
            raise UserError(
                f"{folder} was quantized by another tool ({method}); give a checkpoint of bitquilt or full precision"
            )
        if method != QUANT_METHOD:
            if verify:
                what = "was quantized by another tool" if checkpoint.source.weights else "is full precision"
                raise UserError(f"{folder} {what}: only what bitquilt wrote has hashes to compare with")
            plain = _full_precision(checkpoint)
            plain = replace(plain, layers=_matching(plain.layers, layer))
            print_json(asdict(plain)) if json_output else _print_plain(plain)
        else:
            facts = read_facts(folder)
            layers = _matching(facts.layers, layer)
            checked = check_hashes(facts) if verify else None
            print_json(_facts_json(facts, layers, checked)) if json_output else _print_facts(facts, layers, bit_map)
            if checked is not None and not json_output:
                print_fact(stdout, "verified", f"{checked} files of weights are as they were written")


def _full_precision(checkpoint: Checkpoint) -> _FullPrecision:
    outline = open_outline(checkpoint)
    targets = all_targets(outline, (), include_head=False)
    weights = {name: source for source, name in outline.parameters.items()}
    size = model_size(checkpoint.folder)
    return _FullPrecision(
        folder=str(checkpoint.folder),
        quantized=False,
        model_class=type(outline.model).__name__,
        blocks=len(outline.blocks),
        bpw=None if size is None else size.bpw,
        nominal_bits=None if size is None else size.nominal_bits,
        source=checkpoint.source.to_json(),
        bytes=checkpoint.stored_bytes,
        ratio_to_fp16=checkpoint.stored_bytes / fp16_bytes(checkpoint.folder),
        untouched=untouched_tensors(outline, targets),
        layers={name: _stored_weight(checkpoint, weights[f"{name}.weight"]) for name in targets},
    )


def _stored_weight(checkpoint: Checkpoint, source: str) -> _StoredWeight:
    info, encoded = checkpoint.tensors[source], checkpoint.source.weights.get(source)
    if encoded is None:
        return _StoredWeight(info.shape, info.dtype, info.nbytes)
    return _StoredWeight(info.shape, encoded.encoding.label, encoded.nbytes)


def _matching(layers: Mapping[str, T], pattern: str | None) -> dict[str, T]:
    found = {name: value for name, value in layers.items() if pattern is None or fnmatch(name, pattern)}
    if not found:
        raise UserError(f"no layer matches {pattern!r}; there are {len(layers)}, such as {next(iter(layers))}")
    return found


def _facts_json(facts: Facts, layers: Layers, verified: int | None) -> dict[str, Any]:
    fingerprint = facts.run.fingerprint
    return {
        "folder": str(facts.checkpoint.folder),
        "quantized": True,
        "recipe": fingerprint.get("recipe"),
        "planned": facts.run.planned,
        "calibration": fingerprint.get("calibration"),
        "seed": fingerprint.get("seed"),
        **asdict(facts.size),
        "ratio_to_fp16": facts.ratio,
        "source": section(facts.run.model, "source") or None,
        "bytes_by_part": facts.parts,
        **{key: facts.run.stored.get(key) for key in _OF_THE_RUN},
        "evaluations": [record.stored for record in facts.evaluations],
        "not_finite": damaged_scales(facts.checkpoint, layers),
        "verified_files": verified,
        "absent": [one._asdict() for one in facts.absent],
        "layers": {name: _layer_json(layer) for name, layer in layers.items()},
    }


def _layer_json(layer: LayerFacts) -> dict[str, Any]:
    """`bits`: number of column groups per width; `groups`: one digit per group in column order, where known."""
    value = {key: inner for key, inner in asdict(layer).items() if key not in ("name", "runs", "in_order", "counts")}
    shape = [value.pop("out_features"), value.pop("in_features")]
    return {"shape": shape, "bits": {str(bits): count for bits, count in layer.counts.items()}, **value}


def _print_facts(facts: Facts, layers: Layers, bit_map: bool) -> None:
    run = facts.run
    if bit_map:
        _print_map(layers)
    else:
        _print_layers(layers)
    stdout.print(str(facts.checkpoint.folder), style="bold", markup=False)
    if run.recipe:
        planned = "; bits by a plan for the whole model" if run.planned else ""
        print_fact(stdout, "recipe", f"{_settings(_changed(run))}{planned}")
    if calibration := section(run.fingerprint, "calibration"):
        print_fact(stdout, "calibration", f"{_settings(calibration)}, seed={run.fingerprint.get('seed')}")
    if kept := sum(layer.outliers for layer in layers.values()):
        share = percent_text(kept / sum(layer.out_features * layer.in_features for layer in layers.values()), 2)
        print_fact(stdout, "outliers", f"{kept} in half precision, {share} of the weights")
    print_bits_and_size(facts)
    print_source(section(run.model, "source"))
    print_fact(stdout, "contents", ", ".join(f"{part} {size_text(count)}" for part, count in facts.parts.items()))
    print_budget(facts)
    _print_quality(facts)
    print_untouched(stdout, run.untouched, facts.size.bytes)
    if run.seconds.this_process is not None and run.peak_memory_bytes is not None:
        cpu = f" on {run.machine['cpu']}" if run.machine.get("cpu") else ""
        print_fact(
            stdout, "run", f"{time_text(run.seconds.this_process)}, {size_text(run.peak_memory_bytes)} of memory{cpu}"
        )
    if "events" in run.stored:
        print_events(run.events)
    if damaged := damaged_scales(facts.checkpoint, layers):
        more = f" and {len(damaged) - 1} more tensors" if len(damaged) > 1 else ""
        what = f"{damaged[0]}{more} hold NaN or infinity: the model computes nonsense; copy or quantize it again"
        print_fact(stdout, "damaged", what, style="bold red")


def _print_quality(facts: Facts) -> None:
    """Print the predicted KL, and what was measured on each text."""
    if (kl := facts.run.prediction.kl) is not None:
        best = newest(facts.evaluations)
        measured = "" if best is None or best.kl_mean is None else f", {best.kl_mean:.4f} measured"
        print_fact(stdout, "prediction", f"KL {kl:.4f}{measured}")
    for record in facts.evaluations:
        if figures := _figures(record):
            print_fact(stdout, "quality", f"{', '.join(figures)} ({record.protocol_text})")


def _figures(record: Record) -> list[str]:
    named = {"KL": record.kl_mean, "perplexity": record.perplexity, "reference": record.reference_perplexity}
    return [f"{name} {value:.4g}" for name, value in named.items() if value is not None]


def _print_map(layers: Layers) -> None:
    """Print `self_attn.q_proj 2223122`, with as many digits as the line has room for."""
    names = [_short(name) for name in layers]
    indent = max(map(len, names)) + 2
    for name, layer in zip(names, layers.values(), strict=True):
        bar = group_bar(layer.groups or "", max(_LEAST_BAR, stdout.width - indent))
        stdout.print(Text.assemble(f"{name:<{indent}}", bar if layer.groups else "(order unknown)"), soft_wrap=True)
    loudest = any(layer.loudest_first for layer in layers.values())
    unit = "block of channels, the largest inputs first" if loudest else "column group"
    stdout.print(f"  Each digit is the bits of a {unit}. Where a line is too short, it is the mean of neighbours.\n")


def _print_layers(layers: Layers) -> None:
    rows = []
    for name, layer in layers.items():
        counts = "  ".join(f"{bits}: {count}" for bits, count in layer.counts.items())
        error = "" if layer.output_error is None else f"{layer.output_error:.5f}"
        rows.append([_short(name), f"{layer.out_features}x{layer.in_features}", counts, f"{layer.bpw:.3f}", error])
    single = any(layer.group_size == 1 for layer in layers.values())
    headers = ["layer", "out x in", f"bits: {'channels' if single else 'groups'}", "bpw", "error"]
    bar = _bar_length([headers, *rows], layers)
    table = plain_table(*headers[:3], *(["by column"] if bar else []), *headers[3:], right=("bpw", "error"))
    for row, layer in zip(rows, layers.values(), strict=True):
        table.add_row(*row[:3], *([group_bar(layer.groups or "", bar)] if bar else []), *row[3:])
    stdout.print(table)
    if 0 < bar < max(len(layer.groups or "") for layer in layers.values()):
        stdout.print(f"  by column: in layers of more than {bar} groups, a digit is the mean of neighbours\n")


def _bar_length(rows: Sequence[Sequence[str]], layers: Layers) -> int:
    """Characters of the bars that fit the terminal next to `rows`; 0 where too few would."""
    used = sum(max(len(row[i]) for row in rows) + _GAP for i in range(len(rows[0])))
    longest = max(len(layer.groups or "") for layer in layers.values())
    bar = min(longest, _BAR, stdout.width - used - _GAP) if stdout.is_terminal else 0
    return bar if bar >= min(longest, _LEAST_BAR) else 0


def _print_plain(plain: _FullPrecision) -> None:
    table = plain_table("layer", "shape", "stored as", "size", right=["size"])
    for name, info in plain.layers.items():
        table.add_row(_short(name), "x".join(map(str, info.shape)), info.dtype, size_text(info.bytes))
    stdout.print(table)
    kind = "full precision" if plain.source is None else "quantized by another tool, decoded as it is read"
    stdout.print(f"{plain.folder}: {plain.model_class}, {kind}", style="bold", markup=False)
    print_source(plain.source or {})
    print_fact(stdout, "size", f"{size_text(plain.bytes)} ({ratio_text(plain.ratio_to_fp16)})")
    share = percent_text(sum(info.bytes for info in plain.layers.values()) / plain.bytes, 2)
    listed = f"the {len(plain.layers)} layers above, in {plain.blocks} blocks"
    print_fact(stdout, "to quantize", f"{share} of the bytes: {listed}")
    print_untouched(stdout, plain.untouched, plain.bytes)


def group_bar(groups: str, length: int) -> Text:
    """Return one coloured digit per column group; of more than `length` groups each digit is the mean of neighbours."""
    bar = Text(no_wrap=True)
    shown = min(len(groups), length)
    for i in range(shown):
        part = [int(digit) for digit in groups[i * len(groups) // shown : (i + 1) * len(groups) // shown]]
        mean = round(sum(part) / len(part))
        bar.append(str(mean), style=_COLOURS[mean])
    return bar


def _changed(run: RunFacts) -> dict[str, Any]:
    """The recipe's size, and its settings that differ from the defaults. A plan's recipe has no size of its own."""
    left_out = {"bits", "bpw", "allocation"} if run.planned else {"bits"} if run.recipe.get("bpw") else set()
    recipe = {key: value for key, value in run.recipe.items() if key not in left_out}
    usual = json.loads(json.dumps(usual_options(recipe.get("name", ""))))
    size = {key: recipe[key] for key in ("bits", "bpw", "group_size") if key in recipe}
    return size | {key: value for key, value in recipe.items() if key == "name" or value != usual.get(key, ...)}


def _settings(values: Mapping[str, Any]) -> str:
    """Settings in one line, without hashes and without those that are not set."""
    shown = {key: value for key, value in values.items() if key not in ("name", "sha256") and value is not None}
    text = ", ".join(f"{key}={Path(value).name if key == 'source' else value}" for key, value in shown.items())
    return f"{values['name']}: {text}" if "name" in values else text


def _short(name: str) -> str:
    """model.layers.3.mlp.up_proj -> 3.mlp.up_proj on a terminal, where columns are scarce; whole in a pipe."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[first:]) if stdout.is_terminal else name
