"""`benchmarks.gpu` from end to end at sizes without meaning: the kernels interpreted where there is no GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu, gpu_parts, gpu_setup, gpu_slim
from benchmarks.common import ROOT

from bitquilt.ops import cpu_kernels
from bitquilt.ops.gpu import launch
from bitquilt.ops.gpu import tuned_tilings as tuned
from bitquilt.ops.gpu.prepared_weight import prepared
from bitquilt.ops.gpu.tiling import choose_tiling
from bitquilt.ops.stored_weight import StoredWeight

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not GPU and not cpu_kernels.built(), reason="the package was installed without its kernels"
)


def test_parts_are_saved_as_they_come_and_stand_in_one_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu_kernels, "level", lambda: cpu_kernels.TRITON)
    monkeypatch.setattr(gpu, "OUTPUT", tmp_path)
    monkeypatch.setattr(gpu_parts, "BITS", (2,))
    device = "cuda" if GPU else "cpu"
    gpu.main(["--device", device, "--tiny", "--only", "copy"])
    assert json.loads((tmp_path / "gpu-tiny.json").read_text()).keys() == {"copy"}
    found = gpu.main(["--device", device, "--tiny", "--only", "layers", "codebooks", "decode"])
    assert found.keys() == {"copy", "layers", "codebooks", "decode"}
    row = found["layers"]["rows"][0]
    assert row["bytes"] == 32 * 256 * 2 // 8 + 32 * 2 * 2 + 32 * 2 * 2 // 8  # codes, scales, zeros
    assert row["share"] == pytest.approx(row["bytes"] / row["seconds"] / found["copy"]["bytes_per_second"])
    assert found["decode"]["bytes"] < found["decode"]["bf16_bytes"]
    capsys.readouterr()
    gpu.main(["--tiny", "--report"])
    table = capsys.readouterr().out
    assert "32x256, 2 bits: share of the copy" in table
    assert "LLaMA-7B, 2 bits: over bf16" in table
    assert table.count("| pass |") + table.count("| miss |") == 6


# What `pip install torch triton` brings nobody, numpy among it.
ALONE = """
import sys

class Absent:
    def find_spec(self, name, *_):
        absent = {"numpy", "transformers", "safetensors", "psutil", "scipy", "pydantic", "typer", "rich", "tokenizers"}
        if name.split(".")[0] in absent or name == "bitquilt._kernels":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from pathlib import Path
from benchmarks import gpu
from bitquilt.ops.gpu import decoder_kernels as decode
from bitquilt.ops.gpu import launch
gpu.OUTPUT = Path(sys.argv[1])
assert gpu.PARTS.keys() >= {"layers", "decode", "tune"}
gpu.main(["--device", "cpu", "--tiny", "--only", "copy", "slim"])
"""


def test_pytorch_and_triton_suffice(tmp_path):
    """All that a GPU runs is imported, and a part without kernels: what interprets those needs numpy."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "BITQUILT_ISA")}
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE, tmp_path], cwd=ROOT, capture_output=True,
                         text=True, timeout=120, env=environment, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "bf16 product" in ran.stdout
    assert "slim: left out, safetensors is not installed; pip install ." in ran.stdout
    assert json.loads((tmp_path / "gpu-tiny.json").read_text()).keys() == {"copy"}


@pytest.mark.parametrize(
    ("part", "kind", "layout"),
    [
        ("tune", "2 bits", gpu_setup.uniform(32, 256, 2)),
        ("tune-codebooks", "2 codebook", gpu_setup.codebook(32, 256, 2, False)),
        ("tune-mx", "4 mx", gpu_setup.mx(32, 256, 4)),
    ],
)
def test_better_cuts_are_kept_and_used(part, kind, layout, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu_kernels, "level", lambda: cpu_kernels.TRITON)
    monkeypatch.setattr(gpu, "OUTPUT", tmp_path)
    monkeypatch.setattr(gpu_parts, "BITS", (2,))
    monkeypatch.setattr(gpu_parts, "MX_BITS", (4,))
    monkeypatch.setenv("BITQUILT_CACHE", str(tmp_path / "cache"))
    device = torch.device("cuda" if GPU else "cpu")
    tuned.known_tilings.cache_clear()
    try:
        found = gpu.main(["--device", device.type, "--tiny", "--only", part])[part]
        assert [(row["kind"], row["tokens"]) for row in found["rows"]] == [(kind, 1), (kind, 16)]
        assert all(row["seconds"] <= row["chosen"] < float("inf") for row in found["rows"])
        assert all(row["tried"] >= 3 for row in found["rows"])
        kept = tuned.known_tilings(device)
        assert kept.keys() == {f"32x2 {kind}, 1 tokens", f"32x2 {kind}, 16 tokens"}
        known = prepared(StoredWeight(*gpu_setup.Packed.random(layout, device).arguments), 32)
        assert str(launch.tiling_of(known, 1)) == found["rows"][0]["best"]
        assert launch.tiling_of(known, 13) == kept[f"32x2 {kind}, 16 tokens"]
        assert launch.tiling_of(known, 40) == choose_tiling(
            32, 2, 40, launch.processors(device), known.quads
        )  # nobody measured that
        assert "x the speed of the cut without measuring" in capsys.readouterr().out
        assert not gpu.main(["--device", device.type, "--tiny", "--only", part])[part]["rows"]  # all are known
    finally:
        tuned.known_tilings.cache_clear()


def test_slim_llm_stage_by_stage(tmp_path, monkeypatch):
    """The part that quantizes: on a CPU with the native kernels, its model written to the same names and shapes."""
    monkeypatch.setattr(gpu, "OUTPUT", tmp_path)
    monkeypatch.setattr(gpu_slim, "OUTPUT", tmp_path)
    found = gpu.main(["--device", "cpu", "--tiny", "--only", "slim", "--blocks", "1"])["slim"]
    assert (found["blocks"], found["of"]) == (1, 2)
    assert "quantizing the blocks" in found["stages"]
    assert 60 * found["minutes"] >= 2 * found["seconds_per_block"] > 0
    assert found["bpw"] < 4
    assert found["logit_difference"] < 1e-3
    assert any("(1 of 2 blocks, by proportion)" in row["what"] for row in gpu.rows({"slim": found}))
    again = gpu.main(["--device", "cpu", "--tiny", "--only", "slim", "--blocks", "1"])["slim"]
    assert again["bpw"] == found["bpw"]  # the model is found, the run begins anew


def test_targets():
    """Better or worse than asked, in both directions."""
    row = {"shape": "4096x11008", "kind": "2 bits", "bits": 2, "seconds": 4e-6, "share": 0.7, "over_bf16": 4.99}
    found = {"layers": {"rows": [row]}, "sixteen": {"rows": [{"shape": "a", "kind": "b", "ratio": 1.31}]}}
    verdicts = {line["what"].split(": ")[1]: line["verdict"] for line in gpu.rows(found)}
    assert verdicts == {
        "1 token": None,
        "share of the copy": "pass",
        "over bf16": "miss",
        "16 tokens / 1 token": "miss",
    }


def test_without_a_gpu_it_says_how_to_try_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU that torch can use; --device cpu --tiny"):
        gpu.main(["--only", "copy"])
