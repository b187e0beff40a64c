"""`bitquilt report DIR`: one page about a checkpoint: where the bits went, what it cost, how good it is."""

import shlex
from pathlib import Path
from typing import Annotated

from rich.markup import escape
from typer import Argument, Option

from bitquilt.cli.output import Json, Quiet, calm, print_json, size_text, stderr, stdout
from bitquilt.cli.pages import check_target, write_page
from bitquilt.report import compare, read_facts, report_page
from bitquilt.report.pareto import siblings
from bitquilt.report.remembered import newest, protocol


def report(
    folder: Annotated[str, Argument(metavar="DIR", help="A checkpoint of bitquilt: folder or hub id.")],
    out: Annotated[
        Path | None, Option(metavar="FILE", help="The page (default: DIR/report.html).", show_default=False)
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        Option(metavar="FILE", help="Figures that `eval --json` printed, besides those remembered; repeatable."),
    ] = None,
    baseline: Annotated[
        list[Path] | None, Option(metavar="DIR", help="A checkpoint to compare with, such as RTN's; repeatable.")
    ] = None,
    alone: Annotated[
        bool, Option("--alone", help="Do not look for checkpoints of the same model beside this one.")
    ] = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """One self-contained HTML page: bits, loss, quality, events, settings, time. Nothing is computed."""
    with calm(quiet):
        local = Path(folder).is_dir()
        default = Path(folder) / "report.html" if local else Path(f"{Path(folder).name}-report.html")
        path = check_target(out or default)
        facts = read_facts(folder, evaluation or ())
        others = [read_facts(other) for other in baseline or ()]
        if not alone and local:
            known = {other.checkpoint.folder.resolve() for other in (facts, *others)}
            others += [one for one in siblings(facts) if one.checkpoint.folder.resolve() not in known]
        wanted = list(dict.fromkeys(protocol(r) for r in facts.evaluations if newest([r]) is not None))
        panels = compare([facts, *others], wanted) if wanted else []
        page = report_page(facts, panels)
        write_page(path, page)
    if json_output:
        absent = [one.what for one in facts.absent]
        print_json({"out": str(path), "bytes": len(page.encode()), "panels": len(panels), "absent": absent})
    elif not quiet:
        stdout.print(f"[bold]{escape(str(path))}[/]: {size_text(len(page.encode()))}, one file", soft_wrap=True)
        for one in facts.absent:
            fix = one.fix.replace("DIR", shlex.quote(folder))
            stderr.print(f"absent: {one.what} ({fix})", markup=False, soft_wrap=True)
