"""How verbs speak to a terminal, a log or a script: `print_fact`, `print_json` and `plain_table` print. Results go to
stdout, everything else to stderr."""

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from typer import Option

from bitquilt.core.events import Untouched
from bitquilt.core.units import percent_text
from bitquilt.model.safety import trusted_text

EXIT_USER_ERROR = 2
EXIT_WRONG_RESULT = 3

# A pipe has no width: lines are not wrapped, and tables get room.
_PIPE_WIDTH = 200
_LABEL = 11  # characters of a fact's label


class Screen(Console):
    """A console that prints no control characters: texts come from checkpoints, and a terminal would obey them."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of `renderable`, cleaned; rich's own cursor movements stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(trusted_text(segment.text), segment.style)


class _LiteralTable(Table):
    """A table whose cells hold no markup: a layer may be called `[/bold]`."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def _console(stream: Any, **options: Any) -> Console:
    terminal = stream.isatty()
    return Screen(soft_wrap=not terminal, width=None if terminal else _PIPE_WIDTH, highlight=False, **options)


stdout = _console(sys.stdout)
stderr = _console(sys.stderr, stderr=True)

Json = Annotated[bool, Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print errors only: no progress, no summary.")]


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout; NaN and infinity, which JSON cannot write, become null."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def print_fact(console: Console, label: str, value: str, style: str = "") -> None:
    """Print `  label   value` without markup. On a terminal the value wraps below itself; elsewhere it is one line."""
    if console.is_terminal:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(f"  {label:<{_LABEL}}", Text(value, style=style))
        console.print(grid)
    else:
        console.print(f"  {label:<{_LABEL}} {value}", markup=False)


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print a line without markup and without wrapping."""
    console.print(text, style=style, markup=False, soft_wrap=True)


def print_commands(commands: Iterable[str]) -> None:
    """Print what the user can run next, ready to copy."""
    print_line(stdout, "Next:")
    for command in commands:
        print_line(stdout, f"  {command}", style="cyan")


def print_untouched(console: Console, untouched: Iterable[Untouched], total: int) -> None:
    """Print what stays unchanged, with its share of the `total` bytes: nothing is skipped silently."""
    for item in untouched:
        tensors = "" if item.tensors == 1 else f"{item.tensors} tensors, such as "
        share = percent_text(item.nbytes / total, 2)
        print_fact(console, "unchanged", f"{share} of the bytes, {item.reason}: {tensors}{item.example}")


def plain_table(*names: str, right: Iterable[str] = (), wrap: Iterable[str] = ()) -> Table:
    """Return a table without borders or markup; `right`: columns aligned to the right, `wrap`: those that may wrap."""
    table = _LiteralTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name not in wrap)
    return table


@contextlib.contextmanager
def calm(quiet: bool = False, *, models: bool = True) -> Iterator[None]:
    """Let other libraries log errors only. `quiet`: hide bars of downloads too. `models`: import transformers."""
    with contextlib.ExitStack() as stack:
        if quiet:
            from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

            disable_progress_bars()
            stack.callback(enable_progress_bars)
        if models:
            from bitquilt.model.transformers_logging import quiet_transformers

            stack.enter_context(quiet_transformers())
        yield


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
