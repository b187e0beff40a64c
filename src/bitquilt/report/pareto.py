"""Quality against size: `compare` makes a panel of checkpoints per protocol, `pareto` finds the front, `siblings` other
checkpoints of the same model.

A checkpoint is on the Pareto front if no other is as small and as good, and better in one of the two.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Literal

from bitquilt.errors import UserError
from bitquilt.report.evaluation_records import FILE, Protocol, Record, newest
from bitquilt.report.facts import Facts, read_facts
from bitquilt.report.run_facts import string

Metric = Literal["kl_mean", "perplexity"]
_SAME_SIZE = 1e-3  # relative difference between sizes that count as equal
_SIBLINGS = 64  # neighbouring folders to read: enough for a study, few enough for a second


@dataclass(frozen=True)
class Entry:
    """One checkpoint in a panel: `bytes` on disk and its quality; `key` is its letter in the plot."""

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
    """Checkpoints measured the same way.

    `metric`: the divergence if all have one from the same reference, else the perplexity. `missing`: names of those
    that were not measured this way."""

    protocol: str
    metric: Metric
    reference: str | None
    reference_perplexity: float | None
    reference_bytes: int | None
    entries: tuple[Entry, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]


def compare(facts: Sequence[Facts], wanted: Sequence[Protocol] | None = None) -> list[Panel]:
    """Return a panel per protocol (of `wanted`, else of all records), those with most checkpoints first.

    Raises UserError if nothing was measured."""
    keys = {id(one): _key(i) for i, one in enumerate(facts)}
    by_protocol: dict[Protocol, list[tuple[Facts, Record]]] = {p: [] for p in wanted or ()}
    for one in facts:
        for found in dict.fromkeys(record.protocol for record in one.evaluations):
            record = newest(one.evaluations, found)
            if record is not None and (wanted is None or found in by_protocol):
                by_protocol.setdefault(found, []).append((one, record))
    panels = [_panel(measured, facts, keys) for measured in by_protocol.values() if measured]
    if not panels:
        raise UserError(
            f"none of the {len(facts)} checkpoints has been measured; add --text FILE (and --reference MODEL for "
            "the KL divergence), or run bitquilt eval on each"
        )
    return sorted(panels, key=lambda panel: (-len(panel.entries), panel.protocol))


def siblings(one: Facts) -> list[Facts]:
    """Measured checkpoints of the same model in the neighbouring folders, such as the other runs of a study."""
    here = one.checkpoint.folder.resolve()
    found: list[Facts] = []
    if not one.run.model_sha256:
        return found
    candidates = (p for p in sorted(here.parent.iterdir()) if p != here and (p / FILE).is_file())
    for path, _ in zip(candidates, range(_SIBLINGS), strict=False):
        try:
            other = read_facts(path)
        except UserError:  # not ours, or damaged
            continue
        if other.run.model_sha256 == one.run.model_sha256:
            found.append(other)
    return found


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return whether each (size, loss) is on the front. Smaller is better in both, and equal points share their place.

    Sizes within 0.1 % count as equal, so that the maps of mixed layers do not hide a better loss for the same bytes.
    """

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        smaller, as_small = one[0] * (1 + _SAME_SIZE) < other[0], one[0] <= other[0] * (1 + _SAME_SIZE)
        return as_small and one[1] <= other[1] and (smaller or one[1] < other[1])

    return [not any(beats(other, point) for other in points) for point in points]


def _panel(measured: Sequence[tuple[Facts, Record]], facts: Sequence[Facts], keys: Mapping[int, str]) -> Panel:
    records = [record for _, record in measured]
    with_kl = [record for record in records if record.kl_mean is not None]
    references = {record.reference_sha256 for record in with_kl}
    metric: Metric = "kl_mean" if len(with_kl) == len(records) and len(references) == 1 else "perplexity"
    entries = [_entry(one, record, keys[id(one)]) for one, record in measured]
    points = [(float(entry.bytes), value) for entry in entries if (value := getattr(entry, metric)) is not None]
    on = iter(pareto(points))
    entries = [replace(e, front=next(on)) if getattr(e, metric) is not None else e for e in entries]
    there = {id(one) for one, _ in measured}
    shared = next((r for r in with_kl if r.reference_perplexity is not None), None) if len(references) == 1 else None
    return Panel(
        protocol=records[0].protocol_text,
        metric=metric,
        reference=None if shared is None else Path(shared.reference).name,
        reference_perplexity=None if shared is None else shared.reference_perplexity,
        reference_bytes=None if shared is None else measured[0][0].fp16_bytes,
        entries=tuple(sorted(entries, key=lambda e: (e.bytes, e.name))),
        missing=tuple(one.name for one in facts if id(one) not in there),
        notes=tuple(_notes(measured, references)),
    )


def _entry(one: Facts, record: Record, key: str) -> Entry:
    return Entry(
        key=key,
        name=one.name,
        folder=str(one.checkpoint.folder),
        recipe=one.recipe_name,
        bytes=one.size.bytes,
        bpw=one.size.bpw,
        nominal_bits=one.size.nominal_bits,
        perplexity=record.perplexity,
        kl_mean=record.kl_mean,
        top1_agreement=record.top1_agreement,
    )


def _notes(measured: Sequence[tuple[Facts, Record]], references: set[str]) -> Iterator[str]:
    if len(references) > 1:
        yield "the divergences are from different references, so the plot shows perplexity instead"
    sources = {one.run.model_sha256 for one, _ in measured} - {""}
    if len(sources) > 1:
        names = sorted({string(one.run.model.get("name")) or one.name for one, _ in measured})
        yield (
            f"the checkpoints come from {len(sources)} different models ({', '.join(names)}); compare perplexities "
            "only between models with the same tokenizer"
        )
    if len({record.dtype for _, record in measured}) > 1:
        yield "the checkpoints were not all computed in the same data type"


def _key(i: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    head, last = divmod(i, len(ascii_uppercase))
    return (_key(head - 1) if head else "") + ascii_uppercase[last]
