"""`bitquilt plan MODEL`: what would a budget buy? From headers alone; with --measure, what each bit is worth."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from rich import box
from rich.markup import escape
from rich.table import Table
from typer import Exit, Option

from bitquilt.cli.budgets import Allocation, Bits, Bpw, Ctx, Size, Vram, size_budget
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
from bitquilt.cli.output import Json, Quiet, calm, print_fact, print_json, size_text, stderr, stdout, time_text
from bitquilt.cli.progress import watching
from bitquilt.cli.quantize import chosen
from bitquilt.errors import UserError
from bitquilt.planning.forecast import Forecast
from bitquilt.planning.plan_model import measure_model
from bitquilt.planning.plan_model import plan as run
from bitquilt.planning.planner import UnreachableError
from bitquilt.recipes import RECIPES, own_allocations, takes_fractions

EXIT_DOES_NOT_FIT = 4
_SAMPLES, _SEQ_LEN = 128, 2048  # what `quantize` takes by itself


def plan(
    model: Model,
    recipe: Annotated[str, Option("--recipe", "-r", help=f"How: {', '.join(RECIPES)}.")] = "slim-llm",
    bits: Bits = None,
    bpw: Bpw = None,
    size: Size = None,
    vram: Vram = None,
    ctx: Ctx = None,
    allocation: Allocation = None,
    group_size: GroupSize = None,
    out: Annotated[
        Path | None, Option(help="Write the plan here, for `quantize --plan`.", metavar="FILE", show_default=False)
    ] = None,
    sensitivities: Annotated[
        Path | None,
        Option(
            help="What each width costs: read, or with --measure written (default: NAME-RECIPE.sensitivities here).",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[
        bool, Option("--measure", help="Measure what each width costs first; minutes, not seconds.")
    ] = False,
    calibration: Annotated[
        str,
        Option(help="For --measure, and to quantize: text, jsonl, parquet, a folder, a hub data set, token ids; self."),
    ] = "self",
    samples: Samples = _SAMPLES,
    seq_len: SeqLen = _SEQ_LEN,
    seed: Seed = 0,
    work_dir: Annotated[Path | None, Option(help="Where --measure swaps out.", show_default=False)] = None,
    device: Device = "cpu",
    skip: Skip = None,
    include_head: Annotated[bool, Option("--include-head", help="The layer that makes logits too.")] = False,
    embedding_bits: EmbeddingBits = None,
    head_bits: HeadBits = None,
    tie: Annotated[
        bool, Option("--tie", help="Layers that serving engines fuse (q, k, v; gate, up) get the same bits.")
    ] = False,
    published: Published = False,
    settings: Settings = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Say what a budget buys before anything is quantized. Exit code 0: it fits; 4: no plan is within the budget."""
    budget = size_budget(bits, bpw, size, vram, None if vram is None else ctx)
    if out is not None and not out.parent.is_dir():
        raise UserError(f"cannot write the plan to {out}: there is no folder {out.parent}")
    wanted = chosen(recipe, bits, bpw, group_size, published, settings or [], allocation, budget)
    path = sensitivities or Path(f"{Path(model).resolve().name}-{recipe}.sensitivities")
    with calm(quiet, models=measure):
        if measure:
            with watching(quiet) as observer:
                measure_model(
                    model, path, wanted.recipe, calibration, samples=samples, seq_len=seq_len, seed=seed,
                    skip=skip or [], include_head=include_head, work_dir=work_dir, device=device, observer=observer,
                )  # fmt: skip
        used = path if sensitivities is not None or path.is_file() else None

        def outlook(known: Path | None) -> Forecast:
            return run(
                model, wanted.recipe, budget=wanted.budget, scope=wanted.scope if wanted.budget else None,
                sensitivities=known, ctx=ctx, tie=tie, skip=skip or [], include_head=include_head,
                embedding_bits=embedding_bits, head_bits=head_bits, samples=samples, seq_len=seq_len,
            )  # fmt: skip

        try:
            try:
                found = outlook(used)
            except UserError as error:
                if used is None or sensitivities is not None or measure or isinstance(error, UnreachableError):
                    raise
                found = outlook(None)  # a file that nobody asked for; another mistake is raised again
                stderr.print(f"[yellow]{escape(str(path))} lies here but is not used:[/] {escape(str(error))}")
        except UnreachableError as error:
            if json_output:
                print_json(_refusal(model, error))
            else:
                stderr.print(f"[bold red]does not fit:[/] {escape(str(error))}")
            raise Exit(EXIT_DOES_NOT_FIT) from None
    if out is not None:
        try:
            out.write_text(json.dumps(found.plan_json(), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write the plan to {out}: {error.strerror}") from None
    if json_output:
        print_json(found.summary)
    elif not quiet:
        again = {
            "--calibration": None if calibration == "self" else calibration,
            "--samples": None if samples == _SAMPLES else samples,
            "--seq-len": None if seq_len == _SEQ_LEN else seq_len,
            "--seed": seed or None,
            "--device": None if device == "cpu" else device,
        }
        then = ["bitquilt", "quantize", model, "OUT", "--plan", str(out)]
        then += [str(part) for flag, given in again.items() if given is not None for part in (flag, given)]
        then += [part for pattern in skip or () for part in ("--skip", pattern)]
        then += ["--include-head"] if include_head else []
        _print(found, None if out is None else shlex.join(then))


def _refusal(model: str, error: UnreachableError) -> dict[str, Any]:
    """`reachable` in the unit of the budget, `reachable_bytes` of the whole folder, as where a plan fits."""
    return {
        "model": model,
        "budget": asdict(error.budget),
        "fits": False,
        "reachable": list(error.reach),
        "reachable_bytes": [int(value) for value in error.reach_bytes],
        "error": str(error),
    }


def _print(found: Forecast, then: str | None) -> None:
    """`then`: the command that quantizes by the plan that was written."""
    value = found.summary
    shown = value["layers"].values()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    single = any(sum(layer["bits"].values()) == layer["shape"][1] for layer in shown)
    counted = "channels" if single else "groups"
    for name in ("layer", "out x in", f"bits: {counted}", "bpw", "size", "predicted loss"):
        table.add_column(name, justify="right" if name in ("bpw", "size", "predicted loss") else "left", no_wrap=True)
    for name, layer in value["layers"].items():
        counts = "  ".join(f"{bits}: {count}" for bits, count in layer["bits"].items())
        loss = "" if layer["predicted_loss"] is None else f"{layer['predicted_loss']:.2g}"
        shape = "x".join(map(str, layer["shape"]))
        table.add_row(name, shape, counts, f"{layer['bpw']:.3f}", size_text(layer["bytes"]), loss)
    stdout.print(table)
    stdout.print(value["model"], style="bold", markup=False)
    if value["budget"]:
        spent = value["budget"]["spent"]
        print_fact(stdout, "budget", f"{found.wish.budget}, spent {spent:.10g}, {found.planned.scope} allocation")
    print_fact(stdout, "bits", f"{value['nominal_bits']:.3g} nominal, {value['bpw']:.3f} true per weight")
    print_fact(stdout, "size", f"{value['bytes']} bytes ({size_text(value['bytes'])}) in the whole folder")
    least, most = value["reachable_bytes"]
    print_fact(stdout, "reach", f"{least} to {most} bytes ({size_text(least)} to {size_text(most)}) with this recipe")
    memory = value["memory"]
    parts = ", ".join(f"{key} {size_text(memory[key])}" for key in ("weights", "cache", "workspace"))
    print_fact(stdout, "memory", f"{size_text(memory['total'])} to run it with {memory['ctx']} tokens: {parts}")
    todo = value["estimate"]
    needed = f"about {time_text(todo['seconds'])} and {size_text(todo['peak_memory_bytes'])} of memory"
    training = f", {size_text(todo['training_bytes'])} of it to train (with --device there)"
    print_fact(stdout, "to do", f"{needed} to quantize here{training if todo['training_bytes'] else ''}")
    if value["prediction"]:
        _print_prediction(value["prediction"])
    else:
        print_fact(stdout, "worth", _unmeasured(found))
    for item in value["untouched"]:
        print_fact(stdout, "as is", f"{size_text(item['nbytes'])}, {item['reason']}: such as {item['example']}")
    for title, taken in value["permits"].items():
        why = f"; {taken['why_not']}" if taken["why_not"] else ""
        print_fact(stdout, "permits", f"{title}: {taken['layers']} of {taken['of']} layers{why}")
    if then is not None:
        stdout.print(f"  [cyan]{escape(then)}[/]", soft_wrap=True)


def _unmeasured(found: Forecast) -> str:
    """Who gives the bits out, where this plan only says what they take."""
    name = found.wish.recipe.name
    if found.wish.budget is not None:
        return (
            "not measured, so the bits are shared out evenly, for the size alone: --measure tells what each is worth "
            "(`quantize` with a budget does so first, with a plan it does not)"
        )
    if own_allocations(name) or takes_fractions(name):
        return f"the bits are shared out evenly here, for the size alone; `quantize` gives them out as {name} does"
    return "every layer gets the same; a budget (--size, --bpw) goes where a bit is worth most: --measure"


def _print_prediction(prediction: dict[str, Any]) -> None:
    text = f"KL about {prediction['kl']:.3g} nats per token"
    if prediction.get("ppl_range"):
        low, high = prediction["ppl_range"]
        text += f"; perplexity {low:.4g} to {high:.4g}, in full precision {prediction['perplexity_full_precision']:.4g}"
        text += ", on the calibration text"
    if without := prediction.get("without"):
        text += f"; without {without}"
    print_fact(stdout, "loss", text)
