"""What `bitquilt law` prints: tables for people, plain values for `--json`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from bitquilt.cli.output import stderr, stdout
from bitquilt.laws import Choice, CrossValidation, DCPTLaw, LawFile
from bitquilt.laws.data import BILLION, ONLY_DOMAIN


def fit_json(file: LawFile, output: Path, splits: dict[str, list[CrossValidation]]) -> dict[str, Any]:
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
                {"over": one.over, "huber": one.huber, "r2": one.r2, "rmse": one.rmse, "max_error": one.max_error,
                 "splits": len(one.splits)}
                for one in splits[name]
            ]  # fmt: skip
    return {"output": str(output), "kind": file.kind, "laws": laws}


def print_fit(file: LawFile, splits: dict[str, list[CrossValidation]]) -> None:
    table = Table(title=f"{file.kind} law of {file.source}", title_justify="left")
    for column in ("loss of", "tested on", "points", "Huber", "R2", "rms error", "largest"):
        table.add_column(column, justify="left" if column in ("loss of", "tested on") else "right")
    for name, law in file.laws.items():
        if law.report is None:
            continue
        good = law.report.goodness
        table.add_row(
            name, "its own points", str(good.points), *_numbers(good.huber, good.r2, good.rmse, good.max_error)
        )
        for one in splits.get(name, []):
            held = {"n": "unseen sizes", "ratio": "unseen ratios", "d": "unseen token counts"}[one.over]
            table.add_row(
                "", f"{held} ({len(one.splits)} splits)", "", *_numbers(one.huber, one.r2, one.rmse, one.max_error)
            )
    stdout.print(table)
    for name, law in file.laws.items():
        stdout.print(f"{name}: " + "  ".join(f"{key} {value:.4g}" for key, value in law.parameters.items()))
        for sign in law.check() if isinstance(law, DCPTLaw) else ():
            if not sign.holds:
                at = "N {:.3g}e9, D {:.3g}e9, ratio {:.3g}".format(*sign.at)
                say_warnings([f"{sign.derivative} > 0 on {sign.failing:.0%} of the fitted range, worst at {at}"], name)


def _numbers(huber: float, r2: float, rmse: float, largest: float) -> tuple[str, str, str, str]:
    return f"{huber:.2e}", f"{r2:.4f}", f"{rmse:.4f}", f"{largest:.4f}"


def predictions_table(rows: list[dict[str, Any]], level: float) -> Table:
    table = Table()
    shown = [key for key in rows[0] if key not in ("low", "high", "spread")]
    for key in shown:
        table.add_column(key, justify="left" if key == "domain" else "right")
    table.add_column(f"{level:.0%} interval", justify="right")
    for row in rows:
        cells = [f"{row[key]:.4f}" if key == "loss" else _cell(row[key]) for key in shown]
        table.add_row(*cells, f"{row['low']:.4f} to {row['high']:.4f}")
    return table


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def choice_json(choice: Choice) -> dict[str, Any]:
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


def choice_table(choice: Choice) -> Table:
    table = Table(show_header=False)
    table.add_row("domain text in the mixture", f"{choice.ratio:.2%}")
    table.add_row("parameters", f"{choice.n * BILLION:,.0f}")
    table.add_row("tokens", f"{choice.d * BILLION:,.0f}")
    table.add_row("domain loss", f"{choice.domain_loss:.4f}")
    if choice.general_loss is not None and choice.limit is not None:
        table.add_row("general loss", f"{choice.general_loss:.4f} (at most {choice.limit:.4f})")
    return table


def say_warnings(notes: Sequence[str], name: str = ONLY_DOMAIN) -> None:
    for note in notes:
        stderr.print(f"[yellow]warning:[/] {escape('' if name == ONLY_DOMAIN else name + ': ')}{escape(note)}")
