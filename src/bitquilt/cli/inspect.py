"""`bitquilt inspect DIR`: where did the bits go? Of a full-precision model: what would be quantized?"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from bitquilt.cli.output import Json, calm, print_fact, print_json, ratio_text, size_text, stdout, time_text
from bitquilt.cli.quantize import print_bits_and_size, print_events
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import Checkpoint, open_checkpoint
from bitquilt.model.config import QUANT_METHOD
from bitquilt.model.outline import open_outline
from bitquilt.planning.untouched import untouched_tensors
from bitquilt.recipes import usual_options
from bitquilt.report.evaluation import fp16_bytes, model_size
from bitquilt.report.facts import LayerFacts, items, read_facts, section
from bitquilt.report.remembered import Record, newest, number, protocol_text
from bitquilt.stream.job import all_targets

# From few bits, red, to many, blue: terminal colours of the digits 1 to 8.
_COLOURS = ("red", "red", "dark_orange", "yellow", "green", "cyan", "blue", "blue", "magenta")
# Characters of a layer's bar: at most one per group, at most these, at most what the terminal has room for.
_BAR, _LEAST_BAR = 48, 8
# Of report.json, as they stand there.
_OF_THE_RUN = ("untouched", "events", "budget", "prediction", "machine", "stages", "seconds", "peak_memory_bytes")
_GAP = 3  # between two columns of a table


def inspect(
    folder: Annotated[str, Argument(metavar="DIR", help="Model folder or hub id, quantized or not.")],
    layer: Annotated[
        str | None, Option(metavar="PATTERN", help="Only the layers whose path matches, such as '*.mlp.*'.")
    ] = None,
    bit_map: Annotated[
        bool, Option("--map", help="A line of digits per layer instead of the table: its bits from channel to channel.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Bits, size and error of every layer, and of the whole model."""
    with calm(models=False):
        checkpoint = open_checkpoint(folder)
        method = checkpoint.model_config.quantized_by
        if method is None:
            value = _plain(checkpoint)
        elif method == QUANT_METHOD:
            value = _quantized(checkpoint)
        else:
            raise UserError(
                f"{folder} was quantized by another tool ({method}); give one of bitquilt, or full precision"
            )
    if layer is not None:
        value["layers"] = _matching(value["layers"], layer)
    if json_output:
        print_json(value)
    elif value["quantized"]:
        _print_quantized(value, bit_map)
    else:
        _print_plain(value)


def _quantized(checkpoint: Checkpoint) -> dict[str, Any]:
    # save_pretrained() of a loaded model writes no report: then the layouts alone speak.
    facts = read_facts(checkpoint.folder)
    report, fingerprint = facts.report, section(facts.report, "fingerprint")
    return {
        "folder": str(checkpoint.folder),
        "quantized": True,
        "recipe": fingerprint.get("recipe"),
        "planned": bool(fingerprint.get("plan") or fingerprint.get("budget")),
        "calibration": fingerprint.get("calibration"),
        "seed": fingerprint.get("seed"),
        **asdict(facts.size),
        "ratio_to_fp16": facts.size.bytes / facts.fp16_bytes,
        "bytes_by_part": facts.parts,
        **{key: report.get(key) for key in _OF_THE_RUN},
        "evaluations": facts.evaluations,
        "absent": [asdict(one) for one in facts.absent],
        "layers": {name: _layer(layer) for name, layer in facts.layers.items()},
    }


def _layer(layer: LayerFacts) -> dict[str, Any]:
    """`bits`: how many column groups have so many; `groups`: one digit per group in column order, where known."""
    value = asdict(layer)
    return {
        "shape": [layer.out_features, layer.in_features],
        "bits": {str(bits): count for bits, count in layer.counts.items()},
        **{key: value[key] for key in ("groups", "group_size", "nominal_bits", "bpw", "outliers", "output_error")},
        "loudest_first": layer.loudest_first,
        **{key: value[key] for key in ("weight_error", "loss", "predicted_loss", "seconds")},
    }


def _plain(checkpoint: Checkpoint) -> dict[str, Any]:
    skeleton = open_outline(checkpoint)
    targets = all_targets(skeleton, (), include_head=False)
    untouched = untouched_tensors(skeleton, targets)
    stored = {name: checkpoint.tensors[source] for source, name in skeleton.parameters.items()}
    size = model_size(checkpoint.folder)
    layers = {}
    for name in targets:
        info = stored[f"{name}.weight"]
        layers[name] = {"shape": list(info.shape), "dtype": info.dtype, "bytes": info.nbytes}
    return {
        "folder": str(checkpoint.folder),
        "quantized": False,
        "model_class": type(skeleton.model).__name__,
        "blocks": len(skeleton.blocks),
        "bpw": None if size is None else size.bpw,
        "nominal_bits": None if size is None else size.nominal_bits,
        "bytes": checkpoint.nbytes,
        "ratio_to_fp16": checkpoint.nbytes / fp16_bytes(checkpoint.folder),
        "untouched": [asdict(item) for item in untouched],
        "layers": layers,
    }


def _matching(layers: dict[str, Any], pattern: str) -> dict[str, Any]:
    found = {name: value for name, value in layers.items() if fnmatch(name, pattern)}
    if not found:
        raise UserError(f"no layer matches {pattern!r}; there are {len(layers)}, such as {next(iter(layers))}")
    return found


def _print_quantized(value: dict[str, Any], bit_map: bool) -> None:
    if bit_map:
        _print_map(value["layers"])
    else:
        _print_layers(value["layers"])
    stdout.print(value["folder"], style="bold", markup=False)
    if value["recipe"]:
        text = _settings(_chosen(value["recipe"], value["planned"]))
        print_fact(stdout, "recipe", f"{text}; bits by a plan for the whole model" if value["planned"] else text)
    if value["calibration"]:
        print_fact(stdout, "data", f"{_settings(value['calibration'])}, seed={value['seed']}")
    _print_sparse(value["layers"])
    print_bits_and_size(value, value["ratio_to_fp16"])
    parts = ", ".join(f"{part} {size_text(count)}" for part, count in value["bytes_by_part"].items())
    print_fact(stdout, "bytes", parts)
    _print_budget(value)
    for record in value["evaluations"]:
        _print_evaluation(record)
    _print_untouched(items(value, "untouched"), value["bytes"])
    _print_run(value)
    if value["events"] is not None:
        print_events(items(value, "events"))


def _print_budget(value: dict[str, Any]) -> None:
    """What was asked for, and what was promised, where the run had a budget."""
    budget, prediction = section(value, "budget"), section(value, "prediction")
    if (target := number(budget.get("target"))) is not None:
        kind = str(budget.get("kind"))
        print_fact(stdout, "budget", f"{kind} {target:g}" if kind in ("bits", "bpw") else f"{kind} {size_text(target)}")
    if (kl := number(prediction.get("kl"))) is not None:
        best = newest(value["evaluations"])
        measured = None if best is None else number(best.get("kl_mean"))
        told = "" if measured is None else f", measured {measured:.4f}"
        print_fact(stdout, "promise", f"KL {kl:.4f} predicted{told}")


def _print_evaluation(record: Record) -> None:
    figures = {"KL": record.get("kl_mean"), "perplexity": record.get("perplexity")}
    said = [f"{name} {value:.4g}" for name, found in figures.items() if (value := number(found)) is not None]
    if (reference := number(record.get("reference_perplexity"))) is not None:
        said.append(f"the reference {reference:.4g}")
    if said:
        print_fact(stdout, "quality", f"{', '.join(said)} ({protocol_text(record)})")


def _print_run(value: dict[str, Any]) -> None:
    """Time and memory, and where most of the time went."""
    seconds, peak = number(section(value, "seconds").get("this_process")), number(value["peak_memory_bytes"])
    if seconds is None or peak is None:
        return
    cpu = section(value, "machine").get("cpu")
    print_fact(stdout, "run", f"{time_text(seconds)}, {size_text(peak)} of memory{f', on {cpu}' if cpu else ''}")


def _print_map(layers: dict[str, Any]) -> None:
    """`self_attn.q_proj 2223122`: as many digits as the line has room for."""
    names = [_short(name) for name in layers]
    indent = max(map(len, names)) + 2
    for name, layer in zip(names, layers.values(), strict=True):
        bar = group_bar(layer["groups"] or "", max(_LEAST_BAR, stdout.width - indent))
        stdout.print(Text.assemble(f"{name:<{indent}}", bar if layer["groups"] else "(order unknown)"), soft_wrap=True)
    blocks = "block of channels, the largest inputs first" if loudest_first(layers) else "column group"
    stdout.print(f"  a digit is the bits of a {blocks}; of neighbours, the mean, where there are more than room\n")


def loudest_first(layers: dict[str, Any]) -> bool:
    """Whether groups are counted in the order of their inputs' size."""
    return any(layer["loudest_first"] for layer in layers.values())


def _print_sparse(layers: dict[str, Any]) -> None:
    """How many weights stand beside the codes in half precision."""
    kept = sum(layer["outliers"] for layer in layers.values())
    if kept:
        share = kept / sum(layer["shape"][0] * layer["shape"][1] for layer in layers.values())
        print_fact(stdout, "sparse", f"{kept} outliers in half precision, {100 * share:.2g} % of the weights")


def _print_layers(layers: dict[str, Any]) -> None:
    rows = []
    for name, layer in layers.items():
        counts = "  ".join(f"{bits}: {count}" for bits, count in layer["bits"].items())
        error = "" if layer["output_error"] is None else f"{layer['output_error']:.5f}"
        rows.append([_short(name), _shape(layer), counts, f"{layer['bpw']:.3f}", error])
    single = any(layer["group_size"] == 1 for layer in layers.values())
    headers = ["layer", "out x in", f"bits: {'channels' if single else 'groups'}", "bpw", "error"]
    used = sum(max(len(row[i]) for row in [*rows, headers]) + _GAP for i in range(len(headers)))
    longest = max(len(layer["groups"] or "") for layer in layers.values())
    bar = min(longest, _BAR, stdout.width - used - _GAP) if stdout.is_terminal else 0
    if bar < min(longest, _LEAST_BAR):
        bar = 0
    table = _table(*headers[:3], *(["by column"] if bar else []), *headers[3:])
    for row, layer in zip(rows, layers.values(), strict=True):
        table.add_row(*row[:3], *([group_bar(layer["groups"] or "", bar)] if bar else []), *row[3:])
    stdout.print(table)
    if bar and longest > bar:
        stdout.print(f"  by column: of more than {bar} groups, a digit is the mean of neighbours\n")


def _print_plain(value: dict[str, Any]) -> None:
    table = _table("layer", "shape", "stored as", "size")
    for name, layer in value["layers"].items():
        table.add_row(_short(name), _shape(layer), layer["dtype"], size_text(layer["bytes"]))
    stdout.print(table)
    stdout.print(f"[bold]{escape(value['folder'])}[/]: {value['model_class']}, full precision")
    print_fact(stdout, "size", f"{size_text(value['bytes'])} ({ratio_text(value['ratio_to_fp16'])})")
    taken = sum(layer["bytes"] for layer in value["layers"].values())
    share = f"{100 * taken / value['bytes']:.2g} % of the bytes"
    print_fact(stdout, "to do", f"{share}: the layers listed ({len(value['layers'])}), in {value['blocks']} blocks")
    _print_untouched(value["untouched"], value["bytes"])


def group_bar(groups: str, length: int) -> Text:
    """One coloured digit per column group, in column order; of more than `length` groups a digit is a mean."""
    bar = Text(no_wrap=True)
    shown = min(len(groups), length)
    for i in range(shown):
        part = [int(digit) for digit in groups[i * len(groups) // shown : (i + 1) * len(groups) // shown]]
        mean = round(sum(part) / len(part))
        bar.append(str(mean), style=_COLOURS[mean])
    return bar


def _print_untouched(untouched: Iterable[dict[str, Any]], total: int) -> None:
    for item in untouched:
        share = f"{100 * item['nbytes'] / total:.2g} % of the bytes"
        example = "" if item["tensors"] == 1 else f"{item['tensors']} tensors, such as "
        print_fact(stdout, "as is", f"{share}, {item['reason']}: {example}{item['example']}")


def _chosen(recipe: dict[str, Any], planned: bool) -> dict[str, Any]:
    """Its size, and what differs from the recipe's defaults. `planned`: its own bits do not count."""
    recipe = {key: value for key, value in recipe.items() if not planned or key not in ("bits", "bpw", "allocation")}
    size: dict[str, Any] = {key: recipe[key] for key in ("bits", "bpw", "group_size") if key in recipe}
    usual = json.loads(json.dumps(usual_options(recipe.get("name", ""))))
    changed = {key: value for key, value in recipe.items() if key == "name" or value != usual.get(key, ...)}
    return {**size, **changed}


def _settings(values: dict[str, Any]) -> str:
    """Settings in one line; a hash says nothing to a reader, nor what is not set."""
    shown = {key: value for key, value in values.items() if key not in ("name", "sha256") and value is not None}
    text = ", ".join(f"{key}={Path(value).name if key == 'source' else value}" for key, value in shown.items())
    return f"{values['name']}: {text}" if "name" in values else text


def _shape(layer: dict[str, Any]) -> str:
    return "x".join(map(str, layer["shape"]))


def _short(name: str) -> str:
    """model.layers.3.mlp.up_proj -> 3.mlp.up_proj on a terminal, where columns are dear; whole in a pipe."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[first:]) if stdout.is_terminal else name


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        right = name in ("bpw", "error", "size")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    return table
