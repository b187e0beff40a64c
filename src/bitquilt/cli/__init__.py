"""The `bitquilt` command: `main` runs it. `cli.app` lists the verbs; each has a file that is imported when called."""

from bitquilt.cli.app import app, main

__all__ = ["app", "main"]
