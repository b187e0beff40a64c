"""The command line: one typer app, one file per verb."""

import typer

from bitquilt._version import __version__

app = typer.Typer(
    name="bitquilt",
    help="Fit a language model into the memory you have.",
    no_args_is_help=True,
    add_completion=False,  # importing torch on each press of the tab key takes seconds
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"bitquilt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass
