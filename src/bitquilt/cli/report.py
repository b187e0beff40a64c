"""`bitquilt report DIR`: an HTML page about one checkpoint: where the bits went, what it cost, how good it is."""

import shlex
from pathlib import Path
from typing import Annotated

from typer import Option

from bitquilt.cli.options import Quantized
from bitquilt.cli.output import Json, Quiet, calm, print_json, print_line, stderr, stdout
from bitquilt.core.units import size_text
from bitquilt.report import compare, read_facts, report_page
from bitquilt.report.page import check_target, write_page
from bitquilt.report.pareto import siblings


def report(
    folder: Quantized,
    out: Annotated[Path | None, Option(metavar="FILE", help="Page to write. Default: DIR/report.html.")] = None,
    evaluation: Annotated[
        list[Path] | None, Option(metavar="FILE", help="Add figures that `eval --json` printed. Repeatable.")
    ] = None,
    baseline: Annotated[
        list[Path] | None, Option(metavar="DIR", help="Compare with this checkpoint too, such as RTN's. Repeatable.")
    ] = None,
    alone: Annotated[
        bool, Option("--alone", help="Do not compare with checkpoints of the same model in neighbouring folders.")
    ] = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Gather the facts, write the page and name what is missing."""
    with calm(quiet):
        local = Path(folder).is_dir()
        default = Path(folder) / "report.html" if local else Path(f"{Path(folder).name}-report.html")
        path = check_target(out or default)
        facts = read_facts(folder, evaluation or ())
        others = [read_facts(other) for other in baseline or ()]
        if not alone and local:
            known = {other.checkpoint.folder.resolve() for other in (facts, *others)}
            others += [one for one in siblings(facts) if one.checkpoint.folder.resolve() not in known]
        wanted = list(dict.fromkeys(record.protocol for record in facts.evaluations if record.scored))
        panels = compare([facts, *others], wanted) if wanted else []
        page = report_page(facts, panels)
        write_page(path, page)
    size = len(page.encode())
    if json_output:
        absent = [one.what for one in facts.absent]
        print_json({"out": str(path), "bytes": size, "panels": len(panels), "absent": absent})
    elif not quiet:
        print_line(stdout, f"{path}: {size_text(size)}, one file")
        for one in facts.absent:
            print_line(stderr, f"missing: {one.what} ({one.fix.replace('DIR', shlex.quote(folder))})")
