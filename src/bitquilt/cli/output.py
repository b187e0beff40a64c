"""How verbs speak to a terminal, a log file or a script. Results go to stdout, everything else to stderr."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bitquilt.core.units import ratio_text, size_text, time_text
from bitquilt.errors import UserError, VerificationError

__all__ = ["EXIT_USER_ERROR", "EXIT_WRONG_RESULT", "Json", "Quiet", "calm", "print_fact", "print_json", "ratio_text",
           "run_cli", "size_text", "stderr", "stdout", "time_text"]  # fmt: skip

EXIT_USER_ERROR = 2
EXIT_WRONG_RESULT = 3

# A pipe has no width: lines are left as long as they are, tables get room.
_PIPE_WIDTH = 200

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary: errors only.")]


def _console(stream: Any, **options: Any) -> Console:
    terminal = stream.isatty()
    return Console(soft_wrap=not terminal, width=None if terminal else _PIPE_WIDTH, highlight=False, **options)


stdout = _console(sys.stdout)
stderr = _console(sys.stderr, stderr=True)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout, nothing else; what JSON cannot write (NaN, infinity) is null."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def print_fact(console: Console, label: str, value: str, style: str = "") -> None:
    """`  label   value`, the value wrapped below itself on a terminal and one line anywhere else. No markup."""
    if console.is_terminal:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(f"  {label:<7}", Text(value, style=style))
        console.print(grid)
    else:
        console.print(f"  {label:<7} {value}", markup=False)


def run_cli(app: Callable[[], Any]) -> None:
    """Call a typer app; turn the errors a user can mend into one line on stderr and an exit code.

    `BITQUILT_TRACEBACK=1` keeps the traceback, for bug reports.
    """
    try:
        app()
    except (UserError, VerificationError) as error:
        if os.environ.get("BITQUILT_TRACEBACK") == "1":
            raise
        stderr.print(f"[bold red]error:[/] {escape(str(error))}")
        raise SystemExit(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_WRONG_RESULT) from None
    finally:
        _flush()


def _flush() -> None:
    """Send what is buffered while a closed pipe (`| head`) can still be caught: at exit Python would complain."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def calm(quiet: bool = False, *, models: bool = True) -> Iterator[None]:
    """Within the block other libraries log errors only; the bars of a download stay, unless `quiet`. `models`: whether
    transformers will be needed, which this imports."""
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
