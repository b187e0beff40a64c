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
from bitquilt.cli.budgets import Allocation, Bits, Bpw, Ctx, Size, Vram, size_budget, split_allocation
from bitquilt.cli.options import (
    Device,
    EmbeddingBits,
    GroupSize,
    HeadBits,
    Model,
    Published,
    Samples,
    Seed,
    SeqLen,
    Settings,
    Skip,
)
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
from bitquilt.core.budget import Budget
from bitquilt.core.plan_file import PlanFile, read_plan
from bitquilt.errors import UserError
from bitquilt.recipes import RECIPES, own_allocations, takes_fractions, takes_option
from bitquilt.report.evaluation import fp16_bytes
from bitquilt.request import Wish, wish


def quantize(
    model: Model,
    out: Annotated[Path, Argument(metavar="OUT", help="Folder to write the quantized model to.")],
    recipe: Annotated[
        str | None,
        Option(
            "--recipe", "-r", help=f"How: {', '.join(RECIPES)} (default: slim-llm, or the plan's).", show_default=False
        ),
    ] = None,
    bits: Bits = None,
    bpw: Bpw = None,
    size: Size = None,
    vram: Vram = None,
    ctx: Ctx = None,
    allocation: Allocation = None,
    group_size: GroupSize = None,
    calibration: Annotated[
        str,
        Option(
            help="Text, jsonl, parquet, a folder of them, a hub data set, token ids; self: the model writes its own."
        ),
    ] = "self",
    samples: Samples = 128,
    self_samples: Annotated[
        int, Option(help="Beside the text, N sequences that the model writes itself.", metavar="N", show_default=False)
    ] = 0,
    seq_len: SeqLen = 2048,
    seed: Seed = 0,
    batch_size: Annotated[
        int | None, Option(help="Sequences per forward pass; speed and memory only.", show_default=False)
    ] = None,
    work_dir: Annotated[
        Path | None, Option(help="Where a run keeps what it needs to continue (default: OUT.work).", show_default=False)
    ] = None,
    skip: Skip = None,
    include_head: Annotated[
        bool, Option("--include-head", help="Quantize the layer that makes logits too (not where it is tied).")
    ] = False,
    embedding_bits: EmbeddingBits = None,
    head_bits: HeadBits = None,
    plan: Annotated[
        Path | None,
        Option(help="A plan.json that says where the bits go, by which recipe and settings.", show_default=False),
    ] = None,
    sensitivities: Annotated[
        Path | None, Option(help="What `bitquilt plan --measure` wrote; else it is measured first.", show_default=False)
    ] = None,
    device: Device = "cpu",
    rounds: Annotated[
        int, Option(help="2: measure again in the model quantized once, plan again; better, in twice the time.")
    ] = 1,
    effort: Annotated[
        str | None,
        Option(
            help="quilt, cmpq+: fast; normal, which trains each block; best, then the whole model (default: fast).",
            metavar="LEVEL",
        ),
    ] = None,
    published: Published = False,
    settings: Settings = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Quantize a model, block by block. Interrupted, the same command continues; finished, it says so."""
    budget = size_budget(bits, bpw, size, vram, ctx)
    asked = [*(settings or []), *([f"effort={effort}"] if effort is not None else [])]
    file = None if plan is None else read_plan(plan)
    wanted = chosen(recipe, bits, bpw, group_size, published, asked, allocation, budget, file)
    with calm(quiet), watching(quiet) as observer:
        try:
            result = run(
                model, wanted.recipe, calibration, out, samples=samples, self_samples=self_samples, seq_len=seq_len,
                seed=seed, batch_size=batch_size, work_dir=work_dir, skip=skip or [], include_head=include_head,
                embedding_bits=embedding_bits, head_bits=head_bits, plan=file, budget=wanted.budget,
                scope=wanted.scope if wanted.budget else None, sensitivities=sensitivities, rounds=rounds,
                device=device,
                observer=observer,
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


def chosen(
    recipe: str | None,
    bits: float | None,
    bpw: float | None,
    group_size: int | None,
    published: bool,
    settings: list[str],
    allocation: str | None,
    budget: Budget | None,
    plan: PlanFile | None = None,
) -> Wish:
    """Recipe, budget and scope from the flags, or from a plan where they leave it to that. Raises UserError for flags
    that do not go together."""
    name = recipe or ({} if plan is None else plan.recipe).get("name") or "slim-llm"
    fractions = takes_fractions(name)
    if group_size is not None and fractions and not takes_option(name, "group_size"):
        raise UserError(f"recipe {name} has no groups of columns to size; leave out --group-size")
    given = {"bits": bits, "bpw": bpw, "group_size": group_size, "published": published or None}
    whole = budget is not None or not (fractions or bpw is not None or (bits or 0.0).is_integer())
    split = split_allocation(allocation, own_allocations(name), whole)
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if "allocation" in split:
        options["allocation"] = split["allocation"]
    for setting in settings:
        key, value = parse_setting(setting)
        if key in options:
            raise UserError(f"{key} is given twice: --set {setting} repeats it; leave one out")
        options[key] = value
    if "name" in options:  # a recipe's name is no field of it
        raise UserError(f"recipe {name} has no option 'name'; choose the recipe with --recipe")
    return wish(name if plan is None else recipe, options, budget, split.get("scope"), plan)


def _as_json(result: Result) -> dict[str, Any]:
    report = result.report
    return {
        "out": str(result.folder),
        "already_done": result.already_done,
        "recipe": report["fingerprint"]["recipe"],
        "bpw": report["bpw"],
        "nominal_bits": report["nominal_bits"],
        "bytes": report["bytes"],
        "folder_bytes": report.get("folder_bytes"),
        "budget": report.get("budget"),
        "prediction": report.get("prediction"),
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
    if budget := report.get("budget"):
        shown = size_text if budget["kind"] in ("size", "vram") else "{:.6g}".format
        text = f"{budget['kind']} {shown(budget['target'])}, spent {shown(budget['spent'])}; the folder takes"
        print_fact(stdout, "budget", f"{text} {report['folder_bytes']} bytes")
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
