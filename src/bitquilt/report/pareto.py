"""Which checkpoint gives the most for its bytes? `compare(facts) -> [Panel]`, one for each protocol measured.

A checkpoint is on the Pareto front where no other is as small and as good, and better in one of the two.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from bitquilt.errors import UserError
from bitquilt.report.facts import Facts, read_facts, section
from bitquilt.report.remembered import FILE, Protocol, Record, newest, number, protocol, protocol_text

Metric = Literal["kl_mean", "perplexity"]
_SAME_SIZE = 1e-3
_SIBLINGS = 64  # folders looked into beside a checkpoint: enough for a study, few enough to read in a second


@dataclass(frozen=True)
class Entry:
    """One checkpoint's place: `bytes` on disk, quality on one protocol; `key` names it in the picture."""

    key: str
    name: str
    folder: str
    recipe: str
    bytes: int
    bpw: float
    nominal_bits: float
    perplexity: float | None
    kl_mean: float | None
    top1_agreement: float | None
    front: bool = False


@dataclass(frozen=True)
class Panel:
    """Checkpoints measured the same way. `metric`: the divergence where all have one from the same reference,
    else the perplexity. `missing`: names of those that were not measured so."""

    protocol: str
    metric: Metric
    reference: str | None
    reference_perplexity: float | None
    reference_bytes: int | None
    entries: tuple[Entry, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]


def compare(facts: Sequence[Facts], wanted: Sequence[Protocol] | None = None) -> list[Panel]:
    """A panel for each protocol (of `wanted`, else of all records), most checkpoints first.

    Raises UserError where nothing was measured."""
    keys = {id(one): _key(i) for i, one in enumerate(facts)}
    by_protocol: dict[Protocol, list[tuple[Facts, Record]]] = {p: [] for p in wanted or ()}
    for one in facts:
        for found in dict.fromkeys(protocol(record) for record in one.evaluations):
            record = newest(one.evaluations, found)
            if record is not None and (wanted is None or found in by_protocol):
                by_protocol.setdefault(found, []).append((one, record))
    panels = [_panel(measured, facts, keys) for measured in by_protocol.values() if measured]
    if not panels:
        raise UserError(
            f"none of the {len(facts)} checkpoints has figures; give --text FILE, and --reference MODEL for the KL, "
            "or measure each with bitquilt eval"
        )
    return sorted(panels, key=lambda panel: (-len(panel.entries), panel.protocol))


def siblings(one: Facts) -> list[Facts]:
    """Measured checkpoints of the same model in the folders beside this one: the RTN and GPTQ runs of a study."""
    here = one.checkpoint.folder.resolve()
    found: list[Facts] = []
    if one.source is None:
        return found
    candidates = (p for p in sorted(here.parent.iterdir()) if p != here and (p / FILE).is_file())
    for path, _ in zip(candidates, range(_SIBLINGS), strict=False):
        try:
            other = read_facts(path)
        except UserError:  # not ours, or damaged: it is not what was asked for
            continue
        if other.source == one.source:
            found.append(other)
    return found


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each (size, loss) is on the front; both are better when smaller, equal points share their place.

    Sizes within 0.1 % count as equal: the maps of a mixed layer must not hide that it is better for the same bytes.
    """

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        smaller, as_small = one[0] * (1 + _SAME_SIZE) < other[0], one[0] <= other[0] * (1 + _SAME_SIZE)
        return as_small and one[1] <= other[1] and (smaller or one[1] < other[1])

    return [not any(beats(other, point) for other in points) for point in points]


def recipe_label(one: Facts) -> str:
    """slim-llm, or cmpq; what a report that is missing does not say is unknown."""
    return str(one.recipe.get("name", "unknown"))


def _panel(measured: Sequence[tuple[Facts, Record]], facts: Sequence[Facts], keys: Mapping[int, str]) -> Panel:
    records = [record for _, record in measured]
    divergences = [number(record.get("kl_mean")) for record in records]
    references = {record.get("reference_sha256") for record in records if number(record.get("kl_mean")) is not None}
    metric: Metric = "kl_mean" if None not in divergences and len(references) == 1 else "perplexity"
    entries = [_entry(one, record, keys[id(one)]) for one, record in measured]
    points = [(float(entry.bytes), value) for entry in entries if (value := getattr(entry, metric)) is not None]
    on = iter(pareto(points))
    entries = [replace(e, front=next(on)) if getattr(e, metric) is not None else e for e in entries]
    there = {id(one) for one, _ in measured}
    sharing = [r for r in records if number(r.get("reference_perplexity")) is not None] if len(references) == 1 else []
    return Panel(
        protocol_text(records[0]),
        metric,
        Path(str(sharing[0]["reference"])).name if sharing else None,
        number(sharing[0]["reference_perplexity"]) if sharing else None,
        measured[0][0].fp16_bytes if sharing else None,
        tuple(sorted(entries, key=lambda e: (e.bytes, e.name))),
        tuple(one.name for one in facts if id(one) not in there),
        tuple(_notes(measured, references)),
    )


def _entry(one: Facts, record: Record, key: str) -> Entry:
    figures: dict[str, Any] = {name: number(record.get(name)) for name in ("perplexity", "kl_mean", "top1_agreement")}
    return Entry(
        key, one.name, str(one.checkpoint.folder), recipe_label(one), one.size.bytes, one.size.bpw,
        one.size.nominal_bits, **figures,
    )  # fmt: skip


def _notes(measured: Sequence[tuple[Facts, Record]], references: set[Any]) -> Iterator[str]:
    if len(references) > 1:
        yield "the divergences are from different references: they are listed, not compared"
    sources = {one.source for one, _ in measured if one.source is not None}
    if len(sources) > 1:
        names = sorted({str(section(one.report, "model").get("name", one.name)) for one, _ in measured})
        yield (
            f"the checkpoints were made from {len(sources)} different models ({', '.join(names)}): perplexities of "
            "different tokenizers do not compare"
        )
    if len({record.get("dtype") for _, record in measured}) > 1:
        yield "not all were computed in the same type"


def _key(i: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    head, last = divmod(i, len(ascii_uppercase))
    return (_key(head - 1) if head else "") + ascii_uppercase[last]
