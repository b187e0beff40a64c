"""How verbs speak to a terminal, a log file or a script. Results go to stdout, everything else to stderr."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import typer
from rich.console import Console

from bitquilt.errors import UserError, VerificationError

EXIT_USER_ERROR = 2
EXIT_WRONG_RESULT = 3
EXIT_INTERRUPTED = 130

stdout = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
stderr = Console(stderr=True, soft_wrap=not sys.stderr.isatty(), highlight=False)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout, nothing else."""
    print(json.dumps(value, indent=2, allow_nan=True))


def run_cli(app: Callable[[], Any]) -> None:
    """Call a typer app; turn the errors a user can mend into one line on stderr and an exit code.

    `BITQUILT_TRACEBACK=1` keeps the traceback, for bug reports.
    """
    try:
        app()
    except (UserError, VerificationError) as error:
        if os.environ.get("BITQUILT_TRACEBACK") == "1":
            raise
        stderr.print(f"[bold red]error:[/] {_escape(str(error))}")
        raise SystemExit(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_WRONG_RESULT) from None
    except KeyboardInterrupt:
        stderr.print("interrupted; run the same command again to continue")
        raise SystemExit(EXIT_INTERRUPTED) from None


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


JsonOption = typer.Option(False, "--json", help="Print one JSON object on stdout and nothing else.")
QuietOption = typer.Option(False, "--quiet", "-q", help="No progress, no tables: only errors.")
