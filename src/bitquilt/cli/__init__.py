"""`bitquilt`, the command: which verbs there are. Each is a function in a file of its name."""

from bitquilt.cli.app import app
from bitquilt.cli.compare import compare_checkpoints
from bitquilt.cli.demo import demo
from bitquilt.cli.doctor import doctor
from bitquilt.cli.eval import evaluate
from bitquilt.cli.generate import generate
from bitquilt.cli.inspect import inspect
from bitquilt.cli.law import law_app
from bitquilt.cli.output import run_cli
from bitquilt.cli.plan import plan
from bitquilt.cli.quantize import quantize
from bitquilt.cli.report import report

app.command()(quantize)
app.command()(plan)
app.command("eval")(evaluate)
app.command()(inspect)
app.command()(report)
app.command("compare")(compare_checkpoints)
app.command()(generate)
app.command()(demo)
app.command()(doctor)
app.add_typer(law_app, name="law")


def main() -> None:
    """Entry point of the `bitquilt` command."""
    run_cli(app)
