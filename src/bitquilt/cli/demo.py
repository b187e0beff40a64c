"""`bitquilt demo`: the packaged model by five recipes at two sizes: a table and a page. No download, no data."""

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich import box
from rich.markup import escape
from rich.status import Status
from rich.table import Table
from rich.text import Text
from typer import Option

import bitquilt
from bitquilt.cli.generate import write_text
from bitquilt.cli.output import Json, Quiet, calm, print_json, size_text, stderr, stdout
from bitquilt.cli.pages import check_target, write_page
from bitquilt.core.events import BlockDone
from bitquilt.data.calibration import load_tokenizer, sample_from_model
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.report import compare, compare_page, describe_evaluation, read_facts, remember
from bitquilt.report.evaluation import Evaluation, evaluate, model_size
from bitquilt.report.evaluation.loading import as_model
from bitquilt.stream.workdir import write_tensors

DEMO_MODEL = Path(bitquilt.__file__).parent / "demo"
_RECIPES = ("rtn", "gptq", "slim-llm", "quilt")  # the same bits in every layer
_BEST = "cmpq+"  # bits where they are worth most, as many as RTN took
_GROUP_SIZE = 32
_PROMPT = "The old man looked at the sea and"
_NEW_TOKENS = 36


@dataclass(frozen=True)
class _Scale:
    """How much: 64 calibration and 32 evaluation windows take about a minute in all on two cores."""

    samples: int = 64
    windows: int = 32
    seq_len: int = 256
    bits: tuple[int, ...] = (3, 2)


_QUICK = _Scale(samples=16, windows=8, seq_len=64, bits=(2,))


def demo(
    out: Annotated[Path, Option(help="Where the checkpoints go.")] = Path("bitquilt-demo"),
    text: Annotated[str | None, Option(metavar="FILE", help="Evaluate on this text, not on the model's own.")] = None,
    calibration: Annotated[str | None, Option(metavar="FILE", help="Calibrate on this text.")] = None,
    quick: Annotated[bool, Option("--quick", help="2 bits and little data: shows that it runs, in seconds.")] = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Quantize the packaged 5.8M-parameter model and compare; a second run takes what the first one finished."""
    scale = _QUICK if quick else _Scale()
    out = out / "quick" if quick else out
    runs = [(recipe, bits) for bits in scale.bits for recipe in (*_RECIPES, _BEST)]
    with calm(quiet), _steps(len(runs) + 3, quiet) as steps:
        steps.start("the full-precision model writes text to calibrate on")
        calibrate = calibration or _own_text(out, "calibration", scale.samples, scale.seq_len, seed=0)
        steps.start("and other text to be measured on")
        measure = text or _own_text(out, "evaluation", scale.windows, scale.seq_len, seed=1)
        steps.start("the full-precision model: measuring")
        rows = [_row("full precision", 16, DEMO_MODEL, measure, scale)]
        for recipe, bits in runs:
            steps.start(f"{recipe} to {bits} bits")
            folder = out / f"{recipe}-{bits}bit"
            size: dict[str, Any] = {"bits": bits, "group_size": _GROUP_SIZE}
            if recipe == _BEST:
                size = {"budget": bitquilt.Budget("bpw", next(r.bpw for r in rows if r.width == bits))}
            bitquilt.quantize(
                DEMO_MODEL, recipe, calibrate, folder, **size,
                samples=scale.samples, seq_len=scale.seq_len, seed=0, observer=steps.observe,
            )  # fmt: skip
            steps.note("measuring")
            rows.append(_row(recipe, bits, folder, measure, scale))
    page = _page(rows)
    if json_output:
        print_json({"rows": [{**row.figures.to_json(), **row.facts()} for row in rows]})
    elif not quiet:
        _print(rows, None if text is None else str(text), scale)
        if page is not None:
            stdout.print(f"\nQuality against size, as a page: [bold]{escape(str(page))}[/]", soft_wrap=True)


@dataclass(frozen=True)
class _Row:
    name: str
    width: int
    folder: Path
    figures: Evaluation
    sample: str

    @property
    def bpw(self) -> float:
        assert self.figures.bpw is not None
        return self.figures.bpw

    def facts(self) -> dict[str, str]:
        return {"recipe": self.name, "folder": str(self.folder), "prompt": _PROMPT, "sample": self.sample}


def _page(rows: list[_Row]) -> Path | None:
    """The comparison of all checkpoints beside them; None where the packages that write pages are not installed."""
    path = rows[-1].folder.parent / "compare.html"
    try:
        check_target(path)
    except UserError:
        return None
    write_page(path, compare_page(compare([read_facts(str(row.folder)) for row in rows[1:]])))
    return path


def _own_text(out: Path, name: str, count: int, seq_len: int, seed: int) -> str:
    """Token ids that the full-precision model sampled, written once: every recipe and later run reads the same."""
    path = out / f"{name}-{count}x{seq_len}-seed{seed}.safetensors"
    if not path.is_file():
        checkpoint = open_checkpoint(DEMO_MODEL)
        ids = sample_from_model(
            checkpoint, samples=count, seq_len=seq_len, seed=seed, vocabulary=checkpoint.model_config.vocabulary or 0,
            progress=lambda _: None,
        )  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"input_ids": ids})
    return str(path)


def _row(name: str, width: int, folder: Path, text: str, scale: _Scale) -> _Row:
    tokenizer = load_tokenizer(DEMO_MODEL)
    model, size = as_model(folder, None, None), model_size(folder)
    figures = evaluate(
        model, text, reference=DEMO_MODEL, tokenizer=tokenizer, seq_len=scale.seq_len,
        max_tokens=scale.windows * scale.seq_len, size=size,
    )  # fmt: skip
    asked = {"seq_len": scale.seq_len, "stride": None, "max_tokens": scale.windows * scale.seq_len}
    record = describe_evaluation(str(folder), figures, text=text, reference=open_checkpoint(DEMO_MODEL), asked=asked)
    remember(open_checkpoint(folder), record)
    sample = write_text(model, tokenizer, _PROMPT, max_new_tokens=_NEW_TOKENS, temperature=0.8, seed=0)
    return _Row(name, width, folder, figures, " ".join(sample.split()))


def _print(rows: list[_Row], text: str | None, scale: _Scale) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("bits", "recipe", "size", "true bpw", "perplexity", "KL", "top-1"):
        table.add_column(column, justify="left" if column == "recipe" else "right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before.width != row.width:
            table.add_section()
        table.add_row(*_cells(row))
    stdout.print(table)
    source = text or "text that the full-precision model wrote itself (another seed than calibration)"
    stdout.print("Perplexity, and mean KL from full precision in nats per token:")
    stdout.print(f"{rows[0].figures.protocol()} of {source}.", markup=False)
    if not text:
        stdout.print("It is kind to that model; for text of others give --text FILE.")
    stdout.print(f"\n[bold]{escape(_PROMPT)} ...[/]")
    for row in rows:
        bits = f"{row.figures.nominal_bits:.3g} bits"
        continuation = row.sample.removeprefix(_PROMPT).strip()
        stdout.print(Text.assemble((f"{row.name}, {bits}: ", "cyan"), continuation))
    folder = shlex.quote(str(rows[-1].folder))
    stdout.print(f"\nThe checkpoints lie in [bold]{escape(str(rows[-1].folder.parent))}[/]. Go on with")
    for command in (
        f"bitquilt inspect {folder}",
        f"bitquilt report {folder}",
        f"bitquilt compare {shlex.quote(str(rows[-1].folder.parent))}/*bit",
        f"bitquilt generate {folder} --prompt 'It was a cold morning when'",
        f"bitquilt quantize MODEL OUT --recipe {_BEST} --size 6.5GiB",
    ):
        stdout.print(f"  [cyan]{escape(command)}[/]", soft_wrap=True)


def _cells(row: _Row) -> list[Any]:
    figures = row.figures
    assert figures.bytes is not None
    assert figures.kl_mean is not None
    assert figures.top1_agreement is not None
    return [
        f"{figures.nominal_bits:.3g}",
        row.name,
        size_text(figures.bytes),
        f"{row.bpw:.3f}",
        f"{figures.perplexity:.2f}",
        f"{figures.kl_mean:.4f}",
        f"{100 * figures.top1_agreement:.1f} %",
    ]


class _Steps:
    """`[3/9] gptq to 3 bits`: on a terminal one line that changes, in a log a line per step."""

    def __init__(self, total: int, status: Status | None, quiet: bool) -> None:
        self.total, self.status, self.quiet = total, status, quiet
        self.done, self.text = 0, ""

    def start(self, text: str) -> None:
        self.done, self.text = self.done + 1, f"[{self.done + 1}/{self.total}] {text}"
        self._show(self.text)
        if self.status is None and not self.quiet:
            stderr.print(self.text, markup=False)

    def note(self, text: str) -> None:
        self._show(f"{self.text}: {text}")

    def observe(self, event: object) -> None:
        if isinstance(event, BlockDone):
            error = "" if event.error is None else f", output error {event.error:.4f}"
            self.note(f"block {event.block + 1} of {event.blocks}{error}")

    def _show(self, text: str) -> None:
        if self.status is not None:
            self.status.update(escape(text))


@contextlib.contextmanager
def _steps(total: int, quiet: bool) -> Iterator[_Steps]:
    if quiet or not stderr.is_terminal:
        yield _Steps(total, None, quiet)
        return
    with stderr.status("") as status:
        yield _Steps(total, status, quiet)
