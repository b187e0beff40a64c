"""`bitquilt bench`: all figures are present and consistent; times are not checked."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bitquilt
from bitquilt.cli import bench, machines
from bitquilt.ops import cpu_kernels
from bitquilt.serve import generation
from bitquilt.serve.cuda_graph_decoder import GraphDecoder

from .conftest import Command

pytestmark = pytest.mark.skipif(not cpu_kernels.built(), reason="the package was installed without its kernels")
SMALL = ("--prompt", 8, "--tokens", 4)


@pytest.fixture(autouse=True)
def _small_read(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(machines, "_READ", 2**24)


def test_json_has_every_figure(command: Command, quantized: Path) -> None:
    ran = command("bench", quantized, *SMALL, "--threads", 1, "--json")
    assert (ran.code, ran.err) == (0, "")
    figures = json.loads(ran.out)
    speeds = ("decode", "prefill", "bf16_decode", "reference_decode")
    rates = (*(f"{name}_tokens_per_s" for name in speeds), "read_bandwidth_bytes_per_s")
    assert all(figures[name] > 0 for name in rates)
    assert figures["threads"] == 1
    assert figures["peak_bytes"] >= 0
    speed = figures["decode_tokens_per_s"] * figures["bytes_per_token"] / figures["read_bandwidth_bytes_per_s"]
    assert math.isclose(figures["bandwidth_share"], speed, rel_tol=1e-9)
    assert figures["decoder"] == "native"


def test_the_table_and_a_short_context(command: Command, quantized: Path) -> None:
    ran = command("bench", quantized, "--prompt", 500, "--tokens", 4, "--no-compare")
    assert ran.code == 0
    assert "the model's context holds 64 tokens" in ran.err
    assert "tokens/s" in ran.out
    assert "bf16" not in ran.out


def test_on_a_gpu(command: Command, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock, memory and decoder of a GPU, with a CPU in its place."""
    waits: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1234)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(bench, "Host", lambda: machines.Gpu(torch.device("cpu")))
    monkeypatch.setattr(generation, "CpuDecoder", GraphDecoder)
    figures = json.loads(command("bench", quantized, *SMALL, "--json").out)
    assert (figures["decoder"], figures["peak_bytes"]) == ("graph", 1234)
    assert figures["machine"] == "a GPU, triton"
    assert figures["bf16_decode_tokens_per_s"] > 0
    assert len(waits) >= 2 * (4 + 3)  # after every token and prompt of both models
    monkeypatch.setattr(generation, "CpuDecoder", lambda model, length: GraphDecoder(object(), length))
    ran = command("bench", quantized, *SMALL, "--no-compare")
    assert "transformers decoder" in ran.out
    assert "transformers' own loop wrote the text: the model is not built like Llama" in ran.out


def test_what_a_user_may_get_wrong(command: Command, tiny: Path) -> None:
    ran = command("bench", tiny, *SMALL)
    assert (ran.code, ran.out) == (2, "")
    assert "holds no quantized layers" in ran.err
    assert command("bench", "/nowhere").code == 2
    assert command("bench", tiny, "--threads", 0).code == 2
    assert command("bench", tiny, "--threads", 5000).code == 2


def test_an_embedding_and_a_head_in_few_bits(command: Command, tiny: Path, tmp_path: Path) -> None:
    """The head counts as a product, the lookup of an embedding does not."""
    out = tmp_path / "small"
    bitquilt.quantize(tiny, "rtn", out=out, bits=4, group_size=16, embedding_bits=8, head_bits=6)
    ran = command("bench", out, *SMALL, "--no-compare", "--json")
    assert ran.code == 0, ran.err
    figures = json.loads(ran.out)
    assert figures["decoder"] == "native"
    assert 0 < figures["bytes_per_token"] < figures["file_bytes"]


def test_plan_and_bench_count_the_same_cache(command: Command, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Both stop at the sliding window of 6 tokens in one of the two layers: 2 heads of 8, in 16 bits."""
    source, out = make_model("gemma3", dtype=torch.bfloat16), tmp_path / "windowed"
    bitquilt.quantize(source, "rtn", out=out, bits=4, group_size=8)
    wanted = 2 * 2 * (2 * 8) * (6 + 24)
    planned = command("plan", source, "--recipe", "rtn", "--bits", 4, "--group-size", 8, "--ctx", 24, "--json")
    assert json.loads(planned.out)["memory"]["cache"] == wanted
    measured = command("bench", out, "--prompt", 20, "--tokens", 4, "--no-compare", "--json")
    assert json.loads(measured.out)["kv_cache_bytes"] == wanted
