"""The Pareto front, and which figures can be compared."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bitquilt.errors import UserError
from bitquilt.report import compare, read_facts
from bitquilt.report.evaluation_records import Record, newest
from bitquilt.report.pareto import pareto, siblings
from bitquilt.report.run_facts import parse


def test_the_front_is_what_nothing_beats() -> None:
    chance = random.Random(0)
    points = [(chance.uniform(1, 2), chance.uniform(1, 2)) for _ in range(200)]
    front = pareto(points)
    for (size, loss), on in zip(points, front, strict=True):
        smaller = [other for other in points if other[0] * 1.001 < size and other[1] <= loss]
        if on:
            assert not smaller
        else:
            assert any(a <= size * 1.001 and b <= loss for a, b in points if (a, b) != (size, loss))
    assert 2 < sum(front) < 30
    assert pareto([(1, 1), (1, 1), (2, 2)]) == [True, True, False]
    assert pareto([(1000, 2.0), (1000.4, 1.0)]) == [False, True]  # sizes within 0.1 % are equal
    assert pareto([]) == []


def test_measured_the_same_way_they_share_a_panel(measured: Path) -> None:
    facts = [read_facts(measured / name) for name in ("rtn-4", "slim", "rtn")]
    (panel,) = compare(facts)
    assert panel.metric == "kl_mean"
    assert [entry.name for entry in panel.entries] == [
        f.name for f in sorted(facts, key=lambda f: (f.size.bytes, f.name))
    ]
    assert {entry.key: entry.name for entry in panel.entries} == {"A": "rtn-4", "B": "slim", "C": "rtn"}
    assert panel.reference_perplexity == facts[0].evaluations[0].reference_perplexity
    by_name = {entry.name: entry for entry in panel.entries}
    assert by_name["rtn-4"].front  # the largest and best
    for entry in panel.entries:
        stored = json.loads((measured / entry.name / "evaluation.json").read_text())["evaluations"][0]
        assert (entry.kl_mean, entry.perplexity) == (stored["kl_mean"], stored["perplexity"])
    assert panel.missing == ()


def test_another_protocol_is_another_panel(measured: Path) -> None:
    facts = [read_facts(measured / name) for name in ("slim", "rtn")]
    other = replace(facts[1], evaluations=[replace(facts[1].evaluations[0], seq_len=8)])
    panels = compare([facts[0], other])
    assert {panel.missing for panel in panels} == {("slim",), ("rtn",)}


def test_windows_with_and_without_bos_are_not_compared(measured: Path) -> None:
    facts = [read_facts(measured / name) for name in ("slim", "rtn")]
    record = facts[1].evaluations[0]
    assert not record.bos  # token ids
    other = replace(facts[1], evaluations=[replace(record, bos=True)])
    panels = compare([facts[0], other])
    assert {panel.missing for panel in panels} == {("slim",), ("rtn",)}
    assert len({panel.protocol for panel in panels}) == 2
    assert parse(Record, record.stored | {"bos": True}).bos


def test_divergences_from_two_references_are_not_compared(measured: Path) -> None:
    facts = [read_facts(measured / name) for name in ("slim", "rtn")]
    other = replace(facts[1], evaluations=[replace(facts[1].evaluations[0], reference_sha256="another")])
    (panel,) = compare([facts[0], other])
    assert panel.metric == "perplexity"
    assert panel.reference is None
    assert any("different references" in note for note in panel.notes)


def test_of_two_records_the_later_with_a_divergence_counts(measured: Path) -> None:
    record = read_facts(measured / "slim").evaluations[0]
    later, without = replace(record, kl_mean=0.5), replace(record, kl_mean=None)
    assert newest([record, later, without]) is later
    assert newest([without]) is without
    assert newest([parse(Record, {"tasks": {}})]) is None


def test_nothing_measured_is_an_error(measured: Path) -> None:
    facts = replace(read_facts(measured / "slim"), evaluations=[])
    with pytest.raises(UserError, match="none of the 1 checkpoints has been measured; add --text"):
        compare([facts])


def test_siblings_are_measured_checkpoints_of_the_same_model(
    measured: Path, tmp_path: Path, change: Callable[..., None]
) -> None:
    study = tmp_path / "study"
    shutil.copytree(measured, study)
    one = read_facts(study / "slim")
    assert [other.name for other in siblings(one)] == ["rtn", "rtn-4"]
    (study / "rtn" / "evaluation.json").unlink()  # not measured
    shutil.copytree(study / "rtn-4", study / "other")  # of another model
    fingerprint = json.loads((study / "other" / "report.json").read_text())["fingerprint"]
    change(study / "other" / "report.json", fingerprint=fingerprint | {"model": {"sha256": "another"}})
    shutil.copytree(study / "rtn-4", study / "damaged")
    (study / "damaged" / "report.json").write_text("{")
    assert [other.name for other in siblings(one)] == ["rtn-4"]
