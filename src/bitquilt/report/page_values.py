"""What the report page shows, as plain values for its template: `spent_of`, `prediction_of`, `errors_of`, `losses_of`,
`events_of`, `settings_of`, `tasks_of` and `weights_by_bits`."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bitquilt.core.types import Event
from bitquilt.report.evaluation_records import Record
from bitquilt.report.facts import Facts, LayerFacts
from bitquilt.report.layer_grid import LayerGrid
from bitquilt.report.run_facts import RunFacts, number, section

if TYPE_CHECKING:
    from markupsafe import Markup

PLOT_WIDTHS = (720, 330)  # for a screen and for a phone
_MOST_LINES = 12  # small plots of errors
_EXAMPLES = 20  # events of one kind


class PredictionOutcome(NamedTuple):
    """Predicted and measured KL and perplexity. `moved`: the predicted range was scaled to the measured text."""

    kl: float | None
    low: float | None
    high: float | None
    measured_kl: float | None
    perplexity: float | None
    inside: bool | None
    moved: bool


class ErrorLines(NamedTuple):
    """Error by block as one small plot per kind of layer. `what`: output or weight. `left_out`: kinds not drawn."""

    what: str
    lines: Mapping[str, "Markup"]
    left_out: int


class LossScatter(NamedTuple):
    """Predicted against measured loss of `layers` layers. `rank`: Spearman's correlation."""

    rank: float | None
    layers: int
    plots: Sequence["Markup"]


class EventKind(NamedTuple):
    """Events of one kind: how many (`number`), and the first of them."""

    kind: str
    number: int
    examples: Sequence[Event]


class TaskScore(NamedTuple):
    """One metric of one task; `limit` is the number of examples if not all were used."""

    task: str
    metric: str
    value: float
    limit: int | None


def weights_by_bits(layers: Iterable[LayerFacts]) -> dict[int, float]:
    """The share of the quantized weights stored at each width."""
    spent: Counter[int] = Counter()
    for layer in layers:
        for bits, channels in layer.runs:
            spent[bits] += channels * layer.out_features
    return {bits: spent[bits] / spent.total() for bits in sorted(spent)}


def spent_of(facts: Facts) -> float | None:
    """What was spent, in the unit of the run's budget; None without a budget."""
    budget, size = facts.run.budget, facts.size
    spent = float(facts.folder_bytes) if budget.spent is None else budget.spent
    return None if budget.target is None else {"bits": size.nominal_bits, "bpw": size.bpw}.get(budget.kind, spent)


def prediction_of(facts: Facts, record: Record | None) -> PredictionOutcome | None:
    """The prediction for the whole model next to what was measured.

    The predicted range of perplexities holds for the calibration text. It is scaled to the measured text where the
    full-precision model's perplexity is known on both."""
    predicted = facts.run.prediction
    low, high = predicted.ppl_range if len(predicted.ppl_range) == 2 else (None, None)
    if predicted.kl is None and low is None:
        return None
    there = predicted.perplexity_full_precision
    here = None if record is None else record.reference_perplexity
    moved = bool(low and high and here and there)
    if low and high and here and there:
        low, high = low * here / there, high * here / there
    kl, perplexity = (None, None) if record is None else (record.kl_mean, record.perplexity)
    inside = None if perplexity is None or low is None or high is None else low <= perplexity <= high
    return PredictionOutcome(predicted.kl, low, high, kl, perplexity, inside, moved)


def errors_of(grid: LayerGrid) -> ErrorLines | None:
    """Error by block for each kind of layer, the worst kinds; None for a single block or without errors."""
    from bitquilt.report.chart_axes import PlotAxis
    from bitquilt.report.figures import error_lines

    outputs, weights = _by_kind(grid, "output_error"), _by_kind(grid, "weight_error")
    by_kind, what = (outputs, "output") if outputs else (weights, "weight")
    if len(grid.rows) < 2 or not by_kind:
        return None
    labels = dict(zip(grid.kinds, grid.labels, strict=True))
    worst = sorted(by_kind, key=lambda kind: -max(value for _, value in by_kind[kind]))[:_MOST_LINES]
    axis = PlotAxis.around([value for kind in worst for _, value in by_kind[kind]], 96, log=True, flip=True)
    lines = {
        labels[kind]: error_lines(points, axis, len(grid.rows), labels[kind])
        for kind, points in by_kind.items()
        if kind in worst
    }
    return ErrorLines(what, lines, len(by_kind) - len(worst))


def _by_kind(grid: LayerGrid, field: str) -> dict[str, list[tuple[int, float]]]:
    """(number of the block, value) for each kind of layer that has any."""
    found: dict[str, list[tuple[int, float]]] = {}
    for at, (_, row) in enumerate(grid.rows):
        for kind, layer in row.items():
            if (value := getattr(layer, field)) is not None:
                found.setdefault(kind, []).append((at, value))
    return found


def losses_of(layers: Mapping[str, LayerFacts]) -> LossScatter | None:
    """Predicted loss against the solver's, layer by layer; None for fewer than three layers that have both."""
    from bitquilt.report.figures import scatter

    points = [(a.predicted_loss, a.loss if a.loss is not None else a.output_error) for a in layers.values()]
    both = [(predicted, measured) for predicted, measured in points if predicted is not None and measured is not None]
    if len(both) < 3:
        return None
    titles = ("predicted loss", "measured loss")
    return LossScatter(_spearman(both), len(both), [scatter(both, width, titles) for width in PLOT_WIDTHS])


def _spearman(points: Sequence[tuple[float, float]]) -> float | None:
    from scipy.stats import spearmanr

    predicted, measured = [p for p, _ in points], [m for _, m in points]
    if min(len(set(predicted)), len(set(measured))) < 2:
        return None  # a constant has no ranks
    found = float(spearmanr(predicted, measured).statistic)
    return found if math.isfinite(found) else None


def events_of(events: Sequence[Event]) -> list[EventKind]:
    """Events by kind, the most frequent first."""
    kinds = Counter(event.kind for event in events)
    return [
        EventKind(kind, count, [event for event in events if event.kind == kind][:_EXAMPLES])
        for kind, count in kinds.most_common()
    ]


def settings_of(facts: Facts) -> list[tuple[str, str]]:
    """Every setting and hash of the run by its path in report.json, and how another tool had quantized the source.

    A source is named without its folders: pages are passed on, and a path tells more about the user than the data."""
    source = section(facts.run.model, "source")
    flat = _flat({**facts.run.fingerprint, **({"quantized source": source} if source else {})})
    found = [(key, _shown(Path(str(value)).name if key.endswith(".source") else value)) for key, value in flat]
    return [*found, ("checkpoint.sha256", facts.checkpoint.fingerprint())]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _shown(value: object) -> str:
    if value is None or value in ([], {}):
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def tasks_of(records: Sequence[Record]) -> list[TaskScore]:
    """Scores of tasks; a later run replaces an earlier one."""
    found = {
        (task, metric, record.limit): TaskScore(task, metric, value, record.limit)
        for record in records
        for task in record.tasks
        for metric, score in section(record.tasks, task).items()
        if (value := number(score)) is not None
    }
    return list(found.values())


def allocator_totals(run: RunFacts) -> dict[str, dict[str, float]]:
    """Sum each allocator's tabulated error and loss after the sweep over all layers, for recipes that compare several.

    Allocators that some layer lacks are left out."""
    layers = [section(run.stored, "layers")[name] for name in section(run.stored, "layers")]
    totals: dict[str, dict[str, float]] = {}
    for kind, key in (("by table", "table_error"), ("after sweep", "swept_loss")):
        entries = [found for layer in layers if isinstance(layer, dict) and (found := section(layer, key))]
        names = [name for name in (entries[0] if entries else ()) if all(name in entry for entry in entries)]
        sums = {name: sum(number(entry[name]) or 0.0 for entry in entries) for name in names}
        totals |= {kind: sums} if sums else {}
    return totals
