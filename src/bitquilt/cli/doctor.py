"""`bitquilt doctor`: what can this machine use, and does the package compute what it should?"""

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from typer import Exit

from bitquilt._version import __version__
from bitquilt.cli.output import EXIT_WRONG_RESULT, Json, print_json, size_text, stdout
from bitquilt.core.packing import pack, unpack
from bitquilt.core.types import Layer, LayerPlan
from bitquilt.model.linear import QuantizedLinear
from bitquilt.ops import cpu_kernels
from bitquilt.ops.reference import decode_uniform
from bitquilt.recipes import make_recipe

# What kernels on packed codes live from, as /proc/cpuinfo spells it (x86, then ARM).
_CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
              "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2")  # fmt: skip
_OPTIONAL = {
    "datasets": "hub data sets as calibration text",
    "pyarrow": "parquet files",
    "lm-eval": "bitquilt eval --tasks",
    "jinja2": "reports",
    "matplotlib": "plots",
    "triton": "fast products on a GPU",
}
_MX = "emulated: right, not faster (weights and inputs are rounded to MX numbers, the product is fp32)"
_REFERENCE = "reference (dequantize, then matmul): right, not fast"


def doctor(json_output: Json = False) -> None:
    """What this machine can use: versions, processor, memory, GPU, packages; and a self-test of a second."""
    from huggingface_hub.constants import HF_HUB_CACHE

    failure = self_test()
    facts = {
        "bitquilt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _transformers(),
        "cpu": _cpu(),
        "memory": {"total": psutil.virtual_memory().total, "available": psutil.virtual_memory().available},
        "disk": {"free_here": shutil.disk_usage(".").free, "free_in_hub_cache": _free(Path(HF_HUB_CACHE))},
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "optional": {name: _version(name) for name in _OPTIONAL},
        "quantized_matmul": {device: _body(device) for device in ("CPU", "CUDA")},
        "mx_matmul": _MX,
        "self_test": "ok" if failure is None else f"FAILED: {failure}",
    }
    if json_output:
        print_json(facts)
    else:
        _print(facts)
    if failure is not None:
        raise Exit(EXIT_WRONG_RESULT)


def self_test() -> str | None:
    """Pack, unpack and multiply a random layer of 1, 2 and 3 bits; what went wrong, or None."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(72, 120, generator=generator), torch.randn(5, 120, generator=generator)
    plan = LayerPlan((2, 1, 3, 2), 32)  # the last group is ragged
    solution = make_recipe("rtn", bits=2, group_size=32).quantize(Layer("self-test", weight, None, None), plan, None)
    quantized = solution.weight
    back = unpack(pack(quantized), quantized.layout)
    for before, after in zip(quantized.segments, back.segments, strict=True):
        if not torch.equal(before.codes, after.codes.to(before.codes.dtype)):
            return f"{before.format.bits}-bit codes come back changed from packing"
    parts = [decode_uniform(s.codes, s.scale, torch.empty(0) if s.zero is None else s.zero, s.format.bits,
                            s.format.group_size) for s in quantized.segments]  # fmt: skip
    stored = torch.cat(parts, dim=1)
    dense = torch.empty_like(stored)
    dense[:, _channels(plan, quantized.layout.in_features)] = stored
    for device in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        module = QuantizedLinear.from_weight(quantized).to(device)
        error = float((module(x.to(device)).cpu() - x @ dense.t()).abs().max())
        if not error < 1e-4:  # sums of 120 float32 products of about one; measured: 4e-6
            return f"quantized_matmul on {device} differs from the dense product by {error:.2g}"
    return None


def _channels(plan: LayerPlan, in_features: int) -> list[int]:
    """The original channel at each stored position: groups in ascending order of their bits."""
    starts = [plan.group_size * k for k in sorted(range(len(plan.bits)), key=lambda k: plan.bits[k])]
    return [c for start in starts for c in range(start, min(start + plan.group_size, in_features))]


def _transformers() -> dict[str, Any]:
    """The version here and the range this package was built for."""
    here = importlib.metadata.version("transformers")
    wanted = SpecifierSet()
    for line in importlib.metadata.requires("bitquilt") or []:
        if (requirement := Requirement(line)).name == "transformers":
            wanted = requirement.specifier
    return {"version": here, "supported": str(wanted), "in_range": wanted.contains(here, prereleases=True)}


def _cpu() -> dict[str, Any]:
    flags: set[str] = set()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags |= set(value.split())
        elif key.strip() == "model name":
            name = value.strip()
    return {
        "name": name,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "features": [flag for flag in _CPU_FLAGS if flag in flags],
        "cores": psutil.cpu_count(logical=False),
        "logical": psutil.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "memory": properties.total_memory, "compute_capability": capability}


def _free(path: Path) -> int:
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _body(device: str) -> str:
    own = torch._C._dispatch_has_kernel_for_dispatch_key("bitquilt::quantized_matmul", device)
    if device == "CUDA" and own:
        asked = os.environ.get("BITQUILT_ISA") == cpu_kernels.REFERENCE
        return f"{_REFERENCE}; BITQUILT_ISA asks for it" if asked else f"Triton kernels, triton {_version('triton')}"
    if not own and device == "CUDA":
        return f"{_REFERENCE}; for the kernels: pip install 'bitquilt[gpu]'"
    if not own:
        return f"{_REFERENCE}; the package was installed without its kernels"
    level = cpu_kernels.level()
    if level == cpu_kernels.REFERENCE:
        return f"{_REFERENCE}; BITQUILT_ISA asks for it"
    return f"native kernels, {level}{' with matrix units' if cpu_kernels.matrix_units(level) else ''}"


def _print(facts: dict[str, Any]) -> None:
    cpu, versions = facts["cpu"], facts["transformers"]
    range_note = "supported" if versions["in_range"] else "[yellow]outside the supported range[/]"
    lines = [
        ("bitquilt", f"{facts['bitquilt']}, python {facts['python']} ({sys.executable})"),
        ("torch", facts["torch"]),
        ("transformers", f"{versions['version']}: {range_note} ({versions['supported'] or 'any'})"),
        ("processor", f"{cpu['name']}, {cpu['logical']} logical cores, torch uses {cpu['torch_threads']}"),
        ("features", f"{' '.join(cpu['features']) or 'none known'} (torch: {cpu['torch_capability']})"),
        ("memory", f"{size_text(facts['memory']['available'])} of {size_text(facts['memory']['total'])} free"),
        ("disk", f"{size_text(facts['disk']['free_here'])} free here, "
                 f"{size_text(facts['disk']['free_in_hub_cache'])} in the hub cache"),
    ]  # fmt: skip
    lines += [
        ("gpu", f"{gpu['name']}, {size_text(gpu['memory'])}, compute {gpu['compute_capability']}")
        for gpu in facts["gpus"]
    ]
    lines += [] if facts["gpus"] else [("gpu", "none that torch can use: everything runs on the processor")]
    lines += [
        (name, version or f"[yellow]not installed[/] (for {_OPTIONAL[name]})")
        for name, version in facts["optional"].items()
    ]
    lines.append(("matmul", facts["quantized_matmul"]["CPU"]))
    lines += [("on the gpu", facts["quantized_matmul"]["CUDA"])] if facts["gpus"] else []
    lines.append(("mx matmul", facts["mx_matmul"]))
    style = "green" if facts["self_test"] == "ok" else "bold red"
    lines.append(("self-test", f"[{style}]{facts['self_test']}[/]"))
    for name, text in lines:
        stdout.print(f"{name:<13} {text}")
