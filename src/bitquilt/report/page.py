"""How does it read? `report_page(facts, others)` and `compare_page(panels)`: one HTML file each, with nothing to fetch.

Jinja2 escapes everything; what is not escaped is made here of numbers. The page's own policy forbids scripts and any
connection, so a name that slipped through could do nothing.
"""

import datetime
import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitquilt._version import __version__
from bitquilt.errors import UserError
from bitquilt.report.bitmap import UNIT, columns_for, picture
from bitquilt.report.compare import Panel
from bitquilt.report.evaluations import Record, newest, number, protocol_text
from bitquilt.report.facts import Facts, LayerFacts, items, section
from bitquilt.report.quilt import Quilt, quilt_of
from bitquilt.report.words import ratio_text, size_text, time_text

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_LAYERS = 1500  # drawn and listed; of more, the first: inspect lists all
_EXAMPLES = 20  # events of one kind
_PLOT_WIDTHS = (720, 330)  # for a screen and for a phone


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
        tasks=_tasks(facts.evaluations),
        layers=layers,
        left_out=len(facts.layers) - len(layers),
        quilt=quilt_of(layers),
        pictures={name: _symbol(i, layer, columns, most) for i, (name, layer) in enumerate(layers.items())},
        binned=columns,
        widths_used=sorted({bits for layer in facts.layers.values() for bits in layer.counts}),
        weights=_weights_by_bits(facts.layers.values()),
        places={name: i for i, name in enumerate(layers)},
        budget=_budget(facts),
        prediction=_prediction(facts, record),
        errors=_errors(layers),
        losses=_losses(layers),
        events=_events(facts.report),
        stages=_stages(facts.report),
        settings=_settings(facts),
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


def _weights_by_bits(layers: Iterable[LayerFacts]) -> dict[int, float]:
    """The share of the quantized weights that each width stores."""
    spent: Counter[int] = Counter()
    for layer in layers:
        for bits, channels in layer.runs:
            spent[bits] += channels * layer.out_features
    return {bits: spent[bits] / spent.total() for bits in sorted(spent)}


def _budget(facts: Facts) -> dict[str, Any] | None:
    """What was asked for and what came out, in the budget's own unit: bytes, or bits per weight."""
    budget = section(facts.report, "budget")
    target = number(budget.get("target"))
    if target is None:
        return None
    kind = str(budget.get("kind", "budget"))
    spent = number(budget.get("spent"))  # the run's own count: of the folder, or of memory with its cache
    whole = number(facts.report.get("folder_bytes")) or float(facts.size.bytes)
    got = {"bits": facts.size.nominal_bits, "bpw": facts.size.bpw}.get(kind, whole if spent is None else spent)
    return {
        "kind": kind,
        "target": target,
        "got": got,
        "in_bytes": kind not in ("bits", "bpw"),
        "share": got / target if target else None,
        "folder_bytes": int(whole),
    }


def _prediction(facts: Facts, record: Record | None) -> dict[str, Any] | None:
    """Predicted against measured, of the model as a whole."""
    prediction = section(facts.report, "prediction")
    kl, ends = number(prediction.get("kl")), prediction.get("ppl_range")
    span = [number(end) for end in ends] if isinstance(ends, list) and len(ends) == 2 else []
    low, high = span if None not in span and span else (None, None)
    if kl is None and low is None:
        return None
    perplexity = number(record.get("perplexity")) if record else None
    inside = None if perplexity is None or low is None or high is None else low <= perplexity <= high
    measured = number(record.get("kl_mean")) if record else None
    return {"kl": kl, "low": low, "high": high, "measured": measured, "perplexity": perplexity, "inside": inside}


def _errors(layers: Mapping[str, LayerFacts]) -> dict[str, Any] | None:
    """Small lines of the error by block, one for each kind of layer; None for a single block or without errors."""
    from bitquilt.report.axes import Axis
    from bitquilt.report.figures import error_lines

    quilt = quilt_of(layers)
    if len(quilt.rows) < 2:
        return None
    outputs, weights = _by_kind(quilt, "output_error"), _by_kind(quilt, "weight_error")
    by_kind, what = (outputs, "output") if outputs else (weights, "weight")
    if not by_kind:
        return None
    labels = dict(zip(quilt.kinds, quilt.labels, strict=True))
    worst = sorted(by_kind, key=lambda kind: -max(value for _, value in by_kind[kind]))[:12]
    axis = Axis.around([v for kind in worst for _, v in by_kind[kind]], 96, log=True, flip=True)
    lines = {
        labels[kind]: error_lines(points, axis, len(quilt.rows), labels[kind])
        for kind, points in by_kind.items()
        if kind in worst
    }
    return {"what": what, "lines": lines, "left_out": len(by_kind) - len(worst)}


def _by_kind(quilt: Quilt, field: str) -> dict[str, list[tuple[int, float]]]:
    """(number of the block, value) of each kind of layer that has any."""
    found: dict[str, list[tuple[int, float]]] = {}
    for at, (_, row) in enumerate(quilt.rows):
        for kind, layer in row.items():
            if (value := getattr(layer, field)) is not None:
                found.setdefault(kind, []).append((at, value))
    return found


def _losses(layers: Mapping[str, LayerFacts]) -> dict[str, Any] | None:
    """Predicted loss against the solver's, layer by layer, and how well the ranks agree."""
    from bitquilt.report.figures import scatter

    points = [(a.predicted_loss, a.loss if a.loss is not None else a.output_error) for a in layers.values()]
    both = [(p, m) for p, m in points if p is not None and m is not None]
    if len(both) < 3:
        return None
    titles = ("predicted loss", "measured loss")
    return {
        "rank": _spearman(both),
        "layers": len(both),
        "plots": [scatter(both, width, titles) for width in _PLOT_WIDTHS],
    }


def _spearman(points: Sequence[tuple[float, float]]) -> float | None:
    from scipy.stats import spearmanr

    if min(len({p for p, _ in points}), len({m for _, m in points})) < 2:
        return None  # a constant has no ranks
    found = float(spearmanr([p for p, _ in points], [m for _, m in points]).statistic)
    return found if math.isfinite(found) else None


def _events(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Events by kind, most frequent first, with some of each."""
    events = items(report, "events")
    kinds = Counter(str(event.get("kind", "unnamed")) for event in events)
    return [
        {
            "kind": kind,
            "count": count,
            "examples": [event for event in events if str(event.get("kind", "unnamed")) == kind][:_EXAMPLES],
        }
        for kind, count in kinds.most_common()
    ]


def _stages(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, time, memory, and the share of the longest stage's time."""
    seconds = [number(stage.get("seconds")) or 0.0 for stage in items(report, "stages")]
    return [
        {**stage, "share": spent / max(seconds) if max(seconds) else 0.0}
        for stage, spent in zip(items(report, "stages"), seconds, strict=True)
    ]


def _settings(facts: Facts) -> list[tuple[str, str]]:
    """Every setting and hash of the run, by its path in the file."""
    fingerprint = section(facts.report, "fingerprint")
    # Of a source the file's name only: pages are handed on, and a path says more about the user than the data.
    found = [(k, _said(Path(str(v)).name if k.endswith(".source") else v)) for k, v in _flat(fingerprint)]
    return [*found, ("checkpoint.sha256", facts.checkpoint.fingerprint())]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _said(value: Any) -> str:
    if value is None or value in ([], {}):
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _tasks(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Scores of tasks, a later run in the place of an earlier one."""
    found: dict[tuple[str, str, Any], dict[str, Any]] = {}
    for record in records:
        for task, scores in section(record, "tasks").items():
            for metric, value in scores.items() if isinstance(scores, dict) else ():
                limit = record.get("limit")
                found[task, metric, limit] = {"task": task, "metric": metric, "value": value, "limit": limit}
    return list(found.values())


def _with_plots(panel: Panel) -> dict[str, Any]:
    from bitquilt.report.figures import front_plot, mark, shapes

    enough = sum(getattr(entry, panel.metric) is not None for entry in panel.entries) > 1
    legend = {name: mark(shape, 8, 8, filled=True) for name, shape in shapes(panel).items()}
    plots = [front_plot(panel, width, height) for width, height in zip(_PLOT_WIDTHS, (380, 300), strict=True)]
    return {"panel": panel, "plots": plots if enough else [], "legend": legend}
