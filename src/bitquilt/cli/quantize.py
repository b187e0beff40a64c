"""`bitquilt quantize MODEL OUT`: from a checkpoint to a smaller checkpoint."""

import ast
import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from rich.markup import escape
from typer import Argument, Option

from bitquilt.api import Result
from bitquilt.api import quantize as run
from bitquilt.cli.allocators import print_allocators
from bitquilt.cli.output import (
    Json,
    Quiet,
    calm,
    print_fact,
    print_json,
    ratio_text,
    size_text,
    stderr,
    stdout,
    time_text,
)
from bitquilt.cli.progress import watching
from bitquilt.errors import UserError
from bitquilt.evaluation import fp16_bytes
from bitquilt.recipes import MAX_TARGET_BITS, MIN_TARGET_BITS, RECIPES, make_recipe, takes_fractions, takes_option
from bitquilt.types import Recipe


def quantize(
    model: Annotated[str, Argument(metavar="MODEL", help="Folder of a Hugging Face model, or its hub id (org/name).")],
    out: Annotated[Path, Argument(metavar="OUT", help="Folder to write the quantized model to.")],
    recipe: Annotated[str, Option("--recipe", "-r", help=f"How: {', '.join(RECIPES)}.")] = "slim-llm",
    bits: Annotated[
        float | None,
        Option(
            help="Mean bits per code, 2 to 8; most mixed recipes take fractions (default: the recipe's).",
            metavar="N",
        ),
    ] = None,
    bpw: Annotated[
        float | None,
        Option(help="cmpq: true bits per weight, everything stored included, instead of --bits.", metavar="N"),
    ] = None,
    group_size: Annotated[
        int | None, Option(help="Input channels per scale, a multiple of 8 (default: the recipe's).")
    ] = None,
    calibration: Annotated[
        str,
        Option(
            help="Text, jsonl, parquet, a folder of them, a hub data set, token ids; self: the model writes its own."
        ),
    ] = "self",
    samples: Annotated[int, Option(help="Calibration sequences.")] = 128,
    seq_len: Annotated[int, Option(help="Tokens per calibration sequence.")] = 2048,
    seed: Annotated[int, Option(help="Of everything that is drawn at random.")] = 0,
    batch_size: Annotated[
        int | None, Option(help="Sequences per forward pass; speed and memory only.", show_default=False)
    ] = None,
    work_dir: Annotated[
        Path | None, Option(help="Where a run keeps what it needs to continue (default: OUT.work).", show_default=False)
    ] = None,
    skip: Annotated[
        list[str] | None,
        Option(metavar="PATTERN", help="Leave these layers alone, such as '*.down_proj'; repeatable."),
    ] = None,
    include_head: Annotated[
        bool, Option("--include-head", help="Quantize the layer that makes logits too (not where it is tied).")
    ] = False,
    plan: Annotated[Path | None, Option(help="A plan.json that says where the bits go.", show_default=False)] = None,
    published: Annotated[bool, Option("--published", help="The settings of the public implementation.")] = False,
    settings: Annotated[
        list[str] | None, Option("--set", metavar="NAME=VALUE", help="Any other field of the recipe; repeatable.")
    ] = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Quantize a model, block by block. Interrupted, the same command continues; finished, it says so."""
    chosen = _recipe(recipe, bits, bpw, group_size, published, settings or [])
    with calm(quiet), watching(quiet) as observer:
        try:
            result = run(
                model, chosen, calibration, out, samples=samples, seq_len=seq_len, seed=seed, batch_size=batch_size,
                work_dir=work_dir, skip=skip or [], include_head=include_head, plan=plan, observer=observer,
            )  # fmt: skip
        except KeyboardInterrupt:
            stderr.print("interrupted: finished blocks are kept, the same command continues after them")
            raise
    if json_output:
        print_json(_as_json(result))
    elif not quiet:
        _summarize(result, model)


def parse_setting(text: str) -> tuple[str, Any]:
    """ "damp=0.05" -> ("damp", 0.05): the value as JSON or a Python literal where it is one, else as it stands."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise UserError(f"--set {text!r} is not NAME=VALUE; wanted such as --set damp=0.05")
    for parse in (json.loads, ast.literal_eval):
        try:
            return name.strip(), parse(value)
        except (ValueError, SyntaxError):
            continue
    return name.strip(), value


def _recipe(
    name: str,
    bits: float | None,
    bpw: float | None,
    group_size: int | None,
    published: bool,
    settings: list[str],
) -> Recipe:
    fractions = takes_fractions(name)
    if bits is not None and not fractions and not bits.is_integer():
        raise UserError(
            f"bits is {bits:g}; recipe {name} takes a whole number from {MIN_TARGET_BITS} to {MAX_TARGET_BITS}: "
            "fractions come from mixing, and its mean stays whole; recipe cmpq takes fractions"
        )
    if bpw is not None and name in RECIPES and not takes_option(name, "bpw"):
        raise UserError(f"recipe {name} cannot aim at {bpw:g} true bits per weight; --bpw goes with cmpq")
    if group_size is not None and fractions and not takes_option(name, "group_size"):
        raise UserError(f"recipe {name} has no groups of columns to size; leave out --group-size")
    whole = bits if bits is None or fractions else int(bits)
    given = {"bits": whole, "bpw": bpw, "group_size": group_size, "published": published or None}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    for setting in settings:
        key, value = parse_setting(setting)
        if key in options:
            raise UserError(f"{key} is given twice: --set {setting} repeats it; leave one out")
        options[key] = value
    if "name" in options:  # a recipe's name is no field of it
        raise UserError(f"recipe {name} has no option 'name'; choose the recipe with --recipe")
    return make_recipe(name, **options)


def _as_json(result: Result) -> dict[str, Any]:
    report = result.report
    return {
        "out": str(result.folder),
        "already_done": result.already_done,
        "recipe": report["fingerprint"]["recipe"],
        "bpw": report["bpw"],
        "nominal_bits": report["nominal_bits"],
        "bytes": report["bytes"],
        "ratio_to_fp16": report["bytes"] / fp16_bytes(result.folder),
        "seconds": report["seconds"]["this_process"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "logit_difference": report["logit_difference"],
        "untouched": report["untouched"],
        "events": report["events"],
    }


def _summarize(result: Result, model: str) -> None:
    report, folder = result.report, shlex.quote(str(result.folder))
    if result.already_done:
        stdout.print(f"[bold]{escape(str(result.folder))}[/] is finished already, by the same settings: nothing to do")
    else:
        seconds = time_text(report["seconds"]["this_process"])
        stdout.print(f"[bold green]done[/] in {seconds}: [bold]{escape(str(result.folder))}[/]")
    print_bits_and_size(report, report["bytes"] / fp16_bytes(result.folder))
    print_allocators(report)
    print_events(report["events"])
    commands = {
        "look": f"bitquilt inspect {folder}",
        "measure": f"bitquilt eval {folder} --reference {shlex.quote(model)} --text FILE",
        "write": f"bitquilt generate {folder} --prompt 'Once upon a time'",
    }
    for verb, command in commands.items():
        stdout.print(f"  {verb:<7} [cyan]{escape(command)}[/]", soft_wrap=True)


def print_bits_and_size(report: dict[str, Any], ratio: float) -> None:
    """The two figures that count, each with what it is measured against."""
    print_fact(stdout, "bits", f"{report['nominal_bits']:.3g} nominal, {report['bpw']:.3f} true per weight")
    print_fact(stdout, "size", f"{size_text(report['bytes'])} on disk ({ratio_text(ratio)})")


def print_events(events: list[dict[str, Any]]) -> None:
    """Fallbacks and oddities by kind, with an example of each: never silent, never a flood."""
    if not events:
        print_fact(stdout, "events", "none: no fallback was needed")
        return
    for kind, count in Counter(event["kind"] for event in events).most_common():
        example = next(event for event in events if event["kind"] == kind)
        text = f"{count} x {kind}, such as {example['layer']}: {example['detail']}"
        print_fact(stdout, "events", text, style="yellow")
