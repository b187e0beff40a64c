"""`bitquilt doctor`: facts as JSON and as lines, and a self-test that can fail."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitquilt.cli.doctor import doctor as verb
from bitquilt.cli.doctor import self_test
from bitquilt.ops import cpu_kernels

from .conftest import Command


def test_facts(command: Command) -> None:
    ran = command("doctor", "--json")
    assert ran.code == 0
    facts = json.loads(ran.out)
    assert facts["torch"] == torch.__version__
    assert facts["transformers"]["in_range"] is True
    assert facts["self_test"] == "ok"
    assert facts["mx_matmul"].startswith("emulated: exact but not fast")
    assert facts["cpu"]["torch_threads"] == 1
    assert facts["memory"]["total"] > facts["memory"]["available"] > 0
    lines = command("doctor").out
    assert "self-test     ok" in lines
    body = f"native kernels, {cpu_kernels.level()}" if cpu_kernels.built() else "installed without its kernels"
    assert body in facts["quantized_matmul"]["CPU"]
    assert facts["quantized_matmul"]["CUDA"] == f"Triton kernels, triton {facts['optional']['triton']}"
    if not facts["gpus"]:
        assert body in lines


@pytest.mark.parametrize("name", ["unpack", "decode_uniform"])
def test_the_self_test_can_fail(command: Command, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = verb.__globals__[name]

    def wrong(*args: Any) -> Any:
        value = right(*args)
        if name == "unpack":
            value.segments[1].codes[3, 5] ^= 1
            return value
        return value + 0.01

    monkeypatch.setitem(verb.__globals__, name, wrong)
    assert self_test() is not None
    ran = command("doctor")
    assert ran.code == 3
    assert "FAILED" in ran.out


def test_what_is_missing_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verb.__globals__, "_version", lambda name: None)
    assert "not installed (for bitquilt eval --tasks)" in command("doctor").out


def test_the_body_on_a_gpu(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton with its version; without it, or on request, the reference body and the reason."""
    assert verb.__globals__["_body"]("CUDA").startswith("Triton kernels, triton 3.")
    monkeypatch.setenv("BITQUILT_ISA", "reference")
    assert "exact but not fast; BITQUILT_ISA asks for it" in verb.__globals__["_body"]("CUDA")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    assert "exact but not fast; to get kernels: pip install 'bitquilt[gpu]'" in verb.__globals__["_body"]("CUDA")
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=150 * 10**9, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setitem(verb.__globals__, "self_test", lambda: None)
    lines = command("doctor").out.splitlines()
    assert any("NVIDIA H200" in line and "compute 9.0" in line for line in lines)
    assert any(line.startswith("on the gpu") for line in lines)
