"""`bitquilt law`: `fit` a law to small runs, `predict` with it, `optimise` a mixture, `plot` the law."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bitquilt import laws
from bitquilt.cli.law_output import choice_json, fit_json, predictions_table, print_choice, print_fit, print_warnings
from bitquilt.cli.output import Json, Quiet, print_json, stderr, stdout
from bitquilt.errors import UserError
from bitquilt.laws.data import BILLION, ONLY_DOMAIN, as_floats, read_table
from bitquilt.laws.files import Law
from bitquilt.laws.plot import draw_law
from bitquilt.laws.tables import predict_rows, write_rows
from bitquilt.laws.validate import AXES

KINDS = ("dcpt", "cross-domain", "bpw")

law_app = typer.Typer(name="law", no_args_is_help=True)

LawArgument = Annotated[Path, typer.Argument(help="File that `bitquilt law fit` wrote.")]
DomainOption = Annotated[str | None, typer.Option(help="Law in the file to use: the domain to improve.")]
GeneralOption = Annotated[str | None, typer.Option("--general", help="Law in the file for the general loss.")]


@law_app.command("fit")
def fit(
    runs: Annotated[Path, typer.Argument(help="CSV: n_params,n_tokens,ratio,loss[,domain][,k1,k2], or bpw,loss.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write the law to.")] = Path("law.json"),
    kind: Annotated[str | None, typer.Option(help="dcpt, cross-domain or bpw. Default: by the columns.")] = None,
    starts: Annotated[int, typer.Option(min=1, help="Random starts; use 300 for noisy data.")] = 60,
    draws: Annotated[int, typer.Option(min=0, help="Bootstrap refits for the intervals.")] = 100,
    seed: Annotated[int, typer.Option(help="Random seed of starts and bootstrap.")] = 0,
    all_points: Annotated[bool, typer.Option("--all-points", help="Use every evaluation, not ten per run.")] = False,
    validate: Annotated[bool, typer.Option("--cross-validate", help="Also hold out sizes, ratios, tokens.")] = False,
    full_precision_loss: Annotated[float | None, typer.Option(help="For bpw: the loss without quantization.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a law per domain to a table of runs. `ratio` is the share of the row's own corpus, from 0 to 1."""
    kind = kind or _kind_of(runs)
    if kind not in KINDS:
        raise UserError(f"--kind is {kind!r}; wanted one of {', '.join(KINDS)}")
    if validate and kind != "dcpt":
        raise UserError(f"--cross-validate is for D-CPT laws, but this is a {kind} law; leave it out")
    effort = {"starts": starts, "seed": seed, "draws": draws}
    parts: dict[str, laws.Runs] = {}
    found: dict[str, Law]
    if kind == "bpw":
        columns = as_floats(*read_table(runs, ("bpw", "loss")))
        law = laws.BpwLaw.fit(columns["bpw"], columns["loss"], full_precision_loss=full_precision_loss, **effort)
        found = {ONLY_DOMAIN: law}
    else:
        used = _points(runs, all_points, quiet=json_ or quiet)
        if kind == "cross-domain":
            found = {ONLY_DOMAIN: laws.CrossDomainLaw.fit(used, **effort)}
        else:
            parts = {name: used.of_domain(name) for name in used.domains}
            found = {name: laws.DCPTLaw.fit(part, **effort) for name, part in parts.items()}
    splits = {name: _cross_validate(part, seed) for name, part in parts.items()} if validate else {}
    file = laws.LawFile(kind, found, runs.name)
    laws.save(output, file)
    if json_:
        print_json(fit_json(file, output, splits))
        return
    for name, fitted in found.items():
        print_warnings(fitted.report.warnings if fitted.report else (), name)
    if not quiet:
        print_fit(file, splits)
        stdout.print(f"wrote {output}", markup=False)


@law_app.command("predict")
def predict(
    law: LawArgument,
    points: Annotated[Path, typer.Argument(help="CSV: n_params,n_tokens,ratio[,domain][,k1,k2], or bpw.")],
    domain: DomainOption = None,
    level: Annotated[float, typer.Option(help="Confidence level of the interval.")] = 0.9,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="CSV to write the predictions to.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Predict the loss at every row of a table, with an interval."""
    file = laws.load(law)
    rows, notes = predict_rows(file, points, domain, level)
    if output is not None:
        write_rows(output, rows)
    if json_:
        print_json({"predictions": rows, "level": level, "warnings": notes})
        return
    print_warnings(notes)
    if not quiet:
        stdout.print(predictions_table(rows, level))


@dataclass(frozen=True)
class _Bound:
    """A bound on the general loss: at most `most`, or a rise of at most `tolerance` over `start`."""

    most: float | None
    tolerance: float | None
    start: float | None

    @property
    def given(self) -> bool:
        """Whether there is a bound."""
        return self.most is not None or self.tolerance is not None

    def limit(self, law: laws.DCPTLaw, params: float | None, tokens: float | None) -> laws.GeneralBound:
        """The bound on `law`; without `start` a tolerance counts from the law's value without domain text."""
        if self.most is not None:
            return laws.GeneralBound(law, self.most)
        if self.tolerance is None or not 0 <= self.tolerance <= 1:
            raise UserError(f"--tolerance is {self.tolerance}; wanted a share from 0 to 1, such as 0.03 for 3 %")
        if self.start is not None:
            return laws.GeneralBound(law, (1 + self.tolerance) * self.start)
        n, d = _needed(params, "--params", "--tolerance"), _needed(tokens, "--tokens", "--tolerance")
        return laws.GeneralBound.tolerance(law, n, d, self.tolerance)


@law_app.command("optimise")
def optimise(
    law: LawArgument,
    params: Annotated[float | None, typer.Option(help="Parameters of the model.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Training tokens; with --domain-tokens an upper bound.")] = None,
    max_general_loss: Annotated[float | None, typer.Option(help="Bound on the general loss, nats per token.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Or a largest rise, such as 0.03.")] = None,
    general_loss: Annotated[
        float | None,
        typer.Option(help="Start of --tolerance. Default: the law without domain text."),
    ] = None,
    domain_tokens: Annotated[float | None, typer.Option(help="Domain tokens there are, used once.")] = None,
    compute: Annotated[float | None, typer.Option(help="Operations to spend: 6 x parameters x tokens.")] = None,
    extrapolate: Annotated[bool, typer.Option("--extrapolate", help="Search beyond twice the fitted sizes.")] = False,
    domain: DomainOption = None,
    general: GeneralOption = None,
    general_law: Annotated[Path | None, typer.Option(help="Read the general law from this other file.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose the share of domain text in a mixture.

    Give a bound on the general loss (with --params and --tokens), the domain text there is (--domain-tokens), or a
    budget (--compute), which also chooses size and tokens."""
    bound = _Bound(max_general_loss, tolerance, general_loss)
    if max_general_loss is not None and tolerance is not None:
        raise UserError("--max-general-loss and --tolerance both bound the general loss; give one of them")
    if domain_tokens is not None and compute is not None:
        raise UserError("--domain-tokens and --compute ask two different questions; give one of them")
    if not bound.given and domain_tokens is None and compute is None:
        raise UserError(
            "there is nothing to optimise under; give --max-general-loss or --tolerance (with --params and --tokens), "
            "--domain-tokens (with --params), or --compute"
        )
    file = laws.load(law)
    name = domain if general_law is not None else file.domain_name(domain, general)
    mine = file.dcpt(name)
    limit = bound.limit(_general(file, general_law, general, name), params, tokens) if bound.given else None
    choice: laws.Choice
    if compute is not None:
        choice = laws.best_under_compute(mine, compute, limit, extrapolate=extrapolate)
    elif domain_tokens is not None:
        n, most = _needed(params, "--params", "--domain-tokens"), None if tokens is None else tokens / BILLION
        choice = laws.best_scarce_ratio(mine, n, domain_tokens / BILLION, limit, most)
    else:
        because = "a bound on the general loss"
        n, d = _needed(params, "--params", because), _needed(tokens, "--tokens", because)
        choice = laws.best_ratio(mine, n, d, limit)
    if json_:
        print_json(choice_json(choice))
        return
    print_warnings(choice.warnings)
    if not quiet:
        print_choice(choice)


@law_app.command("plot")
def plot(
    law: LawArgument,
    runs: Annotated[Path, typer.Argument(help="CSV that the law was fitted on.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png, .svg or .pdf to write.")] = Path("law.png"),
    domain: DomainOption = None,
    general: GeneralOption = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw the fitted surface with its points, the residuals, and the trade-off between two domains."""
    file = laws.load(law)
    data = laws.read_runs(runs)
    name = file.domain_name(domain, general)
    mine, own = file.dcpt(name), data.of_domain(name)
    other = general or file.general_name(name)
    pair = None if other is None else (file.dcpt(other), data.of_domain(other))
    notes = []
    if mine.report and mine.report.data_sha256 not in (own.sha256, own.decaying_sample().sha256):
        notes.append(f"{law} was not fitted on {runs}, so the points are not those of the fit")
    draw_law(mine, own, output, domain="" if name == ONLY_DOMAIN else name, general=pair)
    if json_:
        print_json({"output": str(output), "domain": name, "general": other, "points": len(own), "warnings": notes})
        return
    print_warnings(notes)
    if not quiet:
        stdout.print(f"wrote {output}", markup=False)


def _kind_of(runs: Path) -> str:
    """The kind that the header suggests: bpw, cross-domain with k1 and k2, else dcpt."""
    table, _ = read_table(runs, (), ("bpw", "k1", "k2", "n_params"))
    if "bpw" in table and "n_params" not in table:
        return "bpw"
    return "cross-domain" if {"k1", "k2"} <= set(table) else "dcpt"


def _points(runs: Path, all_points: bool, *, quiet: bool) -> laws.Runs:
    """The points of a table to fit on, by default ten per run, spaced ever further apart."""
    data = laws.read_runs(runs)
    used = data if all_points else data.decaying_sample()
    if len(used) < len(data) and not quiet:
        stderr.print(f"using {len(used)} of {len(data)} points, ten per run; --all-points uses every one")
    return used


def _cross_validate(runs: laws.Runs, seed: int) -> list[laws.CrossValidation]:
    axes = {"n": runs.n, "ratio": runs.ratio, "d": runs.d}
    return [laws.cross_validate(runs, over, seed=seed) for over in AXES if len(np.unique(axes[over])) >= 3]


def _general(file: laws.LawFile, general_file: Path | None, general: str | None, domain: str | None) -> laws.DCPTLaw:
    """The law of the general loss, from its own file or from `file`."""
    if general_file is not None:
        other = laws.load(general_file)
        return other.dcpt(general or ("general" if "general" in other.laws else None))
    chosen = general or file.general_name(domain)
    if chosen is None:
        raise UserError(
            f"a bound on the general loss needs its law, but the file holds {', '.join(file.laws)}; name one with "
            "--general, or give another file with --general-law"
        )
    return file.dcpt(chosen)


def _needed(value: float | None, option: str, because: str) -> float:
    """`value` in units of 1e9. Raises UserError if it is missing or not above 0."""
    if value is None or value <= 0:
        raise UserError(f"{option} is {value}; {because} needs a count above 0")
    return value / BILLION
