"""What `bitquilt law` prints: tables for people, and `fit_json` and `choice_json` for `--json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from bitquilt.cli.output import plain_table, print_fact, stderr, stdout
from bitquilt.core.units import percent_text
from bitquilt.laws import Choice, CrossValidation, DCPTLaw, Goodness, LawFile
from bitquilt.laws.data import BILLION, ONLY_DOMAIN

Splits = Mapping[str, Sequence[CrossValidation]]
_UNSEEN = {"n": "unseen sizes", "ratio": "unseen ratios", "d": "unseen token counts"}


def fit_json(file: LawFile, output: Path, splits: Splits) -> dict[str, Any]:
    """The fitted laws with their goodness, warnings, signs and cross-validation."""
    laws: dict[str, Any] = {}
    for name, law in file.laws.items():
        laws[name] = {"parameters": law.parameters}
        if law.report is not None:
            laws[name] |= {
                "points": law.report.points,
                "goodness": asdict(law.report.goodness),
                "warnings": list(law.report.warnings),
                "data_sha256": law.report.data_sha256,
            }
        if isinstance(law, DCPTLaw):
            laws[name]["signs"] = [asdict(sign) for sign in law.check()]
        if name in splits:
            laws[name]["cross_validation"] = [
                {"over": one.over, **_goodness(one), "splits": len(one.splits)} for one in splits[name]
            ]
    return {"output": str(output), "kind": file.kind, "laws": laws}


def print_fit(file: LawFile, splits: Splits) -> None:
    """Print how well each law fits, its parameters, and where its derivatives have the wrong sign."""
    stdout.print(f"{file.kind} law of {file.source}", style="bold", markup=False)
    figures = ("points", "Huber", "R2", "rms error", "largest")
    table = plain_table("loss of", "tested on", *figures, right=figures)
    for name, law in file.laws.items():
        if law.report is None:
            continue
        table.add_row(name, "its own points", str(law.report.goodness.points), *_cells(law.report.goodness))
        for one in splits.get(name, []):
            table.add_row("", f"{_UNSEEN[one.over]} ({len(one.splits)} splits)", "", *_cells(one))
    stdout.print(table)
    for name, law in file.laws.items():
        stdout.print(
            f"{name}: " + "  ".join(f"{key} {value:.4g}" for key, value in law.parameters.items()), markup=False
        )
        for sign in law.check() if isinstance(law, DCPTLaw) else ():
            if not sign.holds:
                at = "N {:.3g}e9, D {:.3g}e9, ratio {:.3g}".format(*sign.at)
                share = percent_text(sign.failing, 2)
                print_warnings([f"{sign.derivative} > 0 on {share} of the fitted range, worst at {at}"], name)


def predictions_table(rows: Sequence[Mapping[str, Any]], level: float) -> Table:
    """The inputs of each row, its predicted loss and the interval."""
    shown = [key for key in rows[0] if key not in ("low", "high", "spread")]
    interval = f"{percent_text(level)} interval"
    table = plain_table(*shown, interval, right=[interval, *(key for key in shown if key != "domain")])
    for row in rows:
        cells = [f"{row[key]:.4f}" if key == "loss" else _cell(row[key]) for key in shown]
        table.add_row(*cells, f"{row['low']:.4f} to {row['high']:.4f}")
    return table


def choice_json(choice: Choice) -> dict[str, Any]:
    """The chosen mixture, in parameters and tokens."""
    return {
        "ratio": choice.ratio,
        "n_params": choice.n * BILLION,
        "n_tokens": choice.d * BILLION,
        "domain_loss": choice.domain_loss,
        "general_loss": choice.general_loss,
        "max_general_loss": choice.limit,
        "feasible": choice.feasible,
        "warnings": list(choice.warnings),
    }


def print_choice(choice: Choice) -> None:
    """Print the chosen mixture."""
    print_fact(stdout, "mixture", f"{percent_text(choice.ratio, 4)} domain text")
    print_fact(stdout, "parameters", f"{choice.n * BILLION:,.0f}")
    print_fact(stdout, "tokens", f"{choice.d * BILLION:,.0f}")
    print_fact(stdout, "domain loss", f"{choice.domain_loss:.4f}")
    if choice.general_loss is not None and choice.limit is not None:
        print_fact(stdout, "general loss", f"{choice.general_loss:.4f} (at most {choice.limit:.4f})")


def print_warnings(notes: Sequence[str], name: str = ONLY_DOMAIN) -> None:
    """Print warnings on stderr, each with the law that it is about."""
    for note in notes:
        stderr.print(f"[yellow]warning:[/] {escape('' if name == ONLY_DOMAIN else name + ': ')}{escape(note)}")


def _goodness(found: Goodness | CrossValidation) -> dict[str, float]:
    return {"huber": found.huber, "r2": found.r2, "rmse": found.rmse, "max_error": found.max_error}


def _cells(found: Goodness | CrossValidation) -> list[str]:
    return [f"{found.huber:.2e}", f"{found.r2:.4f}", f"{found.rmse:.4f}", f"{found.max_error:.4f}"]


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
