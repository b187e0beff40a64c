"""`bitquilt report` and `bitquilt compare`: files written, tables printed, mistakes named."""

import json
import shutil
from pathlib import Path

import pytest

import bitquilt

from .conftest import Command


@pytest.fixture(scope="module")
def study(quantized: Path, tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model quantized by slim-llm and by rtn, without an evaluation."""
    folder = tmp_path_factory.mktemp("study")
    shutil.copytree(quantized, folder / "slim", ignore=shutil.ignore_patterns("evaluation.json"))
    bitquilt.quantize(tiny, "rtn", text, folder / "rtn", bits=3, group_size=16, samples=4, seq_len=16)
    return folder


def test_a_page_beside_the_weights_and_what_it_lacks(command: Command, study: Path) -> None:
    ran = command("report", study / "rtn")
    assert ran.code == 0
    page = study / "rtn" / "report.html"
    assert "<h1>rtn</h1>" in page.read_text()
    assert str(page) in ran.out
    assert "bitquilt eval" in ran.err


def test_measured_they_are_compared_and_reported(command: Command, study: Path, tiny: Path, text: Path) -> None:
    out = study / "both.html"
    flags = ("--text", text, "--reference", tiny, "--seq-len", 32, "--out", out)
    ran = command("compare", study / "slim", study / "rtn", *flags, "--json")
    assert ran.code == 0
    value = json.loads(ran.out)
    (panel,) = value["panels"]
    assert panel["metric"] == "kl_mean"
    assert {entry["name"] for entry in panel["entries"]} == {"slim", "rtn"}
    assert any(entry["front"] for entry in panel["entries"])
    assert "Pareto front" in out.read_text()
    assert "measuring slim" in ran.err
    again = command("compare", study / "slim", study / "rtn", *flags)
    assert "measuring" not in again.err  # remembered
    assert "perplexity" in again.out
    told = json.loads(command("eval", study / "slim", *flags[:6], "--json", "--no-save").out)
    entry = next(entry for entry in panel["entries"] if entry["name"] == "slim")
    assert (told["kl_mean"], told["perplexity"]) == (entry["kl_mean"], entry["perplexity"])
    value = json.loads(command("report", study / "slim", "--json").out)
    page = Path(value["out"]).read_text()
    assert (value["panels"], value["bytes"]) == (1, len(page.encode()))
    assert page.count(">rtn<") >= 1  # found in the neighbouring folder
    alone = json.loads(command("report", study / "slim", "--alone", "--json", "--out", study / "alone.html").out)
    assert ">rtn<" not in Path(alone["out"]).read_text()
    named = ("--alone", "--baseline", study / "rtn", "--out", study / "alone.html")
    assert command("report", study / "slim", *named, "--quiet").out == ""
    assert ">rtn<" in (study / "alone.html").read_text()
    shown = command("inspect", study / "slim").out
    assert "quality     KL" in shown
    assert "of memory" in shown


def test_a_map_of_digits(command: Command, study: Path) -> None:
    plan = json.loads((study / "slim" / "plan.json").read_text())["layers"]
    lines = command("inspect", study / "slim", "--map").out.splitlines()
    for name, layer in plan.items():
        assert [line.split()[1] for line in lines if line.startswith(f"{name} ")] == [layer["bits"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "TINY"], "is full precision; wanted a checkpoint that bitquilt quantize wrote"),
        (["report", "/nowhere"], "no folder at"),
        (["report", "SLIM", "--out", "SLIM"], "is a folder; give --out a file"),
        (["report", "SLIM", "--out", "SLIM/model.safetensors"], "does not end in .html"),
        (["report", "SLIM", "--out", "/nowhere/a.html"], "there is no folder /nowhere"),
        (["report", "SLIM", "--evaluation", "/nowhere.json"], "cannot read the evaluation /nowhere.json"),
        (["compare", "SLIM", "--reference", "TINY", "--out", "x.html"], "give --text FILE too"),
        (["compare", "SLIM", "SLIM", "--out", "x.html"], "is given twice"),
        (["compare", "TINY", "--out", "x.html"], "is full precision"),
        (["compare", "BARE", "--out", "x.html"], "none of the 1 checkpoints has been measured"),
    ],
)
def test_what_a_user_may_get_wrong(
    command: Command, quantized: Path, tiny: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(quantized, bare, ignore=shutil.ignore_patterns("evaluation.json"))
    names = {"TINY": str(tiny), "SLIM": str(quantized), "BARE": str(bare)}
    given = [
        argument for a in arguments for argument in [a.replace("SLIM", names["SLIM"]) if "/" in a else names.get(a, a)]
    ]
    ran = command(*given)
    assert (ran.code, ran.out) == (2, "")
    assert message in " ".join(ran.err.split())


def test_without_jinja_the_fix_is_named(command: Command, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    ran = command("report", study / "rtn", "--out", study / "none.html")
    assert ran.code == 2
    assert "pip install 'bitquilt[report]'" in ran.err
    assert not (study / "none.html").exists()
