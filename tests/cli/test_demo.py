"""`bitquilt demo`, end to end on two blocks of the packaged model with little data."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bitquilt.cli import demo
from bitquilt.cli.demo import DEMO_MODEL

from .conftest import Command


@pytest.fixture
def two_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The packaged model with two of its blocks, as the model of the demo: a third of the work."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.startswith("model.layers.") or n.split(".")[2] in "01"}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(demo, "DEMO_MODEL", folder)
    return folder


def test_the_demo_compares_and_is_not_done_twice(command: Command, two_blocks: Path, tmp_path: Path) -> None:
    ran = command("demo", "--quick", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert [line.split("]")[0] for line in ran.err.splitlines()] == [f"[{i}/8" for i in range(1, 9)]
    assert "windows" in ran.out
    assert "text that the full-precision model wrote itself" in ran.out
    for recipe in ("rtn", "gptq", "slim-llm", "quilt"):
        assert f"{recipe}, 2 bits: " in ran.out
    assert "cmpq+, 2." in ran.out
    assert f"bitquilt inspect {tmp_path / 'out' / 'quick' / 'cmpq+-2bit'}" in ran.out

    def made() -> dict[Path, int]:  # what was measured is measured again
        return {
            p: p.stat().st_mtime_ns
            for p in (tmp_path / "out").rglob("*.*")
            if p.name not in ("evaluation.json", "compare.html")
        }

    before = made()
    again = command("demo", "--quick", "--out", tmp_path / "out", "--json", "--quiet")
    assert again.err == ""
    assert made() == before
    rows = json.loads(again.out)["rows"]
    assert [row["nominal_bits"] for row in rows[:-1]] == [16, 2, 2, 2, 2]
    assert 0.995 * rows[1]["bpw"] < rows[-1]["bpw"] <= rows[1]["bpw"]
    assert rows[0]["kl_mean"] == 0
    assert rows[0]["bytes"] == (two_blocks / "model.safetensors").stat().st_size
    assert all(row["kl_mean"] > 0.02 for row in rows[1:-1])  # two bits hurt two blocks
    assert 0.001 < rows[-1]["kl_mean"] < min(row["kl_mean"] for row in rows[1:-1])
    assert len({row["sample"] for row in rows}) > 4  # two blocks write little sense, and twice the same
    assert all(row["sample"].startswith(row["prompt"]) for row in rows)


def test_the_model_is_packaged_whole() -> None:
    assert {path.name for path in DEMO_MODEL.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
