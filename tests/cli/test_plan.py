"""`bitquilt plan`: what a budget buys, for people and for scripts."""

import json
from pathlib import Path
from typing import Any

import pytest

from bitquilt.cli.demo import DEMO_MODEL
from bitquilt.model.checkpoint import open_checkpoint

from .conftest import Command

GROUPS = ("--recipe", "slim-llm", "--group-size", "16")
NARROW = ("--recipe", "slim-llm", "--bpw", "9", "--group-size", "8")
KEYS = {"bytes", "bpw", "nominal_bits", "reachable_bytes", "memory", "estimate", "layers", "permits", "untouched"}


def test_json_for_scripts_and_a_table_for_people(command: Command, tiny: Path, tmp_path: Path) -> None:
    ran = command("plan", tiny, "--recipe", "gptq", "--bits", "3", *GROUPS, "--json")
    assert ran.code == 0
    value = json.loads(ran.out)
    assert value.keys() >= KEYS
    assert value["nominal_bits"] == 3 < value["bpw"]
    least, most = value["reachable_bytes"]
    assert least < value["bytes"] < most
    assert len(value["layers"]) == 14
    assert value["prediction"] is None
    assert value["permits"]["gptq format, one width per layer"] == {"layers": 14, "of": 14, "why_not": None}
    assert value["permits"]["compressed-tensors, packed 4 or 8 bits"]["layers"] == 0
    ran = command("plan", tiny, "--size", str((least + most) // 2), *GROUPS, "--layers")
    assert ran.code == 0
    for text in ("up_proj", "in the whole folder", "--measure", "outside the blocks", "cpu kernels", "2048 tokens"):
        assert text in ran.out
    parameters = open_checkpoint(tiny).weights
    assert value["bits_per_parameter"] == pytest.approx(8 * value["bytes"] / parameters, rel=1e-6)
    assert sum(part["nbytes"] for part in value["contents"]) == value["bytes"]


def test_what_the_bytes_hold_comes_first(command: Command, tiny: Path) -> None:
    kept = command("plan", tiny, "--bits", "3", "--recipe", "gptq", *GROUPS).out
    assert "up_proj" not in kept
    first = " ".join(" ".join(kept.splitlines()[:10]).split())
    assert "bits per parameter" in first
    assert "head 31% at 16 bits, embedding 31% at 16 bits, blocks" in first
    assert "--head-bits 6 takes" in first
    shared = command("plan", tiny, "--size", "500kB", "--recipe", "gptq", *GROUPS).out
    assert "-bits 6" not in shared


def test_a_budget_that_does_not_fit(command: Command, tiny: Path) -> None:
    ran = command("plan", tiny, "--size", "20kB", *GROUPS, "--json")
    assert ran.code == 4
    value = json.loads(ran.out)
    assert value["fits"] is False
    assert 20_000 < value["reachable_bytes"][0] < value["reachable_bytes"][1]
    ran = command("plan", tiny, "--size", "20kB", *GROUPS)
    assert ran.code == 4
    assert "does not fit" in ran.err
    ran = command("quantize", tiny, "nowhere", "--size", "20kB", *GROUPS)
    assert ran.code == 2
    assert "reaches" in ran.err


@pytest.mark.parametrize(
    ("flags", "budget"),
    [
        (("--bpw", "1.2"), {"kind": "bpw", "value": 1.2, "ctx": None}),
        (("--bpw", "64"), {"kind": "bpw", "value": 64.0, "ctx": None}),
        (("--bits", "0.5"), {"kind": "bits", "value": 0.5, "ctx": None}),
        (("--bits", "8.5"), {"kind": "bits", "value": 8.5, "ctx": None}),
        (("--vram", "30kB", "--ctx", "16"), {"kind": "vram", "value": 30_000, "ctx": 16}),
        (("--size", "20kB"), {"kind": "size", "value": 20_000, "ctx": None}),
    ],
)
def test_every_refusal_says_what_can_be_reached(
    flags: tuple[str, ...], budget: dict[str, Any], command: Command, tiny: Path
) -> None:
    ran = command("plan", tiny, *flags, *GROUPS, "--json")
    assert ran.code == 4
    value = json.loads(ran.out)
    assert value["budget"] == budget
    assert value["fits"] is False
    whole = budget["kind"] in ("vram", "size")  # then embedding and head take part
    usual = ("--size", "1GB") if whole else ("--bits", "3")
    fits = json.loads(command("plan", tiny, *usual, *GROUPS, "--json").out)
    assert value["reachable_bytes"] == fits["reachable_bytes"]
    least, most = value["reachable"]
    assert least < most
    assert not least <= budget["value"] <= most
    if budget["kind"] == "vram":  # the least that is named does fit, a byte less does not
        codes = [
            command("plan", tiny, "--vram", str(int(least) - less), "--ctx", "16", *GROUPS).code for less in (0, 1)
        ]
        assert codes == [0, 4]
    if budget["kind"] == "size":
        assert value["reachable"] == value["reachable_bytes"]


def test_measure_once_plan_often_quantize_the_plan(
    command: Command, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ("--calibration", text, "--samples", "4", "--seq-len", "16")
    ran = command("plan", tiny, "--measure", *data, "--bpw", "5.5", *GROUPS, "--json")
    assert ran.code == 0
    assert (tmp_path / f"{tiny.name}-slim-llm.sensitivities").is_file()
    first = json.loads(ran.out)
    assert 5.4 < first["bpw"] <= 5.5
    ran = command("plan", tiny, *NARROW, "--out", "p.json", "--skip", "*.up_proj", *data)
    assert f"{tiny.name}-slim-llm.sensitivities is here but not used" in ran.err
    assert "not exact: `quantize` measures first" in ran.out
    assert f"OUT --plan p.json --calibration {text} --samples 4 --seq-len 16 --skip '*.up_proj'" in ran.out
    ran = command("plan", tiny, *NARROW, "--sensitivities", f"{tiny.name}-slim-llm.sensitivities")
    assert ran.code == 2
    assert first["prediction"]["kl"] > 0
    assert sum(layer["predicted_loss"] for layer in first["layers"].values()) == pytest.approx(
        first["prediction"]["kl"]
    )
    ran = command("plan", tiny, "--bpw", "6", *GROUPS, "--json", "--out", "plan.json")
    second = json.loads(ran.out)
    assert second["prediction"]["kl"] < first["prediction"]["kl"]
    ran = command("quantize", tiny, "out", "--plan", "plan.json", *data, "--json")  # the group size is the plan's
    assert ran.code == 0
    assert json.loads(ran.out)["folder_bytes"] == second["bytes"]
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) == second["bytes"]
    shown = command("plan", tiny, "--bpw", "6", *GROUPS)
    assert "KL about" in shown.out
    shown = command("plan", tiny, "--bpw", "4.8", "--embedding-bits", "4", *GROUPS)
    assert "excluding the rounding of the embedding" in shown.out
    ran = command("quantize", tiny, "no", "--plan", "plan.json", *data, "--set", "symmetric=true")
    assert ran.code == 2
    assert "symmetric=False, not True" in ran.err
    ran = command("quantize", tiny, "no", "--plan", "plan.json", *data, "--bits", "2.5")
    assert ran.code == 2
    assert "a plan and the budget 2.5 bits both say" in ran.err


def test_the_flags_of_quantize(command: Command, tiny: Path, text: Path, tmp_path: Path) -> None:
    data = ("--calibration", text, "--samples", "4", "--seq-len", "16", *GROUPS)
    ran = command("quantize", tiny, tmp_path / "out", "--bits", "2.5", "--allocation", "layers", *data, "--json")
    assert ran.code == 0
    value = json.loads(ran.out)
    assert value["budget"]["scope"] == "layers"
    assert 2.48 < value["nominal_bits"] <= 2.5
    assert "budget" in command("quantize", tiny, tmp_path / "out", "--bits", "2.5", "--allocation", "layers", *data).out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "lots"], "'lots' is not a size; wanted such as 6.5GiB"),
        (["--size", "1GB", "--vram", "1GB", "--ctx", "8"], "size and vram are budgets for the same run"),
        (["--vram", "1GB"], "vram needs ctx"),
        (["--allocation", "everywhere"], "unknown allocation 'everywhere'"),
        (["--sensitivities", "missing"], "no sensitivities at missing"),
        (["--bits", "9"], "bits is 9"),
        (["--measure", "--calibration", "none.txt"], "none.txt does not exist"),
        (["--measure", "--sensitivities", "/proc/none/s"], "cannot write the sensitivities to /proc/none/s"),
        (["--out", "nowhere/plan.json"], "cannot write the plan to nowhere/plan.json: there is no folder nowhere"),
        (["--recipe", "micromix"], "from calibration data, so it has no fixed budget"),
    ],
)
def test_mistakes(command: Command, tiny: Path, flags: list[str], message: str) -> None:
    ran = command("plan", tiny, *flags)
    assert ran.code == 2
    assert message in ran.err


@pytest.mark.parametrize(("engine", "recipe"), [(None, "cmpq+"), ("mlx", "quilt"), ("gguf", "quilt")])
def test_the_recipe_without_being_asked(command: Command, engine: str | None, recipe: str) -> None:
    """An engine's files hold uniform steps only."""
    flags = () if engine is None else ("--for", engine, "--embedding-bits", "8")
    assert json.loads(command("plan", DEMO_MODEL, "--bpw", "5", *flags, "--json").out)["recipe"]["name"] == recipe
