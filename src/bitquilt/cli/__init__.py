"""The `bitquilt` command: `main` runs it. `cli.app` lists the verbs; each has a file that is imported when called."""

from bitquilt.cli.app import app
from bitquilt.cli.output import run_cli

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the `bitquilt` command."""
    run_cli(app)
