"""Facts of a checkpoint's files, including missing and damaged ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bitquilt.errors import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.report import read_facts, remember
from bitquilt.report.evaluation_records import Record, read_records
from bitquilt.report.run_facts import parse, section


def test_facts_are_those_of_the_files(measured: Path) -> None:
    facts = read_facts(measured / "slim")
    report = json.loads((measured / "slim" / "report.json").read_text())
    assert facts.run.stored == report
    assert (facts.size.bytes, facts.size.bpw) == (report["bytes"], report["bpw"])
    assert sum(facts.parts.values()) == open_checkpoint(measured / "slim").nbytes
    assert facts.parts["not quantized"] == sum(item["nbytes"] for item in report["untouched"])
    for name, layer in facts.layers.items():
        stored = report["layers"][name]
        assert layer.groups == stored["bits"]
        assert layer.in_order
        assert sum(width for _, width in layer.runs) == layer.in_features
        channels = [bits for bits, width in layer.runs for _ in range(width)]
        groups = [int(d) for d in stored["bits"] for _ in range(stored["group_size"])]
        assert channels == groups[: layer.in_features]
        assert (layer.output_error, layer.loss) == (stored["output_error"], stored["loss"])
    assert [one.what for one in facts.absent] == ["predicted loss per layer"]


def test_without_a_report_the_plan_tells_where_the_bits_went(slim: Path) -> None:
    before = read_facts(slim)
    (slim / "report.json").unlink()
    facts = read_facts(slim)
    assert {n: layer.runs for n, layer in facts.layers.items()} == {n: layer.runs for n, layer in before.layers.items()}
    (slim / "plan.json").write_text("[")
    facts = read_facts(slim)
    assert not any(layer.in_order for layer in facts.layers.values())
    for name, layer in facts.layers.items():
        assert layer.counts == before.layers[name].counts
    assert "report.json" in facts.absent[0].what
    assert any("stored order" in one.what for one in facts.absent)


@pytest.mark.parametrize("bits", ["", "22", "9" * 4, 2, None, "2222222222222222222222"])
def test_a_layer_s_bits_that_do_not_fit_are_not_believed(slim: Path, change: Callable[..., None], bits: object) -> None:
    report = json.loads((slim / "report.json").read_text())
    name = next(iter(report["layers"]))
    report["layers"][name]["bits"] = bits
    change(slim / "report.json", layers=report["layers"])
    layer = read_facts(slim).layers[name]
    assert (layer.groups, layer.in_order) == (None, False)
    assert sum(width for _, width in layer.runs) == layer.in_features


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("report.json", "{", "report.json is damaged: .*; copy it again, or move it away"),
        ("report.json", "[]", "was not written by bitquilt"),
        ("report.json", "{}", "was not written by bitquilt"),
        ("evaluation.json", "{", "is not JSON"),
        ("evaluation.json", "[]", "is not an evaluation"),
        ("evaluation.json", '{"evaluations": [3]}', "is not an evaluation"),
        ("evaluation.json", '{"accuracy": 3}', "without a perplexity"),
        ("evaluation.json", '{"format_version": 9, "evaluations": []}', "upgrade bitquilt"),
        ("config.json", "{}", "is full precision"),
        ("config.json", '{"quantization_config": {"quant_method": "awq"}}', r"another tool \(awq\)"),
    ],
)
def test_damaged_files_are_named(slim: Path, file: str, content: str, message: str) -> None:
    (slim / file).write_text(content)
    with pytest.raises(UserError, match=message):
        read_facts(slim)


def test_a_folder_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        read_facts(tmp_path)


def test_figures_of_another_checkpoint_are_refused(measured: Path, slim: Path) -> None:
    other = measured / "rtn-4" / "evaluation.json"
    with pytest.raises(UserError, match="another checkpoint"):
        read_facts(slim, [other])
    own = slim / "evaluation.json"
    own.rename(slim.parent / "told.json")
    assert read_facts(slim).evaluations == []
    assert len(read_facts(slim, [slim.parent / "told.json"]).evaluations) == 1


def test_a_record_takes_the_place_of_an_older_one(slim: Path) -> None:
    checkpoint = open_checkpoint(slim)
    (before,) = read_records(slim / "evaluation.json")
    remember(checkpoint, parse(Record, {**before.stored, "perplexity": 1.5}))
    remember(checkpoint, parse(Record, {**before.stored, "perplexity": 2.5, "seq_len": 8}))
    assert [r.perplexity for r in read_records(slim / "evaluation.json")] == [1.5, 2.5]


def test_only_our_folders_and_files_are_written_to(make_model: Callable[..., Path], measured: Path, slim: Path) -> None:
    (record,) = read_records(measured / "slim" / "evaluation.json")
    source = make_model("llama")
    assert remember(open_checkpoint(source), record) is None
    assert not (source / "evaluation.json").exists()
    (slim / "evaluation.json").write_text('{"theirs": 1}')
    assert remember(open_checkpoint(slim), record) is None
    assert (slim / "evaluation.json").read_text() == '{"theirs": 1}'


def test_a_section_is_an_object_or_nothing() -> None:
    assert section({"a": {"b": 1}}, "a") == {"b": 1}
    assert section({"a": [1]}, "a") == section({}, "a") == {}
