"""The command line: one typer app, one file per verb. A verb's file is imported when the verb is called: most of them
import torch, some transformers, and the list of all need neither."""

import importlib
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from bitquilt._version import __version__

_CONTEXT = {"help_option_names": ["-h", "--help"]}


class _Verb(NamedTuple):
    """Where a verb is, `module:name` of a function or a typer app, and what the list of verbs says of it."""

    home: str
    help: str


VERBS = {
    "quantize": _Verb(
        "quantize:quantize",
        "Quantize a model, block by block. Interrupted, the same command continues; finished, it says so.",
    ),
    "plan": _Verb(
        "plan:plan",
        "Say what a budget buys before anything is quantized. Exit code 0: it fits; 4: no plan is within the budget.",
    ),
    "eval": _Verb("eval:evaluate", "Perplexity on a text, divergence from a reference, and lm-eval's tasks."),
    "inspect": _Verb("inspect:inspect", "Bits, size and error of every layer, and of the whole model."),
    "report": _Verb(
        "report:report",
        "One self-contained HTML page: bits, loss, quality, events, settings, time. Nothing is computed.",
    ),
    "compare": _Verb(
        "compare:compare_checkpoints",
        "Quality against size with the Pareto front: a page, and a table here. Figures are those that eval remembered.",
    ),
    "generate": _Verb("generate:generate", "Continue a prompt; the text streams to stdout."),
    "bench": _Verb(
        "bench:bench",
        "Tokens per second of prompt and text, share of the memory's speed, peak memory; random token ids.",
    ),
    "demo": _Verb(
        "demo:demo",
        "Quantize the packaged 5.8M-parameter model and compare; a second run takes what the first one finished.",
    ),
    "doctor": _Verb(
        "doctor:doctor",
        "What this machine can use: versions, processor, memory, GPU, packages; and a self-test of a second.",
    ),
    "law": _Verb(
        "law:law_app",
        "Predict a loss before paying for it: mixture, size, tokens (D-CPT Law), or bits per weight.",
    ),
}


class _Verbs(TyperGroup):
    """The verbs by name; only their names and helps while all of them are listed."""

    listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The verb itself, its file imported; None for an unknown name."""
        if cmd_name not in VERBS:
            return None
        if self.listing:
            return TyperCommand(cmd_name, help=VERBS[cmd_name].help)
        return load_verb(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The list of verbs."""
        self.listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self.listing = False


def load_verb(name: str) -> Any:
    """The command of a verb, with all of its options."""
    module, _, member = VERBS[name].home.partition(":")
    found = getattr(importlib.import_module(f"bitquilt.cli.{module}"), member)
    if not isinstance(found, typer.Typer):
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=_CONTEXT)
        alone.command(name)(found)
        found = alone
    command = typer.main.get_command(found)
    command.name = name
    return command


app = typer.Typer(
    name="bitquilt",
    cls=_Verbs,
    help="Fit a language model into the memory you have.",
    no_args_is_help=True,
    add_completion=False,  # importing torch on each press of the tab key takes seconds
    pretty_exceptions_enable=False,
    context_settings=_CONTEXT,
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
