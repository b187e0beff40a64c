"""How does it read? `report_page(facts, others)` and `compare_page(panels)`: one HTML file each, with nothing to fetch.

Jinja2 escapes everything; what is not escaped is made here of numbers. The page's own policy forbids scripts and any
connection, so a name that slipped through could do nothing.
"""

import datetime
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitquilt._version import __version__
from bitquilt.core.units import ratio_text, size_text, time_text
from bitquilt.errors import UserError
from bitquilt.report.bitmap import UNIT, columns_for, picture
from bitquilt.report.facts import Facts, LayerFacts, items, section
from bitquilt.report.pareto import Panel
from bitquilt.report.remembered import newest, number, protocol_text
from bitquilt.report.skyline import quilt_of
from bitquilt.report.values import (
    PLOT_WIDTHS,
    budget_of,
    errors_of,
    events_of,
    losses_of,
    prediction_of,
    settings_of,
    stages_of,
    tasks_of,
    weights_by_bits,
)

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_LAYERS = 1500  # drawn and listed; of more, the first: inspect lists all


def report_page(facts: Facts, panels: Sequence[Panel] = ()) -> str:
    """One checkpoint, and in `panels` the others of the same model that were measured the same way."""
    check_ready()
    layers = dict(list(facts.layers.items())[:_MOST_LAYERS])
    columns = columns_for([layer.runs for layer in layers.values()])
    most = max(bits for layer in layers.values() for bits, _ in layer.runs)
    record = newest(facts.evaluations)
    return _render(
        "report.html.jinja",
        facts=facts,
        report=facts.report,
        record=record,
        protocol=protocol_text(record) if record else None,
        tasks=tasks_of(facts.evaluations),
        layers=layers,
        left_out=len(facts.layers) - len(layers),
        quilt=quilt_of(layers),
        pictures={name: _symbol(i, layer, columns, most) for i, (name, layer) in enumerate(layers.items())},
        binned=columns,
        widths_used=sorted({bits for layer in facts.layers.values() for bits in layer.counts}),
        weights=weights_by_bits(facts.layers.values()),
        places={name: i for i, name in enumerate(layers)},
        budget=budget_of(facts),
        prediction=prediction_of(facts, record),
        errors=errors_of(layers),
        losses=losses_of(layers),
        events=events_of(facts.report),
        stages=stages_of(facts.report),
        settings=settings_of(facts),
        panels=[_with_plots(panel) for panel in panels],
        predicted=any(layer.predicted_loss is not None for layer in layers.values()),
    )


def compare_page(panels: Sequence[Panel]) -> str:
    """Several checkpoints, a plot and a table for each protocol."""
    check_ready()
    return _render("compare.html.jinja", panels=[_with_plots(panel) for panel in panels])


def _render(template: str, **values: Any) -> str:
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    return _environment().get_template(template).render(**values, version=__version__, written=stamp)


def check_ready() -> None:
    """Before the expensive step. Raises UserError where the packages that write pages are not installed."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise UserError("pages need jinja2, which is not installed: pip install 'bitquilt[report]'") from None


@functools.cache
def _environment() -> "Environment":
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": _or_dash(size_text),
        "time": _or_dash(time_text),
        "ratio": _or_dash(ratio_text),
        "digits": _or_dash(_digits),
        "fixed": lambda value, places=3: "–" if number(value) is None else f"{value:.{places}f}",
        "percent": lambda value, places=1: "–" if number(value) is None else f"{100 * value:.{places}f} %",
    }
    environment.filters["breakable"] = _breakable
    environment.globals["items"] = items
    environment.globals["section"] = section
    return environment


def _or_dash(say: Any) -> Any:
    return lambda value: "–" if number(value) is None else say(number(value))


def _breakable(path: str) -> "Markup":
    """A module path that may wrap before its dots, and nowhere else unless it must."""
    from markupsafe import Markup

    return Markup("<wbr>.").join(path.split("."))


def _digits(value: float) -> str:
    """Four significant digits, an exponent only where the zeros would not fit."""
    return f"{value:.2e}" if value and not 1e-4 <= abs(value) < 1e7 else f"{value:.4g}"


def _symbol(i: int, layer: LayerFacts, columns: int, most: int) -> "Markup":
    from markupsafe import Markup

    width, paths = picture(layer.runs, columns)
    high = UNIT * most
    drawn = Markup("").join(Markup('<path class="b{}" d="{}"/>').format(bits, path) for bits, path in paths)
    return Markup('<symbol id="l{}" viewBox="0 -{} {} {}" preserveAspectRatio="none">{}</symbol>').format(
        i, high, width, high, drawn
    )


def _with_plots(panel: Panel) -> dict[str, Any]:
    from bitquilt.report.figures import front_plot, mark, shapes

    enough = sum(getattr(entry, panel.metric) is not None for entry in panel.entries) > 1
    legend = {name: mark(shape, 8, 8, filled=True) for name, shape in shapes(panel).items()}
    plots = [front_plot(panel, width, height) for width, height in zip(PLOT_WIDTHS, (380, 300), strict=True)]
    return {"panel": panel, "plots": plots if enough else [], "legend": legend}
