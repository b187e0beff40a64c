"""`bitquilt law`: fit a law to small runs, predict with it, choose a mixture, draw it."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bitquilt.cli.law_output import choice_json, choice_table, fit_json, predictions_table, print_fit, say_warnings
from bitquilt.cli.output import Json, Quiet, print_json, stderr, stdout
from bitquilt.errors import UserError
from bitquilt.laws import (
    BpwLaw,
    CrossDomainLaw,
    CrossValidation,
    DCPTLaw,
    GeneralBound,
    LawFile,
    Runs,
    best_ratio,
    best_scarce_ratio,
    best_under_compute,
    cross_validate,
    load,
    read_runs,
    save,
)
from bitquilt.laws.data import BILLION, ONLY_DOMAIN, as_floats, read_table
from bitquilt.laws.files import Law
from bitquilt.laws.plot import draw_law
from bitquilt.laws.tables import predict_rows, write_rows
from bitquilt.laws.validate import AXES

KINDS = ("dcpt", "cross-domain", "bpw")

law_app = typer.Typer(
    name="law",
    help="Predict a loss before paying for it: mixture, size, tokens (D-CPT Law), or bits per weight.",
    no_args_is_help=True,
)

LawArgument = Annotated[Path, typer.Argument(help="law.json, written by `bitquilt law fit`.")]
DomainOption = Annotated[str | None, typer.Option(help="Which law of the file: the domain to improve.")]
GeneralOption = Annotated[str | None, typer.Option("--general", help="Which law of the file is the general loss.")]


@law_app.command("fit")
def fit(
    runs: Annotated[Path, typer.Argument(help="CSV: n_params,n_tokens,ratio,loss[,domain][,k1,k2], or bpw,loss.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the law goes.")] = Path("law.json"),
    kind: Annotated[str | None, typer.Option(help="dcpt, cross-domain or bpw; by default from the columns.")] = None,
    starts: Annotated[int, typer.Option(min=1, help="Random starts; 300 for noisy data.")] = 60,
    draws: Annotated[int, typer.Option(min=0, help="Bootstrap refits behind the intervals.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the starts and the bootstrap.")] = 0,
    all_points: Annotated[
        bool, typer.Option("--all-points", help="Use every evaluation, not ten of each run, ever further apart.")
    ] = False,
    validate: Annotated[
        bool, typer.Option("--cross-validate", help="Also hold out sizes, ratios and token counts in turn.")
    ] = False,
    full_precision_loss: Annotated[float | None, typer.Option(help="bpw only: the loss without quantization.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a law for every domain of a table of runs. `ratio` is the share of the row's own corpus, 0 to 1."""
    kind = kind or _kind_of(runs)
    if kind not in KINDS:
        raise UserError(f"--kind is {kind!r}, wanted one of {', '.join(KINDS)}")
    if validate and kind != "dcpt":
        raise UserError(f"--cross-validate knows D-CPT laws: got kind {kind}; leave it out")
    splits: dict[str, list[CrossValidation]] = {}
    laws: dict[str, Law]
    if kind == "bpw":
        table, places = read_table(runs, ("bpw", "loss"))
        columns = as_floats(table, places)
        bpw_law = BpwLaw.fit(
            columns["bpw"],
            columns["loss"],
            full_precision_loss=full_precision_loss,
            starts=starts,
            seed=seed,
            draws=draws,
        )
        laws = {ONLY_DOMAIN: bpw_law}
    else:
        data = read_runs(runs)
        used = data if all_points else data.decaying_sample()
        if len(used) < len(data) and not (json_ or quiet):
            stderr.print(f"using {len(used)} of {len(data)} points (ten of each run); --all-points uses every one")
        if kind == "cross-domain":
            laws = {ONLY_DOMAIN: CrossDomainLaw.fit(used, starts=starts, seed=seed, draws=draws)}
        else:
            parts = {name: used.of_domain(name) for name in used.domains}
            laws = {name: DCPTLaw.fit(part, starts=starts, seed=seed, draws=draws) for name, part in parts.items()}
            if validate:
                splits = {name: _cross_validate(part, seed) for name, part in parts.items()}
    file = LawFile(kind, laws, runs.name)
    save(output, file)
    if json_:
        print_json(fit_json(file, output, splits))
        return
    for name, law in laws.items():
        say_warnings(law.report.warnings if law.report else (), name)
    if not quiet:
        print_fit(file, splits)
        stdout.print(f"wrote {output}")


@law_app.command("predict")
def predict(
    law: LawArgument,
    points: Annotated[Path, typer.Argument(help="CSV: n_params,n_tokens,ratio[,domain][,k1,k2], or bpw.")],
    domain: DomainOption = None,
    level: Annotated[float, typer.Option(help="Of the interval low..high.")] = 0.9,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the predictions as CSV.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Predict the loss at every row of a table, with its interval."""
    file = load(law)
    rows, notes = predict_rows(file, points, domain, level)
    if output is not None:
        write_rows(output, rows)
    if json_:
        print_json({"predictions": rows, "level": level, "warnings": notes})
        return
    say_warnings(notes)
    if not quiet:
        stdout.print(predictions_table(rows, level))


@law_app.command("optimise")
def optimise(
    law: LawArgument,
    params: Annotated[float | None, typer.Option(help="Parameters of the model, a plain count.")] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Training tokens; with --domain-tokens the most allowed.")
    ] = None,
    max_general_loss: Annotated[float | None, typer.Option(help="Bound on the general loss, nats per token.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Or: let it rise by this share, such as 0.03.")] = None,
    general_loss: Annotated[
        float | None, typer.Option(help="What --tolerance starts from; by default the law's value without domain text.")
    ] = None,
    domain_tokens: Annotated[float | None, typer.Option(help="Domain text is scarce: all there is, used once.")] = None,
    compute: Annotated[float | None, typer.Option(help="Operations to spend, 6 x parameters x tokens.")] = None,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="With --compute: search beyond twice the fitted sizes and tokens.")
    ] = False,
    domain: DomainOption = None,
    general: GeneralOption = None,
    general_law: Annotated[Path | None, typer.Option(help="Take the general law from another file.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose a mixture: under a bound on the general loss (--params, --tokens), with scarce domain text
    (--domain-tokens), or together with size and tokens under a budget (--compute)."""
    if max_general_loss is not None and tolerance is not None:
        raise UserError("--max-general-loss and --tolerance both bound the general loss: give one of them")
    if domain_tokens is not None and compute is not None:
        raise UserError("--domain-tokens and --compute are two different questions: ask one")
    bounded = max_general_loss is not None or tolerance is not None
    if not bounded and domain_tokens is None and compute is None:
        raise UserError(
            "nothing to optimise under: give --max-general-loss or --tolerance (with --params and --tokens), "
            "--domain-tokens (with --params), or --compute"
        )
    file = load(law)
    name = domain if general_law is not None else file.domain_name(domain, general)
    domain_law = file.dcpt(name)
    limit: GeneralBound | None = None
    if bounded:
        other = _general(file, general_law, general, name)
        if max_general_loss is not None:
            limit = GeneralBound(other, max_general_loss)
        elif general_loss is not None:
            limit = GeneralBound(other, (1 + _share(tolerance)) * general_loss)
        else:
            n, d = _needed(params, "--params", "--tolerance"), _needed(tokens, "--tokens", "--tolerance")
            limit = GeneralBound.tolerance(other, n, d, _share(tolerance))
    if compute is not None:
        choice = best_under_compute(domain_law, compute, limit, extrapolate=extrapolate)
    elif domain_tokens is not None:
        n = _needed(params, "--params", "--domain-tokens")
        most = None if tokens is None else tokens / BILLION
        choice = best_scarce_ratio(domain_law, n, domain_tokens / BILLION, limit, most)
    else:
        because = "a bound on the general loss"
        choice = best_ratio(
            domain_law, _needed(params, "--params", because), _needed(tokens, "--tokens", because), limit
        )
    if json_:
        print_json(choice_json(choice))
        return
    say_warnings(choice.warnings)
    if not quiet:
        stdout.print(choice_table(choice))


@law_app.command("plot")
def plot(
    law: LawArgument,
    runs: Annotated[Path, typer.Argument(help="The CSV that the law was fitted on.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png, .svg or .pdf.")] = Path("law.png"),
    domain: DomainOption = None,
    general: GeneralOption = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw the fitted surface with its points, the residuals, and the trade-off between two domains."""
    file = load(law)
    data = read_runs(runs)
    name = file.domain_name(domain, general)
    mine, own = file.dcpt(name), data.of_domain(name)
    other = general or file.general_name(name)
    pair = None if other is None else (file.dcpt(other), data.of_domain(other))
    notes = []
    if mine.report and mine.report.data_sha256 not in (own.sha256, own.decaying_sample().sha256):
        notes.append(f"{runs} is not the data that {law} was fitted on: the points drawn are others")
    draw_law(mine, own, output, domain="" if name == ONLY_DOMAIN else name, general=pair)
    if json_:
        print_json({"output": str(output), "domain": name, "general": other, "points": len(own), "warnings": notes})
        return
    say_warnings(notes)
    if not quiet:
        stdout.print(f"wrote {output}")


def _kind_of(runs: Path) -> str:
    """By the header: bpw, or k1 and k2 for the cross-domain law, else dcpt."""
    table, _ = read_table(runs, (), ("bpw", "k1", "k2", "n_params"))
    if "bpw" in table and "n_params" not in table:
        return "bpw"
    return "cross-domain" if {"k1", "k2"} <= set(table) else "dcpt"


def _cross_validate(runs: Runs, seed: int) -> list[CrossValidation]:
    axes = {"n": runs.n, "ratio": runs.ratio, "d": runs.d}
    return [cross_validate(runs, over, seed=seed) for over in AXES if len(np.unique(axes[over])) >= 3]


def _general(file: LawFile, general_file: Path | None, general: str | None, domain: str | None) -> DCPTLaw:
    """The law of the general loss, from its own file or from the same one."""
    if general_file is not None:
        other = load(general_file)
        return other.dcpt(general or ("general" if "general" in other.laws else None))
    chosen = general or file.general_name(domain)
    if chosen is None:
        raise UserError(
            f"a bound on the general loss needs its law: got {', '.join(file.laws)}; name it with --general, or give "
            "its file with --general-law"
        )
    return file.dcpt(chosen)


def _share(tolerance: float | None) -> float:
    if tolerance is None or not 0 <= tolerance <= 1:
        raise UserError(f"--tolerance is {tolerance}, wanted a share between 0 and 1, such as 0.03 for 3 %")
    return tolerance


def _needed(value: float | None, option: str, because: str) -> float:
    if value is None or value <= 0:
        raise UserError(f"{option} is {value}, wanted a count above 0: {because} needs it")
    return value / BILLION
