"""What does a page say? From the facts of a checkpoint to the plain values that the templates show."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitquilt.report.facts import Facts, LayerFacts, items, section
from bitquilt.report.remembered import Record, number
from bitquilt.report.skyline import Quilt, quilt_of

PLOT_WIDTHS = (720, 330)  # for a screen and for a phone
_EXAMPLES = 20  # events of one kind


def weights_by_bits(layers: Iterable[LayerFacts]) -> dict[int, float]:
    """The share of the quantized weights that each width stores."""
    spent: Counter[int] = Counter()
    for layer in layers:
        for bits, channels in layer.runs:
            spent[bits] += channels * layer.out_features
    return {bits: spent[bits] / spent.total() for bits in sorted(spent)}


def budget_of(facts: Facts) -> dict[str, Any] | None:
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


def prediction_of(facts: Facts, record: Record | None) -> dict[str, Any] | None:
    """Predicted against measured, of the model as a whole. The range of perplexities is of the calibration text: where
    the full-precision model's perplexity on the measured one is known, it is moved there, the ratio being kept."""
    prediction = section(facts.report, "prediction")
    kl, ends = number(prediction.get("kl")), prediction.get("ppl_range")
    span = [number(end) for end in ends] if isinstance(ends, list) and len(ends) == 2 else []
    low, high = span if None not in span and span else (None, None)
    if kl is None and low is None:
        return None
    perplexity = number(record.get("perplexity")) if record else None
    here = number(record.get("reference_perplexity")) if record else None
    there = number(prediction.get("perplexity_full_precision"))
    moved = bool(low and high and here and there)
    if low and high and here and there:
        low, high = low * here / there, high * here / there
    inside = None if perplexity is None or low is None or high is None else low <= perplexity <= high
    measured = number(record.get("kl_mean")) if record else None
    return {"kl": kl, "low": low, "high": high, "measured": measured, "perplexity": perplexity, "inside": inside,
            "moved": moved}  # fmt: skip


def errors_of(layers: Mapping[str, LayerFacts]) -> dict[str, Any] | None:
    """Small lines of the error by block, one for each kind of layer; None for a single block or without errors."""
    from bitquilt.report.chart_axes import Axis
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


def losses_of(layers: Mapping[str, LayerFacts]) -> dict[str, Any] | None:
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
        "plots": [scatter(both, width, titles) for width in PLOT_WIDTHS],
    }


def _spearman(points: Sequence[tuple[float, float]]) -> float | None:
    from scipy.stats import spearmanr

    if min(len({p for p, _ in points}), len({m for _, m in points})) < 2:
        return None  # a constant has no ranks
    found = float(spearmanr([p for p, _ in points], [m for _, m in points]).statistic)
    return found if math.isfinite(found) else None


def events_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
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


def stages_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, time, memory, and the share of the longest stage's time."""
    seconds = [number(stage.get("seconds")) or 0.0 for stage in items(report, "stages")]
    return [
        {**stage, "share": spent / max(seconds) if max(seconds) else 0.0}
        for stage, spent in zip(items(report, "stages"), seconds, strict=True)
    ]


def settings_of(facts: Facts) -> list[tuple[str, str]]:
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


def tasks_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Scores of tasks, a later run in the place of an earlier one."""
    found: dict[tuple[str, str, Any], dict[str, Any]] = {}
    for record in records:
        for task, scores in section(record, "tasks").items():
            for metric, value in scores.items() if isinstance(scores, dict) else ():
                limit = record.get("limit")
                found[task, metric, limit] = {"task": task, "metric": metric, "value": value, "limit": limit}
    return list(found.values())
