"""`bitquilt`, the command. Verbs register themselves when their file is imported here."""

from bitquilt.cli.app import app
from bitquilt.cli.output import run_cli


def main() -> None:
    """Entry point of the `bitquilt` command."""
    run_cli(app)
