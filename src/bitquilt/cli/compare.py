"""`bitquilt compare DIR...`: quality against size of several checkpoints, and the Pareto front."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from bitquilt.cli.eval import keep_record, load_model, measure_text
from bitquilt.cli.options import Reference, WindowOptions
from bitquilt.cli.output import Json, Quiet, calm, plain_table, print_json, print_line, stderr, stdout
from bitquilt.core.units import percent_text, size_text
from bitquilt.data.calibration import describe_source
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import Checkpoint, open_checkpoint
from bitquilt.report import Facts, Record, compare, compare_page, describe_evaluation, read_facts
from bitquilt.report.page import check_target, write_page
from bitquilt.report.pareto import Panel


def compare_checkpoints(
    folders: Annotated[list[str], Argument(metavar="DIR...", help="Folders or hub ids of checkpoints by bitquilt.")],
    windows: WindowOptions,
    out: Annotated[Path, Option(metavar="FILE", help="Page to write, with a plot per text.")] = Path("compare.html"),
    text: Annotated[
        list[str] | None,
        Option(metavar="FILE", help="Compare on this text, and measure checkpoints without figures on it. Repeatable."),
    ] = None,
    reference: Reference = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Measure what is missing, write the page and print a table per protocol."""
    if not text and (reference is not None or windows != WindowOptions()):
        raise UserError("--reference, --seq-len, --stride and --max-tokens say how to measure; give --text FILE too")
    path = check_target(out)
    with calm(quiet):
        facts = [read_facts(folder) for folder in folders]
        _refuse_twice(facts)
        base = None if reference is None else open_checkpoint(reference)
        wanted: dict[str, None] = {}
        for source in text or ():
            for i, one in enumerate(facts):
                record = _kept(one, source, base, windows)
                if record is None:
                    record = _measure(one, source, base, windows, quiet)
                    facts[i] = replace(one, evaluations=[*one.evaluations, record])
                wanted.setdefault(record.protocol)
        panels = compare(facts, list(wanted) if text else None)
        write_page(path, compare_page(panels))
    if json_output:
        print_json({"out": str(path), "panels": [asdict(panel) for panel in panels]})
    elif not quiet:
        for panel in panels:
            _print(panel)
        print_line(stdout, f"page with the plots: {path}")


def _refuse_twice(facts: list[Facts]) -> None:
    folders = [one.checkpoint.folder.resolve() for one in facts]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise UserError(f"{facts[i].checkpoint.folder} is given twice; leave one out")


def _kept(one: Facts, text: str, base: Checkpoint | None, windows: WindowOptions) -> Record | None:
    """The checkpoint's own record of this measurement, the newest first."""
    content, against = describe_source(text).get("sha256"), "" if base is None else base.fingerprint()
    wanted = (content, against, asdict(windows), "")
    found = (
        r for r in reversed(one.evaluations) if (r.text.get("sha256"), r.reference_sha256, r.asked, r.dtype) == wanted
    )
    return next(found, None)


def _measure(one: Facts, text: str, base: Checkpoint | None, windows: WindowOptions, quiet: bool) -> Record:
    if not quiet:
        print_line(stderr, f"measuring {one.name} on {text}")
    figures = measure_text(load_model(one.checkpoint), text, base, windows, quiet=quiet)
    folder = str(one.checkpoint.folder)
    record = describe_evaluation(folder, figures, text=text, reference=base, asked=asdict(windows))
    keep_record(one.checkpoint, record)
    return record


def _print(panel: Panel) -> None:
    stdout.print(panel.protocol, style="bold", markup=False)
    figures, words = ("size", "bpw", "KL", "perplexity", "top-1"), ("checkpoint", "recipe")
    table = plain_table("", *words, *figures, "front", right=figures, wrap=words)
    for entry in panel.entries:
        table.add_row(
            entry.key,
            entry.name,
            entry.recipe,
            size_text(entry.bytes),
            f"{entry.bpw:.3f}",
            "" if entry.kl_mean is None else f"{entry.kl_mean:.4f}",
            "" if entry.perplexity is None else f"{entry.perplexity:.2f}",
            "" if entry.top1_agreement is None else percent_text(entry.top1_agreement),
            "yes" if entry.front else "",
        )
    stdout.print(table)
    if panel.reference_perplexity is not None:
        stdout.print(f"  reference: {panel.reference}, perplexity {panel.reference_perplexity:.2f}", markup=False)
    for note in panel.notes:
        stdout.print(f"  note: {note}", markup=False)
    if panel.missing:
        stdout.print(f"  not measured this way: {', '.join(panel.missing)}", markup=False)
