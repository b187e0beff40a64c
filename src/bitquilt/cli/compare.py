"""`bitquilt compare DIR...`: which checkpoint gives the most quality for its bytes?"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from rich import box
from rich.markup import escape
from rich.table import Table
from typer import Argument, Option

from bitquilt.cli.output import Json, Quiet, calm, print_json, size_text, stderr, stdout
from bitquilt.cli.pages import check_target, write_page
from bitquilt.cli.progress import scoring
from bitquilt.data.calibration import describe_source, load_tokenizer
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.report import Facts, compare, compare_page, describe_evaluation, read_facts, remember
from bitquilt.report.evaluation import evaluate
from bitquilt.report.evaluation.loading import as_model
from bitquilt.report.facts import section
from bitquilt.report.pareto import Panel
from bitquilt.report.remembered import Record, protocol


def compare_checkpoints(
    folders: Annotated[list[str], Argument(metavar="DIR...", help="Checkpoints of bitquilt: folders or hub ids.")],
    out: Annotated[Path, Option(metavar="FILE", help="The page with the plots.")] = Path("compare.html"),
    text: Annotated[
        list[str] | None,
        Option(metavar="FILE", help="Measure on this text whatever was not measured on it yet; repeatable."),
    ] = None,
    reference: Annotated[
        str | None, Option(metavar="BASE", help="The full-precision model, for the divergence from it.")
    ] = None,
    seq_len: Annotated[
        int | None, Option(help="Tokens per window (default: the model's context, at most 2048).", show_default=False)
    ] = None,
    stride: Annotated[int | None, Option(help="Windows overlap: a new one every so many tokens.")] = None,
    max_tokens: Annotated[int | None, Option(help="Read only the first tokens of a text.")] = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Quality against size with the Pareto front: a page, and a table here. Figures are those that eval remembered."""
    if not text and any(value is not None for value in (reference, seq_len, stride, max_tokens)):
        raise UserError("--reference, --seq-len, --stride and --max-tokens say how to measure; give --text FILE too")
    path = check_target(out)
    with calm(quiet):
        facts = [read_facts(folder) for folder in folders]
        _refuse_twice(facts)
        wanted: dict[str, None] = {}
        for source in text or ():
            for i, one in enumerate(facts):
                record = _measured(one, source, reference, seq_len, stride, max_tokens, quiet)
                facts[i] = one if record in one.evaluations else _with(one, record)
                wanted.setdefault(protocol(record))
        panels = compare(facts, list(wanted) if text else None)
        write_page(path, compare_page(panels))
    if json_output:
        print_json({"out": str(path), "panels": [asdict(panel) for panel in panels]})
    elif not quiet:
        for panel in panels:
            _print(panel)
        stdout.print(f"the plot: [bold]{escape(str(path))}[/]", soft_wrap=True)


def _refuse_twice(facts: list[Facts]) -> None:
    seen: dict[Path, str] = {}
    for one in facts:
        folder = one.checkpoint.folder.resolve()
        if folder in seen:
            raise UserError(f"{one.checkpoint.folder} is given twice; leave one out")
        seen[folder] = one.name


def _measured(
    one: Facts, text: str, reference: str | None, seq_len: int | None, stride: int | None, max_tokens: int | None,
    quiet: bool,
) -> Record:  # fmt: skip
    """The remembered record of this measurement, else a new one, remembered where the folder can be written to."""
    base = None if reference is None else open_checkpoint(reference)
    asked = {"seq_len": seq_len, "stride": stride, "max_tokens": max_tokens}
    content, against = describe_source(text).get("sha256"), None if base is None else base.fingerprint()
    for record in reversed(one.evaluations):
        same = section(record, "text").get("sha256") == content and record.get("reference_sha256") == against
        if same and record.get("asked") == asked and record.get("dtype") is None:
            return record
    folder = one.checkpoint.folder
    if not quiet:
        stderr.print(f"measuring {one.name} on {text}", markup=False, soft_wrap=True)
    with scoring(quiet) as progress:
        figures = evaluate(
            as_model(folder, None, None), text, reference=None if base is None else base.folder,
            tokenizer=load_tokenizer(folder), size=one.size, progress=progress,
            seq_len=seq_len, stride=stride, max_tokens=max_tokens,
        )  # fmt: skip
    record = describe_evaluation(str(folder), figures, text=text, reference=base, asked=asked)
    try:
        remember(one.checkpoint, record)
    except OSError as error:
        stderr.print(f"not remembered in {folder}: {error.strerror}", markup=False, soft_wrap=True)
    return record


def _with(one: Facts, record: Record) -> Facts:
    return replace(one, evaluations=[*one.evaluations, record])


def _print(panel: Panel) -> None:
    stdout.print(panel.protocol, style="bold", markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "checkpoint", "recipe", "size", "bpw", "KL", "perplexity", "top-1", "front"):
        right = name in ("size", "bpw", "KL", "perplexity", "top-1")
        table.add_column(name, justify="right" if right else "left", no_wrap=name not in ("checkpoint", "recipe"))
    for entry in panel.entries:
        table.add_row(
            entry.key, escape(entry.name), escape(entry.recipe), size_text(entry.bytes), f"{entry.bpw:.3f}",
            _cell(entry.kl_mean, ".4f"), _cell(entry.perplexity, ".2f"), _cell(entry.top1_agreement, ".1%"),
            "yes" if entry.front else "",
        )  # fmt: skip
    stdout.print(table)
    if panel.reference_perplexity is not None:
        stdout.print(f"  reference: {panel.reference}, perplexity {panel.reference_perplexity:.2f}", markup=False)
    for note in panel.notes:
        stdout.print(f"  mind: {note}", markup=False)
    if panel.missing:
        stdout.print(f"  not measured this way: {', '.join(panel.missing)}", markup=False)


def _cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
