"""`bitquilt eval MODEL --text FILE`: how good is it, and how far from its reference?"""

from enum import StrEnum
from typing import Annotated

from rich import box
from rich.table import Table
from typer import Argument, Option

from bitquilt.cli.output import Json, Quiet, calm, print_json, size_text, stderr, stdout
from bitquilt.cli.progress import scoring
from bitquilt.data.calibration import load_tokenizer
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import Checkpoint, open_checkpoint
from bitquilt.report import Record, describe_evaluation, remember
from bitquilt.report.evaluation import Evaluation, model_size, run_tasks
from bitquilt.report.evaluation import evaluate as measure
from bitquilt.report.evaluation.loading import as_model


class Dtype(StrEnum):
    """What a model computes in; `auto` is the type it is stored in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DtypeOption = Annotated[
    Dtype | None, Option(help="What to compute in (default: float32 on a CPU, else as stored).", show_default=False)
]


def evaluate(
    model: Annotated[str, Argument(metavar="MODEL", help="Model folder or hub id, quantized or not.")],
    text: Annotated[
        str | None, Option(help="Text, jsonl, parquet, a folder of them, a hub data set, token ids in safetensors.")
    ] = None,
    reference: Annotated[
        str | None, Option(metavar="BASE", help="The full-precision model: adds the divergence from it.")
    ] = None,
    seq_len: Annotated[
        int | None, Option(help="Tokens per window (default: the model's context, at most 2048).", show_default=False)
    ] = None,
    stride: Annotated[int | None, Option(help="Windows overlap: a new one every so many tokens.")] = None,
    max_tokens: Annotated[int | None, Option(help="Read only the first tokens of the text.")] = None,
    batch_size: Annotated[int | None, Option(help="Windows per forward pass; speed and memory only.")] = None,
    tasks: Annotated[str | None, Option(metavar="A,B", help="Tasks of lm-eval, by name.")] = None,
    limit: Annotated[int | None, Option(help="Only the first examples of each task.")] = None,
    dtype: DtypeOption = None,
    save: Annotated[
        bool, Option("--save/--no-save", help="Remember the figures in the folder of a bitquilt checkpoint.")
    ] = True,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Perplexity on a text, divergence from a reference, and lm-eval's tasks."""
    if text is None and tasks is None:
        raise UserError("nothing to measure: give --text FILE, or --tasks A,B, or both")
    if limit is not None and tasks is None:
        raise UserError("--limit goes with --tasks; for a part of the text give --max-tokens")
    kind = None if dtype is None else dtype.value
    with calm(quiet):
        checkpoint = open_checkpoint(model)
        other = None if reference is None else open_checkpoint(reference)
        base = None if other is None else as_model(other.folder, None, kind)
        loaded, tokenizer = as_model(checkpoint.folder, None, kind), load_tokenizer(checkpoint.folder)
        size = model_size(checkpoint.folder)
        figures = None
        if text is not None:
            with scoring(quiet) as progress:
                figures = measure(
                    loaded, text, reference=base, tokenizer=tokenizer, seq_len=seq_len, stride=stride,
                    max_tokens=max_tokens, batch_size=batch_size, size=size, progress=progress,
                )  # fmt: skip
        scores = {}
        if tasks is not None:
            names = [name.strip() for name in tasks.split(",") if name.strip()]
            scores = run_tasks(loaded, tokenizer, names, limit, batch_size or 1)
    asked = {"seq_len": seq_len, "stride": stride, "max_tokens": max_tokens}
    record = describe_evaluation(
        model, figures, text=text, reference=other, dtype=kind, asked=asked, tasks=scores, limit=limit
    )
    if save:
        _remember(checkpoint, record, quiet)
    if json_output:
        print_json(record | {"reference": reference})
        return
    if figures is not None:
        _print_figures(figures, model, reference)
    if scores:
        _print_tasks(scores, limit)


def _remember(checkpoint: Checkpoint, record: Record, quiet: bool) -> None:
    """For `report` and `compare`. What was measured counts more than where it is kept: a folder may be read-only."""
    try:
        remember(checkpoint, record)
    except OSError as error:
        if not quiet:
            stderr.print(f"not remembered in {checkpoint.folder}: {error.strerror}", markup=False, soft_wrap=True)


def _print_figures(figures: Evaluation, model: str, reference: str | None) -> None:
    measured = [("perplexity", f"{figures.perplexity:.4f}")]
    if figures.kl_mean is not None and figures.top1_agreement is not None:
        measured += [
            ("KL mean, nats", f"{figures.kl_mean:.5f}"),
            ("KL median", f"{figures.kl_median:.5f}"),
            ("KL 99 %", f"{figures.kl_p99:.4f}"),
            ("KL largest", f"{figures.kl_max:.4f}"),
            ("same top token", f"{100 * figures.top1_agreement:.2f} %"),
            ("its reference's perplexity", f"{figures.reference_perplexity:.4f}"),
        ]
    table = _table("figure", "value", "measured on")
    for name, value in measured:
        table.add_row(name, value, figures.protocol())
    if figures.bpw is not None and figures.nominal_bits is not None and figures.bytes is not None:
        table.add_row("bits per weight", f"{figures.bpw:.3f}", f"{figures.nominal_bits:.3g} nominal")
        table.add_row("size", size_text(figures.bytes), "")
    against = "" if reference is None else f", against {reference}"
    stdout.print(f"{model}{against}", style="bold", markup=False)
    stdout.print(table)


def _print_tasks(scores: dict[str, dict[str, float]], limit: int | None) -> None:
    table = _table("metric", "value", "task")
    for task, metrics in scores.items():
        for name, value in metrics.items():
            table.add_row(name, f"{value:.4g}", task)
    stdout.print(table)
    if limit is not None:
        stdout.print(f"  the first {limit} examples of each task: a check, not a result")


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name == "value" else "left")
    return table
