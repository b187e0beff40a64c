"""Pages are valid, whole, safe and small, whatever the files say."""

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import html5lib
import pytest

from bitquilt.report import compare, compare_page, read_facts, report_page
from bitquilt.report.facts import LayerFacts
from bitquilt.report.run_facts import RunFacts, parse

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"
SVG = "{http://www.w3.org/2000/svg}"
SECTIONS = ["bits", "quality", "budget", "loss", "events", "settings", "time"]


def parse_html(page: str) -> Element:
    """Parse strictly: any error of syntax raises."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)


def texts(tree: Element) -> str:
    return " ".join(" ".join(tree.itertext()).split())


def check_safe(tree: Element) -> None:
    """Assert that there is no script, nothing that loads or reacts, and no repeated id."""
    seen: set[str] = set()
    for element in tree.iter():
        if not isinstance(element.tag, str):
            continue
        assert element.tag.rpartition("}")[2] not in {
            "script",
            "img",
            "iframe",
            "link",
            "object",
            "embed",
            "base",
            "form",
        }
        for name, value in element.attrib.items():
            key = str(name).rpartition("}")[2]
            assert not key.startswith("on")
            assert key not in ("src", "action", "data")
            if key == "href":
                assert value.startswith("#")
            if key == "id":
                assert value not in seen
                seen.add(value)
    used = {e.attrib["href"][1:] for e in tree.iter() if isinstance(e.tag, str) and "href" in e.attrib}
    assert used <= seen


@pytest.fixture
def page(measured: Path) -> str:
    facts = read_facts(measured / "slim")
    return report_page(facts, compare([facts, read_facts(measured / "rtn")]))


def test_every_part_is_there(measured: Path, page: str) -> None:
    tree = parse_html(page)
    check_safe(tree)
    assert [s.attrib.get("id") for s in tree.iter("section")] == [*SECTIONS, "absent"]
    said = texts(tree)
    facts = read_facts(measured / "slim")
    report, (record,) = facts.run.stored, facts.evaluations
    for wanted in (
        f"{report['bpw']:.3f}",
        f"{record.kl_mean:.4g}",
        f"{record.perplexity:.2f}",
        f"{record.reference_perplexity:.2f}",
        report["fingerprint"]["model"]["sha256"],
        report["fingerprint"]["calibration"]["sha256"],
        report["machine"]["cpu"],
        "quantizing the blocks",
        "model.layers.1",
        "rtn",
    ):
        assert wanted in said
    assert "default-src 'none'" in page
    assert not re.search(r"https?://", page.replace("http://www.w3.org", ""))
    assert len(list(tree.iter(f"{SVG}use"))) == 2 * len(facts.layers)


def test_names_are_text_and_nothing_else(slim: Path) -> None:
    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(inner, key) for inner in value]
        return value + EVIL if isinstance(value, str) and key not in ("bits", "created") else value

    for file in ("report.json", "evaluation.json"):
        (slim / file).write_text(json.dumps(spoil(json.loads((slim / file).read_text()))))
    report = json.loads((slim / "report.json").read_text())
    report["events"] = [{"layer": EVIL, "kind": EVIL, "detail": EVIL}]
    report["fingerprint"][EVIL] = EVIL
    report["budget"] = {"kind": EVIL, "target": 3.0}
    (slim / "report.json").write_text(json.dumps(report))
    record = json.loads((slim / "evaluation.json").read_text())["evaluations"][0]
    record["tasks"] = {EVIL: {EVIL: 0.5}}
    (slim / "evaluation.json").write_text(json.dumps({"evaluations": [record]}))
    folder = slim.rename(slim.parent / EVIL.replace("/", "|"))
    facts = read_facts(folder)
    first = next(iter(facts.layers.values()))
    layers = {f"model.layers.0.{EVIL}": replace(first, name=EVIL), EVIL: replace(first, name=EVIL), **facts.layers}
    layers = {name: replace(layer, name=name) for name, layer in layers.items()}
    facts = replace(facts, layers=layers)
    panels = compare([facts])
    for page in (report_page(facts, panels), compare_page(panels)):
        tree = parse_html(page)
        check_safe(tree)
        assert "alert(1)" in texts(tree)
        assert "49" not in re.findall(r"&(\d+)", texts(tree))  # the template language is not run on names


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [1, "x"], {"a": {"b": 1}}, [{"name": 3}], float("nan")])
def test_a_report_may_say_anything(slim: Path, value: object) -> None:
    """Each key of the first two levels in turn holds a value that does not belong there."""
    report = json.loads((slim / "report.json").read_text()) | {
        "budget": {"kind": "bpw", "target": 3.7},
        "prediction": {"kl": 0.1, "ppl_range": [1.0, 2.0]},
    }
    facts = read_facts(slim)
    for key in report:
        inner = report[key] if isinstance(report[key], dict) and key != "layers" else {}
        for changed in ({key: value}, *({key: inner | {name: value}} for name in inner)):
            assert "<h1>slim</h1>" in report_page(replace(facts, run=parse(RunFacts, report | changed)))


def test_without_anything_but_weights_the_page_says_what_is_absent(slim: Path) -> None:
    for name in ("report.json", "plan.json", "evaluation.json"):
        (slim / name).unlink()
    said = texts(parse_html(report_page(read_facts(slim))))
    assert "Not measured yet" in said
    assert "Unknown: this checkpoint has no report.json." in said
    for what in ("report.json", "stored order", "KL divergence and perplexity"):
        assert what in said[said.index("What is missing", 500) :]


def test_budget_and_prediction_beside_what_came_out(slim: Path, change: Callable[..., None]) -> None:
    report = json.loads((slim / "report.json").read_text())
    layers = {name: layer | {"predicted_loss": 2 * layer["loss"]} for name, layer in report["layers"].items()}
    change(
        slim / "report.json",
        layers=layers,
        budget={
            "kind": "size",
            "target": 2 * report["folder_bytes"],
            "bytes": report["folder_bytes"],
            "bpw": report["bpw"],
        },
        prediction={"kl": 0.125, "ppl_range": [1.0, 1e6]},
    )
    facts = read_facts(slim)
    assert not any("predicted" in one.what for one in facts.absent)
    said = texts(parse_html(report_page(facts)))
    assert "50 % of it" in said
    whole = report["folder_bytes"]
    assert f"The whole folder takes {whole} bytes; {report['bytes']} of them are weights." in said
    assert "0.125" in said
    assert ", inside the range" in said
    assert "rank correlation is 1.00" in said


@pytest.mark.parametrize(("factors", "said"), [((0.9, 1.1), ", inside the range"), ((1.1, 1.2), ", outside the range")])
def test_a_predicted_perplexity_is_moved_to_the_measured_text(
    slim: Path, factors: tuple[float, float], said: str
) -> None:
    """The full-precision model has a perplexity of 20 on the predicted text, and another on the measured one."""
    record = json.loads((slim / "evaluation.json").read_text())["evaluations"][-1]
    share = record["reference_perplexity"] / 20
    scaled = [record["perplexity"] / share * factor for factor in factors]
    report = json.loads((slim / "report.json").read_text())
    report["prediction"] = {"kl": 0.1, "ppl_range": scaled, "perplexity_full_precision": 20.0}
    page = texts(parse_html(report_page(replace(read_facts(slim), run=parse(RunFacts, report)))))
    assert said in page
    assert f"{scaled[0] * share:.2f} to {scaled[1] * share:.2f}" in page


def many_layers(blocks: int, channels: int) -> Iterator[LayerFacts]:
    """Random bits per channel: the worst case for a picture. The seven kinds of a block are those of every block."""
    chance = random.Random(0)
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    drawn = {kind: "".join(chance.choices("234", k=channels)) for kind in kinds}
    runs = {kind: [(int(digit), 1) for digit in bits] for kind, bits in drawn.items()}
    for block in range(blocks):
        for kind in kinds:
            error = chance.uniform(1e-4, 1e-1)
            yield LayerFacts(
                name=f"model.layers.{block}.mlp.{kind}",
                out_features=channels,
                in_features=channels,
                runs=runs[kind],
                in_order=True,
                groups=drawn[kind],
                group_size=1,
                counts={2: 1, 3: 1, 4: 1},
                nominal_bits=3.0,
                bpw=3.2,
                outliers=0,
                loudest_first=False,
                output_error=error,
                weight_error=error,
                loss=1e3 * error,
                predicted_loss=2 * error,
                seconds=1.5,
            )


def test_a_model_of_80_blocks_and_11008_channels_is_a_small_page(measured: Path) -> None:
    facts = replace(read_facts(measured / "slim"), layers={layer.name: layer for layer in many_layers(80, 11008)})
    page = report_page(facts)
    assert len(page) < 3_000_000
    assert page.count("<use ") == 2 * 560
    assert "rank correlation" in page


def test_of_very_many_layers_the_page_shows_some_and_says_so(measured: Path) -> None:
    layers = {layer.name: layer for layer in many_layers(300, 8)}
    page = report_page(replace(read_facts(measured / "slim"), layers=layers))
    assert "600 more layers are not drawn" in page


def test_more_kinds_than_fit_side_by_side_are_listed(measured: Path) -> None:
    layers = {
        name: replace(layer, name=name)
        for i, layer in enumerate(many_layers(4, 16))
        for name in [f"layers.{i // 14}.experts_{i % 14}"]
    }
    tree = parse_html(report_page(replace(read_facts(measured / "slim"), layers=layers)))
    assert not [t for t in tree.iter("table") if t.attrib.get("class") == "quilt"]
    assert len([d for d in tree.iter("div") if d.attrib.get("class") == "strip"]) == 28


def test_more_bits_are_darker_on_paper_and_brighter_on_a_dark_screen() -> None:
    style = (Path(report_page.__code__.co_filename).parent / "templates" / "style.css").read_text()
    light, dark = (
        [luminance(colour) for colour in re.findall(r"--b\d:#([0-9a-f]{3,6});", part)]
        for part in style.split("prefers-color-scheme:dark")[:2]
    )
    assert len(light) == len(dark) == 8
    steps = [a - b for a, b in itertools.pairwise(light)]
    assert all(step > 3 for step in steps)
    assert all(step > 12 for step in steps[:3])  # the widths that are used
    assert all(b - a > 2 for a, b in itertools.pairwise(dark))


def luminance(colour: str) -> float:
    """CIE lightness, 0 to 100, of a hexadecimal colour."""
    wide = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    channels = [int(wide[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y
