"""`bitquilt plan MODEL`: what a budget buys, from headers alone; with --measure also what each bit is worth."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.markup import escape
from typer import Exit, Option

from bitquilt.cli.options import (
    Asked,
    BudgetOptions,
    CalibrationOptions,
    Device,
    LayerOptions,
    Model,
    RecipeOptions,
    read_flags,
)
from bitquilt.cli.output import Json, Quiet, calm, plain_table, print_commands, print_fact, print_json, stderr, stdout
from bitquilt.cli.progress import watching
from bitquilt.core.units import size_text, time_text
from bitquilt.engines.known import ENGINES
from bitquilt.errors import UserError
from bitquilt.planning.contents import contents_text
from bitquilt.planning.forecast import Forecast
from bitquilt.planning.plan_model import measure_model
from bitquilt.planning.plan_model import plan as run
from bitquilt.planning.planner import UnreachableError

EXIT_DOES_NOT_FIT = 4
# A table of so many bits per weight that takes such a share of the folder is pointed out; `_FEW`: of 6-bit codes.
_WIDE, _LARGE, _FEW = 15.0, 0.1, 6.5


@dataclass(frozen=True)
class _Question:
    """What is planned, from the flags."""

    model: str
    asked: Asked
    layers: LayerOptions
    data: CalibrationOptions
    ctx: int | None
    tie: bool
    device: str

    def outlook(self, sensitivities: Path | None) -> Forecast:
        """Plan with these sensitivities, or without."""
        wish = self.asked.wish
        return run(
            self.model,
            wish.recipe,
            budget=wish.budget,
            scope=wish.scope if wish.budget else None,
            sensitivities=sensitivities,
            ctx=self.ctx,
            tie=self.tie,
            engine=wish.engine,
            samples=self.data.samples,
            seq_len=self.data.seq_len,
            **(asdict(self.layers) | {"skip": self.layers.skip or ()}),
        )

    def command(self, plan: Path) -> str:
        """The command that quantizes by the plan."""
        usual = CalibrationOptions()
        given = {
            f"--{name.replace('_', '-')}": value
            for name, value in asdict(self.data).items()
            if value != getattr(usual, name) and not isinstance(value, bool)
        }
        given |= {} if self.device == "cpu" else {"--device": self.device}
        words = ["bitquilt", "quantize", self.model, "OUT", "--plan", str(plan)]
        words += [str(word) for pair in given.items() for word in pair]
        words += [word for pattern in self.layers.skip or () for word in ("--skip", pattern)]
        words += [] if self.layers.blocks is None else ["--blocks", self.layers.blocks]
        words += [] if self.data.bos else ["--no-bos"]
        return shlex.join([*words, *(["--include-head"] if self.layers.include_head else [])])


def plan(
    model: Model,
    recipe: RecipeOptions,
    budget: BudgetOptions,
    layers: LayerOptions,
    data: CalibrationOptions,
    out: Annotated[Path | None, Option(metavar="FILE", help="Write the plan here, for `quantize --plan`.")] = None,
    measure: Annotated[bool, Option("--measure", help="Measure first what each width costs. Takes minutes.")] = False,
    sensitivities: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="What each width costs, from --measure. Default: NAME-RECIPE.sensitivities here.",
        ),
    ] = None,
    work_dir: Annotated[Path | None, Option(help="Folder for temporary files of --measure.")] = None,
    tie: Annotated[
        bool, Option("--tie", help="Give layers that serving engines fuse (q, k, v; gate, up) the same bits.")
    ] = False,
    every_layer: Annotated[bool, Option("--layers", help="List every layer with its bits.")] = False,
    device: Device = "cpu",
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Plan, optionally after measuring, and print the outlook."""
    limits = budget if budget.vram is not None else BudgetOptions(**(asdict(budget) | {"ctx": None}))
    question = _Question(model, read_flags(recipe, limits), layers, data, budget.ctx, tie, device)
    if out is not None and not out.parent.is_dir():
        raise UserError(f"cannot write the plan to {out}: there is no folder {out.parent}; create it")
    wish = question.asked.wish
    path = sensitivities or Path(f"{Path(model).resolve().name}-{wish.recipe.name}.sensitivities")
    with calm(quiet, models=measure):
        if measure:
            chosen = {name: getattr(layers, name) for name in ("include_head", "blocks")}
            measured = asdict(data) | {"skip": layers.skip or (), **chosen}
            with watching(quiet) as observer:
                measure_model(model, path, wish.recipe, work_dir=work_dir, device=device, observer=observer, **measured)
        try:
            found = _outlook(question, path, required=measure or sensitivities is not None)
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
            raise UserError(f"cannot write the plan to {out}: {error.strerror}; give another --out") from None
    if json_output:
        print_json(found.summary)
    elif not quiet:
        _print_summary(found)
        if every_layer:
            _print_layers(found.summary["layers"])
        if out is not None:
            print_commands([question.command(out)])


def _outlook(question: _Question, path: Path, *, required: bool) -> Forecast:
    """Plan with the sensitivities in `path`. A file that the user did not name is ignored if it does not fit."""
    if not required and not path.is_file():
        return question.outlook(None)
    try:
        return question.outlook(path)
    except UserError as error:
        if required or isinstance(error, UnreachableError):
            raise
        found = question.outlook(None)  # any other mistake is raised again
        stderr.print(f"[yellow]{escape(str(path))} is here but not used:[/] {escape(str(error))}")
        return found


def _refusal(model: str, error: UnreachableError) -> dict[str, Any]:
    """The JSON for a budget that does not fit: `reachable` in its unit, `reachable_bytes` of the whole folder."""
    return {
        "model": model,
        "budget": asdict(error.budget),
        "fits": False,
        "reachable": list(error.reach),
        "reachable_bytes": [int(value) for value in error.reach_bytes],
        "error": str(error),
    }


def _print_layers(layers: Mapping[str, Mapping[str, Any]]) -> None:
    single = any(sum(layer["bits"].values()) == layer["shape"][1] for layer in layers.values())
    counted = f"bits: {'channels' if single else 'groups'}"
    figures = ("bpw", "size", "predicted loss")
    table = plain_table("layer", "out x in", counted, *figures, right=figures)
    for name, layer in layers.items():
        counts = "  ".join(f"{bits}: {count}" for bits, count in layer["bits"].items())
        loss = "" if layer["predicted_loss"] is None else f"{layer['predicted_loss']:.2g}"
        shape = "x".join(map(str, layer["shape"]))
        table.add_row(name, shape, counts, f"{layer['bpw']:.3f}", size_text(layer["bytes"]), loss)
    stdout.print(table)


def _print_summary(found: Forecast) -> None:
    value = found.summary
    stdout.print(value["model"], style="bold", markup=False)
    if value["budget"]:
        spent = value["budget"]["spent"]
        print_fact(stdout, "budget", f"{found.wish.budget}, {spent:.10g} spent, {found.planned.scope} allocation")
    size = f"{value['bytes']} bytes ({size_text(value['bytes'])}) in the whole folder"
    print_fact(stdout, "size", f"{size}, {value['bits_per_parameter']:.3g} bits per parameter")
    print_fact(stdout, "holds", contents_text(found.contents, value["bytes"]))
    if hint := _embedding_hint(found):
        print_fact(stdout, "embedding", hint)
    bits = f"{value['nominal_bits']:.3g} nominal, {value['bpw']:.3f} true per weight"
    print_fact(stdout, "bits", f"{bits} of the layers and tables that are quantized")
    if found.planned.exported_bytes is not None:
        exported, engine = found.planned.exported_bytes, ENGINES[str(found.wish.engine)].title
        print_fact(stdout, "exported", f"{exported} bytes ({size_text(exported)}) in the folder for {engine}")
    least, most = value["reachable_bytes"]
    print_fact(stdout, "reachable", f"{least} to {most} bytes ({size_text(least)} to {size_text(most)}) by this recipe")
    memory, work = value["memory"], value["estimate"]
    parts = ", ".join(f"{key} {size_text(memory[key])}" for key in ("weights", "cache", "workspace"))
    print_fact(stdout, "to run", f"{size_text(memory['total'])} of memory with {memory['ctx']} tokens: {parts}")
    needed = f"about {time_text(work['seconds'])} and {size_text(work['peak_memory_bytes'])} of memory here"
    training = f", {size_text(work['training_bytes'])} of it for training on --device"
    print_fact(stdout, "to quantize", f"{needed}{training if work['training_bytes'] else ''}")
    if value["prediction"]:
        _print_prediction(value["prediction"])
    else:
        print_fact(stdout, "allocation", _unmeasured(found))
    for item in found.untouched:
        print_fact(stdout, "unchanged", f"{size_text(item.nbytes)}, {item.reason}, such as {item.example}")
    for title, taken in value["permits"].items():
        why = f"; {taken['why_not']}" if taken["why_not"] else ""
        print_fact(stdout, "supported", f"{title}: {taken['layers']} of {taken['of']} layers{why}")


def _embedding_hint(found: Forecast) -> str | None:
    """What fewer bits for a large embedding or head would buy."""
    tables = [one for one in found.contents if one.part.startswith(("embedding", "head"))]
    for one in tables:
        if one.bits is not None and one.bits >= _WIDE and one.nbytes >= _LARGE * found.planned.size.total:
            less = size_text(int(one.nbytes - one.weights * _FEW / 8))
            flag = "--head-bits 6" if one.part == "head" else "--embedding-bits 6"
            return (
                f"{one.nbytes / found.planned.size.total:.0%} of the folder at {one.bits:.3g} bits; a budget (--size, "
                f"--total-bpw) shares its bits with the layers, {flag} takes {less} less"
            )
    return None


def _unmeasured(found: Forecast) -> str:
    """How bits are allocated where nothing was measured, and whether `quantize` takes the same bytes."""
    name = found.wish.recipe.name
    if found.exact and found.wish.budget is not None:
        return "exact: the same bits in every layer, as in `quantize` with the same settings"
    if found.wish.budget is not None:
        return (
            f"not exact: `quantize` measures first, then takes at most {found.wish.budget}, which is the bound. The "
            "figures above take all layers for equally sensitive, as does this plan. Add --measure to this command for "
            "exact figures; `quantize --sensitivities FILE` then makes the same plan, `quantize --plan` follows a plan"
        )
    if not found.exact:
        return (
            "not exact: the figures above are for even bits in all layers, as in this plan. `quantize` allocates by "
            f"the rule of {name} and takes at most {found.own_rule_bytes} bytes, which is the bound. For exact figures "
            "add --allocation global and --measure; `quantize --plan` then follows the plan"
        )
    return "the same bits in every layer; a budget (--size, --bpw) with --measure puts them where they are worth most"


def _print_prediction(prediction: Mapping[str, Any]) -> None:
    text = f"KL about {prediction['kl']:.3g} nats per token"
    if prediction.get("ppl_range"):
        low, high = prediction["ppl_range"]
        full = prediction["perplexity_full_precision"]
        text += f"; perplexity {low:.4g} to {high:.4g} on the calibration text, {full:.4g} in full precision"
    if without := prediction.get("without"):
        text += f"; excluding {without}"
    print_fact(stdout, "prediction", text)
