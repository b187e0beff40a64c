"""`bitquilt demo`: the packaged model by five recipes at two sizes, as a table and a page, without download or data."""

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.markup import escape
from rich.status import Status
from rich.text import Text
from typer import Option

import bitquilt
from bitquilt.cli.eval import keep_record, load_model, measure_text
from bitquilt.cli.generate import Sampling, write_text
from bitquilt.cli.options import WindowOptions
from bitquilt.cli.output import Json, Quiet, calm, plain_table, print_commands, print_json, print_line, stderr, stdout
from bitquilt.core.events import BlockDone
from bitquilt.core.units import percent_text, size_text
from bitquilt.data.calibration import sample_from_model
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.report import compare, compare_page, describe_evaluation, read_facts
from bitquilt.report.evaluation import Evaluation
from bitquilt.report.page import check_target, write_page
from bitquilt.stream.workdir import write_tensors

DEMO_MODEL = Path(bitquilt.__file__).parent / "demo"
_RECIPES = ("rtn", "gptq", "slim-llm", "quilt")  # the same bits in every layer
_BEST = "cmpq+"  # as many bits as RTN took, put where they are worth most
_GROUP_SIZE = 32
_PROMPT = "The old man looked at the sea and"
_NEW_TOKENS = 36


@dataclass(frozen=True)
class _Scale:
    """Amount of data: 64 calibration and 32 evaluation windows take about a minute in all on two cores."""

    samples: int = 64
    windows: int = 32
    seq_len: int = 256
    bits: tuple[int, ...] = (3, 2)

    @property
    def evaluation(self) -> WindowOptions:
        """The windows to evaluate on."""
        return WindowOptions(seq_len=self.seq_len, max_tokens=self.windows * self.seq_len)


_QUICK = _Scale(samples=16, windows=8, seq_len=64, bits=(2,))


@dataclass(frozen=True)
class _Row:
    """One model of the demo: its figures and a text that it wrote."""

    name: str
    width: int
    folder: Path
    figures: Evaluation
    sample: str

    def to_json(self) -> dict[str, Any]:
        """The row for --json."""
        about = {"recipe": self.name, "folder": str(self.folder), "prompt": _PROMPT, "sample": self.sample}
        return self.figures.to_json() | about


def demo(
    out: Annotated[Path, Option(help="Folder for the checkpoints.")] = Path("bitquilt-demo"),
    text: Annotated[str | None, Option(metavar="FILE", help="Evaluate on this text, not the model's own.")] = None,
    calibration: Annotated[str | None, Option(metavar="FILE", help="Calibrate on this text.")] = None,
    quick: Annotated[bool, Option("--quick", help="Use 2 bits and little data: seconds to run.")] = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Quantize by every recipe, measure and compare. What an earlier run finished is not done again."""
    scale = _QUICK if quick else _Scale()
    out = out / "quick" if quick else out
    runs = [(recipe, bits) for bits in scale.bits for recipe in (*_RECIPES, _BEST)]
    with calm(quiet), _steps(len(runs) + 3, quiet) as steps:
        steps.start("the full-precision model writes text for calibration")
        calibrate = calibration or _own_text(out, "calibration", scale.samples, scale.seq_len, seed=0)
        steps.start("the full-precision model writes text for evaluation")
        measure = text or _own_text(out, "evaluation", scale.windows, scale.seq_len, seed=1)
        steps.start("measuring the full-precision model")
        rows = [_row("full precision", 16, DEMO_MODEL, measure, scale)]
        for recipe, bits in runs:
            steps.start(f"{recipe} to {bits} bits")
            folder = out / f"{recipe}-{bits}bit"
            size: dict[str, Any] = {"bits": bits, "group_size": _GROUP_SIZE}
            if recipe == _BEST:
                same = next(row.figures.bpw for row in rows if row.width == bits)
                size = {"budget": bitquilt.Budget.of(bpw=same)}
            data: dict[str, Any] = {"samples": scale.samples, "seq_len": scale.seq_len, "seed": 0}
            bitquilt.quantize(DEMO_MODEL, recipe, calibrate, folder, **size, **data, observer=steps.observe)
            steps.note("measuring")
            rows.append(_row(recipe, bits, folder, measure, scale))
    page = _page(rows)
    if json_output:
        print_json({"rows": [row.to_json() for row in rows]})
    elif not quiet:
        _print(rows, text)
        _print_next(rows[-1].folder, page)


def _page(rows: list[_Row]) -> Path | None:
    """Write the comparison of all checkpoints; None where the packages that pages need are not installed."""
    path = rows[-1].folder.parent / "compare.html"
    try:
        check_target(path)
    except UserError:
        return None
    write_page(path, compare_page(compare([read_facts(row.folder) for row in rows[1:]])))
    return path


def _own_text(out: Path, name: str, count: int, seq_len: int, seed: int) -> str:
    """Return a file of token ids that the full-precision model sampled once, the same for every recipe and run."""
    path = out / f"{name}-{count}x{seq_len}-seed{seed}.safetensors"
    if not path.is_file():
        checkpoint = open_checkpoint(DEMO_MODEL)
        vocabulary = checkpoint.model_config.vocabulary or 0
        sizes = {"samples": count, "seq_len": seq_len, "seed": seed, "vocabulary": vocabulary}
        ids = sample_from_model(checkpoint, **sizes, progress=lambda _: None)
        out.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"input_ids": ids})
    return str(path)


def _row(name: str, width: int, folder: Path, text: str, scale: _Scale) -> _Row:
    loaded, base, windows = load_model(open_checkpoint(folder)), open_checkpoint(DEMO_MODEL), scale.evaluation
    figures = measure_text(loaded, text, base, windows, quiet=True)
    record = describe_evaluation(str(folder), figures, text=text, reference=base, asked=asdict(windows))
    keep_record(loaded.checkpoint, record)
    sample = write_text(loaded.model, loaded.tokenizer, _PROMPT, Sampling(_NEW_TOKENS))
    return _Row(name, width, folder, figures, " ".join(sample.split()))


def _print(rows: list[_Row], text: str | None) -> None:
    figures = ("size", "true bpw", "perplexity", "KL", "top-1")
    table = plain_table("bits", "recipe", *figures, right=("bits", *figures))
    for before, row in zip([rows[0], *rows], rows, strict=False):
        if before.width != row.width:
            table.add_section()
        table.add_row(*_cells(row))
    stdout.print(table)
    source = text or "text that the full-precision model wrote itself (with another seed than for calibration)"
    stdout.print("Perplexity, and mean KL from full precision in nats per token, measured on")
    stdout.print(f"{rows[0].figures.protocol()} of {source}.", markup=False)
    if not text:
        stdout.print("This text favours that model; use --text FILE for text by others.")
    stdout.print(f"\n[bold]{escape(_PROMPT)} ...[/]")
    for row in rows:
        bits = f"{row.figures.nominal_bits:.3g} bits"
        continuation = row.sample.removeprefix(_PROMPT).strip()
        stdout.print(Text.assemble((f"{row.name}, {bits}: ", "cyan"), continuation))


def _print_next(folder: Path, page: Path | None) -> None:
    quoted = shlex.quote(str(folder))
    print_line(stdout, f"\nThe checkpoints are in {folder.parent}.")
    print_commands(
        [
            f"bitquilt inspect {quoted}",
            f"bitquilt report {quoted}",
            f"bitquilt compare {shlex.quote(str(folder.parent))}/*bit",
            f"bitquilt generate {quoted} --prompt 'It was a cold morning when'",
            f"bitquilt quantize MODEL OUT --recipe {_BEST} --size 6.5GiB",
        ]
    )
    if page is not None:
        print_line(stdout, f"\nPage of quality against size: {page}")


def _cells(row: _Row) -> list[str]:
    figures = row.figures
    size, agreement = size_text(figures.bytes or 0), percent_text(figures.top1_agreement or 0.0)
    quality = [f"{figures.perplexity:.2f}", f"{figures.kl_mean:.4f}", agreement]
    return [f"{figures.nominal_bits:.3g}", row.name, size, f"{figures.bpw:.3f}", *quality]


class _Steps:
    """`[3/9] gptq to 3 bits`: one changing line on a terminal, a line per step in a log."""

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
