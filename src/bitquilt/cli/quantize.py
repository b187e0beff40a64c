"""`bitquilt quantize MODEL OUT`: from a checkpoint to a smaller checkpoint."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from bitquilt.cli.options import (
    BudgetOptions,
    CalibrationOptions,
    Device,
    LayerOptions,
    Model,
    RecipeOptions,
    read_flags,
)
from bitquilt.cli.output import Json, Quiet, calm, print_commands, print_fact, print_json, stderr, stdout
from bitquilt.cli.progress import watching
from bitquilt.core.plan_file import read_plan
from bitquilt.core.types import Event
from bitquilt.core.units import ratio_text, size_text, time_text
from bitquilt.report.facts import Facts, read_facts
from bitquilt.report.page_values import allocator_totals, events_of
from bitquilt.report.run_facts import number, section, string
from bitquilt.request import Request, Result, wish
from bitquilt.run import run
from bitquilt.stream.devices import choose_device


def quantize(
    model: Model,
    out: Annotated[Path, Argument(metavar="OUT", help="Folder to write the quantized model to.")],
    recipe: RecipeOptions,
    budget: BudgetOptions,
    layers: LayerOptions,
    data: CalibrationOptions,
    self_samples: Annotated[
        int, Option(metavar="N", help="Add N sequences that the model writes itself.", rich_help_panel="Calibration")
    ] = 0,
    plan: Annotated[Path | None, Option(help="Follow this plan.json: its recipe, settings and bits.")] = None,
    sensitivities: Annotated[
        Path | None, Option(help="Read the file that `bitquilt plan --measure` wrote instead of measuring.")
    ] = None,
    rounds: Annotated[
        int, Option(help="2: quantize, measure again in the quantized model, then plan and quantize again.")
    ] = 1,
    device: Device = "cpu",
    batch_size: Annotated[int | None, Option(help="Sequences per forward pass; affects speed and memory only.")] = None,
    work_dir: Annotated[Path | None, Option(help="Folder for what a run needs to continue. Default: OUT.work.")] = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Make a request of the flags, run it, then print a summary."""
    asked = read_flags(recipe, budget, by_plan=plan is not None)
    with calm(quiet), watching(quiet) as observer:
        where, followed = choose_device(device), None if plan is None else read_plan(plan)
        request = Request(
            model=model,
            wish=wish(asked.recipe, asked.options, asked.budget, asked.scope, followed, asked.engine),
            calibration=data.read(self_samples),
            selection=layers.read(),
            out=out,
            sensitivities=sensitivities,
            rounds=rounds,
            batch_size=batch_size,
            work_dir=work_dir,
            device=where,
        )
        try:
            result = run(request, observer)
        except KeyboardInterrupt:
            stderr.print("interrupted: finished blocks are kept; run the same command to continue")
            raise
        facts = read_facts(result.folder)
    if json_output:
        print_json(_as_json(result, facts))
    elif not quiet:
        _summarize(result, facts, model)


def _as_json(result: Result, facts: Facts) -> dict[str, Any]:
    stored = facts.run.stored
    kept = ("budget", "prediction", "peak_memory_bytes", "logit_difference", "untouched", "events", "folder_bytes")
    return {
        "out": str(result.folder),
        "already_done": result.already_done,
        "recipe": facts.run.recipe,
        **asdict(facts.size),
        "ratio_to_fp16": facts.ratio,
        "source": section(facts.run.model, "source") or None,
        "seconds": facts.run.seconds.this_process,
        **{key: stored.get(key) for key in kept},
    }


def _summarize(result: Result, facts: Facts, model: str) -> None:
    seconds = facts.run.seconds.this_process or 0.0
    done = "finished already with the same settings" if result.already_done else f"finished in {time_text(seconds)}"
    stdout.print(str(result.folder), style="bold", markup=False, end="", soft_wrap=True)
    stdout.print(f": {done}")
    print_bits_and_size(facts)
    print_source(section(facts.run.model, "source"))
    print_budget(facts)
    for kind, totals in allocator_totals(facts.run).items():
        shown = ", ".join(f"{name} {value:.5g}" for name, value in totals.items())
        print_fact(stdout, "allocators", f"{kind}: {shown}")
    print_events(facts.run.events)
    folder, source = shlex.quote(str(result.folder)), shlex.quote(model)
    engine = section(facts.run.stored, "fingerprint").get("engine")
    print_commands(
        [
            *([f"bitquilt export {folder} {folder}-{engine} --to {engine}"] if engine else []),
            f"bitquilt inspect {folder}",
            f"bitquilt eval {folder} --reference {source} --text FILE",
            f"bitquilt generate {folder} --prompt 'Once upon a time'",
        ]
    )


def print_bits_and_size(facts: Facts) -> None:
    """Print the figures that count, each with its measure."""
    bits = f"{facts.size.nominal_bits:.3g} nominal, {facts.size.bpw:.3f} true per weight"
    print_fact(stdout, "bits", f"{bits} of the layers and tables that are quantized")
    print_fact(stdout, "size", f"{size_text(facts.size.bytes)} of weights ({ratio_text(facts.ratio)})")
    if facts.run.folder_bytes is not None:
        each = 16 * facts.run.folder_bytes / facts.fp16_bytes
        print_fact(stdout, "folder", f"{size_text(facts.run.folder_bytes)} in all, {each:.3g} bits per parameter")


def print_source(source: Mapping[str, Any]) -> None:
    """Print how another tool had quantized the model, if one had."""
    bits = number(source.get("bits_per_weight"))
    if bits is not None:
        what = f"{string(source.get('format'))}, {bits:.3f} true bits per weight: its losses are in the model too"
        print_fact(stdout, "source", what)


def print_budget(facts: Facts) -> None:
    """Print the run's budget and what was spent of it, if it had one."""
    budget = facts.run.budget
    if budget.target is None:
        return
    say = size_text if budget.in_bytes else "{:.6g}".format
    spent = "" if budget.spent is None else f", {say(budget.spent)} spent"
    folder = "" if facts.run.folder_bytes is None else f"; the folder takes {facts.run.folder_bytes} bytes"
    print_fact(stdout, "budget", f"{budget.kind} {say(budget.target)}{spent}{folder}")


def print_events(events: Sequence[Event]) -> None:
    """Print fallbacks and oddities by kind, each with an example: never silent, never a flood."""
    for found in events_of(events):
        example = found.examples[0]
        text = f"{found.number} x {found.kind}, such as {example.layer}: {example.detail}"
        print_fact(stdout, "events", text, style="yellow")
    if not events:
        print_fact(stdout, "events", "none: no fallback was needed")
