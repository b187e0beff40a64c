"""`bitquilt eval MODEL --text FILE`: quality of a model and its distance from a reference. `measure_text` evaluates a
checkpoint on a text for `compare` and `demo` too, and `keep_record` stores what was measured."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from typer import Option

from bitquilt.cli.options import AnyModel, DtypeOption, Reference, Text, TrustCode, WindowOptions
from bitquilt.cli.output import Json, Quiet, calm, plain_table, print_json, print_line, stderr, stdout
from bitquilt.cli.progress import scoring
from bitquilt.core.units import percent_text, size_text
from bitquilt.data.calibration import load_tokenizer
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import Checkpoint, open_checkpoint
from bitquilt.report import Record, describe_evaluation, remember
from bitquilt.report.evaluation import Evaluation, model_size, run_tasks
from bitquilt.report.evaluation import evaluate as measure
from bitquilt.report.evaluation.loading import as_model


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint with its model in memory; `dtype` is the type that was asked for. `trusted`: its code may run."""

    checkpoint: Checkpoint
    model: Any
    tokenizer: Any
    dtype: str | None = None
    trusted: bool = False


def load_model(checkpoint: Checkpoint, dtype: str | None = None, trusted: bool = False) -> LoadedModel:
    """Load a checkpoint's model and tokenizer."""
    folder = checkpoint.folder
    model, tokenizer = as_model(folder, None, dtype, trusted), load_tokenizer(folder, trusted)
    return LoadedModel(checkpoint, model, tokenizer, dtype, trusted)


def measure_text(
    loaded: LoadedModel,
    text: str,
    reference: Checkpoint | None,
    windows: WindowOptions,
    *,
    batch_size: int | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Evaluate a loaded checkpoint on a text, with progress on stderr."""
    with scoring(quiet) as progress:
        return measure(
            loaded.model,
            text,
            reference=None if reference is None else as_model(reference.folder, None, loaded.dtype, loaded.trusted),
            tokenizer=loaded.tokenizer,
            batch_size=batch_size,
            size=model_size(loaded.checkpoint.folder),
            progress=progress,
            notify=lambda said: None if quiet else print_line(stderr, said),
            **asdict(windows),
        )


def keep_record(checkpoint: Checkpoint, record: Record, quiet: bool = False) -> None:
    """Store a record for `report` and `compare`. A read-only folder is only worth a warning."""
    try:
        remember(checkpoint, record)
    except OSError as error:
        if not quiet:
            print_line(stderr, f"the figures are not kept in {checkpoint.folder}: {error.strerror}")


def evaluate(
    model: AnyModel,
    windows: WindowOptions,
    text: Text = None,
    reference: Reference = None,
    batch_size: Annotated[int | None, Option(help="Windows per forward pass; affects speed and memory only.")] = None,
    tasks: Annotated[str | None, Option(metavar="A,B", help="Tasks of lm-eval, by name.")] = None,
    limit: Annotated[int | None, Option(metavar="N", help="Use only the first N examples of each task.")] = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustCode = False,
    save: Annotated[bool, Option("--save/--no-save", help="Keep the figures in the checkpoint's folder.")] = True,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Measure what was asked for, keep the record and print the figures."""
    if text is None and tasks is None:
        raise UserError("there is nothing to measure; give --text FILE, or --tasks A,B, or both")
    if limit is not None and tasks is None:
        raise UserError("--limit goes with --tasks; use --max-tokens to read a part of the text")
    figures, scores = None, {}
    with calm(quiet):
        checkpoint = open_checkpoint(model)
        base = None if reference is None else open_checkpoint(reference)
        loaded = load_model(checkpoint, None if dtype is None else dtype.value, trust_remote_code)
        if text is not None:
            figures = measure_text(loaded, text, base, windows, batch_size=batch_size, quiet=quiet)
        if tasks is not None:
            names = [name.strip() for name in tasks.split(",") if name.strip()]
            scores = run_tasks(loaded.model, loaded.tokenizer, names, limit, batch_size or 1)
    record = describe_evaluation(
        model,
        figures,
        text=text,
        reference=base,
        dtype=loaded.dtype,
        asked=asdict(windows),
        tasks=scores,
        limit=limit,
    )
    if save:
        keep_record(checkpoint, record, quiet)
    if json_output:
        print_json({**record.stored, "reference": reference})
        return
    if figures is not None:
        _print_figures(figures, model, reference)
    if scores:
        _print_tasks(scores, limit)


def _print_figures(figures: Evaluation, model: str, reference: str | None) -> None:
    measured = {"perplexity": f"{figures.perplexity:.4f}"}
    if figures.kl_mean is not None and figures.top1_agreement is not None:
        measured |= {
            "KL mean, nats": f"{figures.kl_mean:.5f}",
            "KL median": f"{figures.kl_median:.5f}",
            "KL 99th percentile": f"{figures.kl_p99:.4f}",
            "KL largest": f"{figures.kl_max:.4f}",
            "same top token": percent_text(figures.top1_agreement, 4),
            "reference's perplexity": f"{figures.reference_perplexity:.4f}",
        }
    table = plain_table("figure", "value", "measured on", right=["value"])
    for name, value in measured.items():
        table.add_row(name, value, figures.protocol())
    if figures.bpw is not None and figures.nominal_bits is not None and figures.bytes is not None:
        table.add_row("bits per weight", f"{figures.bpw:.3f}", f"{figures.nominal_bits:.3g} nominal")
        table.add_row("size", size_text(figures.bytes), "")
    against = "" if reference is None else f" against {reference}"
    stdout.print(f"{model}{against}", style="bold", markup=False)
    stdout.print(table)


def _print_tasks(scores: Mapping[str, Mapping[str, float]], limit: int | None) -> None:
    table = plain_table("metric", "value", "task", right=["value"])
    for task, metrics in scores.items():
        for name, value in metrics.items():
            table.add_row(name, f"{value:.4g}", task)
    stdout.print(table)
    if limit is not None:
        stdout.print(f"  only the first {limit} examples of each task: a check, not a result")
