"""`bitquilt law` from a table to a mixture, as a user types it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from bitquilt.cli.app import main
from bitquilt.cli.law import law_app
from bitquilt.errors import UserError
from bitquilt.laws import DCPTLaw, LawFile, save

SHARES = (0.90, 0.91, 0.92, 0.924, 0.93, 0.94, 1.0)
GENERAL = (2.9052, 2.9193, 2.9376, 2.9445, 2.9644, 2.9848, 3.4667)
DOMAIN = (1.7321, 1.7312, 1.7311, 1.7291, 1.7279, 1.7265, 1.7220)
QUICK = ("--starts", "20", "--draws", "4")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(law_app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> dict[str, object]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def write_csv(path: Path, header: str, rows: Sequence[Sequence[object]]) -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published trade-off: both losses of every mixture, each with the share of its own text."""
    rows = [
        row
        for share, general, domain in zip(SHARES, GENERAL, DOMAIN, strict=True)
        for row in (("1.8e9", "1e10", share, domain, "chemistry"), ("1.8e9", "1e10", 1 - share, general, "general"))
    ]
    return write_csv(tmp_path_factory.mktemp("law") / "runs.csv", "n_params,n_tokens,ratio,loss,domain", rows)


@pytest.fixture(scope="module")
def law(runs: Path) -> Path:
    path = runs.with_name("law.json")
    assert run("fit", runs, "-o", path, *QUICK, "--quiet").exit_code == 0
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A law over sizes and tokens, written without a fit."""
    parameters = {
        "E": 1.5,
        "A": 0.4,
        "alpha": 0.3,
        "B": 0.6,
        "beta": 0.3,
        "eta": 0.8,
        "C": 0.05,
        "eps": 0.0,
        "gamma": 0.4,
    }
    path = tmp_path_factory.mktemp("wide") / "law.json"
    save(path, LawFile("dcpt", {"all": DCPTLaw(**parameters)}, ""))
    return path


def test_fit_says_how_good_and_what_is_not_known(runs: Path, tmp_path: Path) -> None:
    result = run("fit", runs, "-o", tmp_path / "law.json", *QUICK)
    assert result.exit_code == 0
    assert "chemistry" in result.stdout
    assert "alpha cannot be identified" in result.stderr
    told = run_json("fit", runs, "-o", tmp_path / "law.json", *QUICK)
    assert told["kind"] == "dcpt"
    assert told["laws"]["general"]["goodness"]["max_error"] <= 5.5e-3
    assert any("beta cannot be identified" in note for note in told["laws"]["general"]["warnings"])
    assert json.loads((tmp_path / "law.json").read_text())["laws"]["general"]["report"]["data_sha256"]


def test_predict_prints_the_losses(law: Path, tmp_path: Path) -> None:
    points = write_csv(
        tmp_path / "points.csv",
        "n_params,n_tokens,ratio,domain",
        [("1.8e9", "1e10", 0.924, "chemistry"), ("1.8e9", "1e10", 0.076, "general")],
    )
    predictions = run_json("predict", law, points)["predictions"]
    assert [p["loss"] for p in predictions] == [pytest.approx(1.7291, abs=2e-3), pytest.approx(2.9445, abs=5.5e-3)]
    assert predictions[0]["n_params"] == 1_800_000_000
    assert predictions[0]["low"] <= predictions[0]["high"]
    assert run("predict", law, points, "-o", tmp_path / "out.csv").exit_code == 0
    assert (tmp_path / "out.csv").read_text().startswith("n_params,n_tokens,ratio,domain,loss,low,high,spread\n")
    alone = write_csv(tmp_path / "alone.csv", "n_params,n_tokens,ratio", [("1.8e9", "1e10", 0.924)])
    named = run_json("predict", law, alone, "--domain", "chemistry")["predictions"]
    assert named[0]["loss"] == pytest.approx(predictions[0]["loss"])


@pytest.mark.parametrize(
    "bound", [("--max-general-loss", 2.946006), ("--tolerance", 0.03, "--general-loss", 2.8602)], ids=["limit", "share"]
)
def test_optimise_finds_the_published_mixture(law: Path, bound: tuple[object, ...]) -> None:
    choice = run_json("optimise", law, "--params", "1.8e9", "--tokens", "1e10", *bound)
    assert choice["ratio"] == pytest.approx(0.924, abs=0.01)
    assert choice["general_loss"] <= choice["max_general_loss"]
    assert choice["feasible"] is True


def test_optimise_with_scarce_text_and_under_compute(wide: Path) -> None:
    scarce = run_json("optimise", wide, "--params", "1.8e9", "--domain-tokens", "5e9")
    assert scarce["ratio"] == pytest.approx(0.134107, abs=1e-5)
    spent = run_json("optimise", wide, "--compute", "1.08e20")
    assert 6 * spent["n_params"] * spent["n_tokens"] == pytest.approx(1.08e20)
    assert "domain text" in run("optimise", wide, "--compute", "1.08e20").stdout


def test_plot_draws_a_picture(law: Path, runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = run_json("plot", law, runs, "-o", tmp_path / "law.png")
    assert (told["domain"], told["general"], told["warnings"]) == ("chemistry", "general", [])
    assert (tmp_path / "law.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_names_the_extra(
    law: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("plot", law, runs, "-o", tmp_path / "law.png")
    assert isinstance(result.exception, UserError)
    assert "pip install 'bitquilt[report]'" in str(result.exception)


def test_loss_against_bits(tmp_path: Path) -> None:
    bits = np.array([2.1, 2.5, 3.0, 4.0, 6.0])
    table = write_csv(tmp_path / "bits.csv", "bpw,loss", list(zip(bits, 2.2 + 9 * 2 ** (-1.8 * bits), strict=True)))
    told = run_json("fit", table, "-o", tmp_path / "law.json", *QUICK)
    assert told["kind"] == "bpw"
    points = write_csv(tmp_path / "points.csv", "bpw", [(3.5,)])
    predictions = run_json("predict", tmp_path / "law.json", points)["predictions"]
    assert predictions[0]["loss"] == pytest.approx(2.2 + 9 * 2 ** (-1.8 * 3.5), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is nothing to optimise under"),
        (("--max-general-loss", 2.9), "--params is None; a bound on the general loss needs a count above 0"),
        (("--max-general-loss", 2.9, "--tolerance", 0.1), "give one of them"),
        (("--tolerance", 3, "--general-loss", 2.8), "--tolerance is 3.0; wanted a share from 0 to 1"),
        (("--compute", 1e20, "--domain-tokens", 1e9), "two different questions"),
        (("--max-general-loss", 2.9, "--params", "7e9", "--tokens", "1e10"), "one N"),
        (("--max-general-loss", 2.9, "--domain", "law"), "got domain 'law'"),
    ],
)
def test_optimise_refuses_unclear_questions(law: Path, arguments: tuple[object, ...], message: str) -> None:
    result = run("optimise", law, *arguments)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


def test_a_mistake_exits_with_two_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    table = write_csv(tmp_path / "runs.csv", "n_params,n_tokens,ratio,loss", [(1e9, 1e9, 30, 2.0)] * 4)
    monkeypatch.setattr(sys, "argv", ["law", "fit", str(table)])
    with pytest.raises(SystemExit) as ended:
        main(law_app)
    assert ended.value.code == 2


def test_wide_law_json_is_valid_without_a_report(wide: Path) -> None:
    assert json.loads(wide.read_text())["laws"]["all"]["report"] is None
