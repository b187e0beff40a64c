"""HTML pages of one file that fetch nothing: `report_page` shows one checkpoint, `compare_page` several; `check_target`
and `write_page` write them.

Jinja2 escapes all text; only markup made here from numbers is not escaped. The page's own policy forbids scripts and
connections, so a name that slipped through could do nothing.
"""

import datetime
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bitquilt._version import __version__
from bitquilt.core.units import percent_text, ratio_text, size_text, time_text
from bitquilt.errors import UserError
from bitquilt.report import page_values as values
from bitquilt.report.bitmap import UNIT, columns_for, picture
from bitquilt.report.evaluation_records import newest
from bitquilt.report.facts import Facts, LayerFacts
from bitquilt.report.layer_grid import layer_grid
from bitquilt.report.pareto import Panel
from bitquilt.report.run_facts import number

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_LAYERS = 1500  # layers that a page draws and lists; inspect lists all
_HEIGHTS = (380, 300)  # of a plot for a screen and for a phone


class PlottedPanel(NamedTuple):
    """A panel with its plot in two widths and a mark for each recipe."""

    panel: Panel
    plots: Sequence["Markup"]
    legend: dict[str, "Markup"]


def report_page(facts: Facts, panels: Sequence[Panel] = ()) -> str:
    """The page of one checkpoint; `panels` compare it with others of the same model, measured the same way."""
    check_ready()
    layers = dict(list(facts.layers.items())[:_MOST_LAYERS])
    grid = layer_grid(layers)
    columns = columns_for([layer.runs for layer in layers.values()])
    most = max(bits for layer in layers.values() for bits, _ in layer.runs)
    record = newest(facts.evaluations)
    return _render(
        "report.html.jinja",
        facts=facts,
        run=facts.run,
        record=record,
        tasks=values.tasks_of(facts.evaluations),
        left_out=len(facts.layers) - len(layers),
        grid=grid,
        pictures=[_symbol(i, layer, columns, most) for i, layer in enumerate(layers.values())],
        columns=columns,
        weights=values.weights_by_bits(facts.layers.values()),
        places={name: i for i, name in enumerate(layers)},
        spent=values.spent_of(facts),
        prediction=values.prediction_of(facts, record),
        errors=values.errors_of(grid),
        losses=values.losses_of(layers),
        events=values.events_of(facts.run.events),
        longest=max((stage.seconds for stage in facts.run.stages), default=0.0),
        settings=values.settings_of(facts),
        panels=[_plotted(panel) for panel in panels],
        predicted=any(layer.predicted_loss is not None for layer in layers.values()),
    )


def compare_page(panels: Sequence[Panel]) -> str:
    """The page of several checkpoints: a plot and a table for each protocol."""
    check_ready()
    return _render("compare.html.jinja", panels=[_plotted(panel) for panel in panels])


def check_target(path: Path) -> Path:
    """Return `path` if a page can be written there; call it before the expensive step.

    Raises UserError for a folder, a file that is not .html, a missing folder, and without jinja2."""
    check_ready()
    if path.is_dir():
        raise UserError(f"{path} is a folder; give --out a file, such as {path / 'report.html'}")
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path} does not end in .html; give --out such a name, so that no other file is overwritten")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} to write {path.name} to; create it, or give another --out")
    return path


def write_page(path: Path, page: str) -> None:
    """Write a page atomically: a reader sees the old page or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another --out") from None


def check_ready() -> None:
    """Raise UserError where the packages that pages need are not installed."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise UserError("pages need jinja2, which is not installed; run: pip install 'bitquilt[report]'") from None


def _render(template: str, **content: Any) -> str:
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    return _environment().get_template(template).render(**content, version=__version__, written=stamp)


@functools.cache
def _environment() -> "Environment":
    import jinja2

    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "size": _or_dash(size_text),
        "time": _or_dash(time_text),
        "ratio": _or_dash(ratio_text),
        "digits": _or_dash(_digits),
        "fixed": _or_dash(lambda value, places=3: f"{value:.{places}f}"),
        "percent": _or_dash(percent_text),
        "breakable": _breakable,
    }
    return environment


def _or_dash(say: Callable[..., str]) -> Callable[..., str]:
    return lambda value, *rest: "–" if (found := number(value)) is None else say(found, *rest)


def _breakable(path: str) -> "Markup":
    """A module path that wraps before its dots."""
    from markupsafe import Markup

    return Markup("<wbr>.").join(path.split("."))


def _digits(value: float) -> str:
    """Four significant digits; an exponent only where the zeros would not fit."""
    return f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e7 else f"{value:.4g}"


def _symbol(i: int, layer: LayerFacts, columns: int, most: int) -> "Markup":
    from markupsafe import Markup

    width, paths = picture(layer.runs, columns)
    high = UNIT * most
    drawn = Markup("").join(Markup('<path class="b{}" d="{}"/>').format(bits, path) for bits, path in paths)
    symbol = Markup('<symbol id="l{}" viewBox="0 -{} {} {}" preserveAspectRatio="none">{}</symbol>')
    return symbol.format(i, high, width, high, drawn)


def _plotted(panel: Panel) -> PlottedPanel:
    from bitquilt.report.figures import front_plot, mark, shapes

    enough = sum(getattr(entry, panel.metric) is not None for entry in panel.entries) > 1
    legend = {name: mark(shape, 8, 8, filled=True) for name, shape in shapes(panel).items()}
    sizes = zip(values.PLOT_WIDTHS, _HEIGHTS, strict=True)
    return PlottedPanel(panel, [front_plot(panel, *size) for size in sizes] if enough else [], legend)
