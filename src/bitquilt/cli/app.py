"""The `bitquilt` command: `main` runs the typer app `app`, which has one verb per file. `load_verb` imports a verb when
it is called: most verbs import torch, which the list of verbs does not need."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from bitquilt._version import __version__
from bitquilt.cli.output import EXIT_USER_ERROR, EXIT_WRONG_RESULT, stderr
from bitquilt.errors import UserError, VerificationError
from bitquilt.threads import sleep_at_barriers

_CONTEXT = {"help_option_names": ["-h", "--help"]}


class _Verb(NamedTuple):
    """`home`: `module:name` of a function or a typer app; `help`: its line in the list, and above its own help."""

    home: str
    help: str


VERBS = {
    "quantize": _Verb("quantize:quantize", "Quantize a model block by block. Run it again to continue after a stop."),
    "plan": _Verb("plan:plan", "Show what a budget buys, before quantizing. Exit code 4: no plan fits the budget."),
    "eval": _Verb("eval:evaluate", "Measure perplexity, divergence from a reference, and scores on lm-eval tasks."),
    "inspect": _Verb("inspect:inspect", "List bits, size and error of every layer and of the whole model."),
    "report": _Verb("report:report", "Write an HTML page about a checkpoint from the figures that it keeps."),
    "compare": _Verb(
        "compare:compare_checkpoints",
        "Compare checkpoints: quality against size and the Pareto front, as page and table.",
    ),
    "generate": _Verb("generate:generate", "Continue a prompt and stream the text to stdout."),
    "bench": _Verb("bench:bench", "Measure tokens per second, memory bandwidth used and peak memory."),
    "export": _Verb("export:export", "Write a checkpoint in the files of another engine, such as MLX or vLLM."),
    "demo": _Verb("demo:demo", "Quantize the packaged model of 5.8M parameters by several recipes and compare them."),
    "doctor": _Verb("doctor:doctor", "Show what this machine can use and run a self-test of one second."),
    "law": _Verb("law:law_app", "Fit scaling laws to small runs and predict a loss: D-CPT Law, or loss against bits."),
}


class _Verbs(TyperGroup):
    """The verbs by name. While they are listed, only names and help lines are made."""

    listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the verb, importing its file; None for an unknown name."""
        if cmd_name not in VERBS:
            return None
        if self.listing:
            return TyperCommand(cmd_name, help=VERBS[cmd_name].help)
        return load_verb(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the list of verbs."""
        self.listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self.listing = False


def load_verb(name: str) -> Any:
    """Return the command of a verb with all of its options."""
    verb = VERBS[name]
    module, _, member = verb.home.partition(":")
    found = getattr(importlib.import_module(f"bitquilt.cli.{module}"), member)
    if not isinstance(found, typer.Typer):
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=_CONTEXT)
        alone.command(name)(grouped(found))
        found = alone
    command = typer.main.get_command(found)
    command.name, command.help = name, verb.help
    return command


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """Return `verb` as typer should see it: each parameter that is a dataclass becomes one keyword per field."""
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {}
    shown: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb).parameters.values():
        hint = hints[parameter.name]
        if is_dataclass(hint):
            groups[parameter.name] = hint
            own = get_type_hints(hint, include_extras=True)
            shown += [
                parameter.replace(name=f.name, kind=parameter.KEYWORD_ONLY, default=f.default, annotation=own[f.name])
                for f in fields(hint)
            ]
        else:
            shown.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hint))

    @functools.wraps(verb)
    def call(**given: Any) -> None:
        packed = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        verb(**packed, **given)

    call.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return call


app = typer.Typer(
    name="bitquilt",
    cls=_Verbs,
    help="Fit a language model into the memory you have.",
    no_args_is_help=True,
    add_completion=False,  # completion would import torch on every press of the tab key
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


def main(verbs: Callable[[], Any] = app) -> None:
    """Run the command line and turn the user's mistakes into one line on stderr and an exit code.

    `BITQUILT_TRACEBACK=1` keeps the traceback, for bug reports.
    """
    sleep_at_barriers()  # no verb has imported torch yet
    try:
        verbs()
    except (UserError, VerificationError) as error:
        if os.environ.get("BITQUILT_TRACEBACK") == "1":
            raise
        stderr.print(f"[bold red]error:[/] {escape(str(error))}")
        raise SystemExit(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_WRONG_RESULT) from None
    finally:
        try:  # while a closed pipe (`| head`) can still be caught; at exit Python would complain
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
