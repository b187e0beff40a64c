"""`bitquilt doctor`: what this machine can use, and `self_test`, a test of packing and products."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from typer import Exit

from bitquilt._version import __version__
from bitquilt.cli.output import EXIT_WRONG_RESULT, Json, print_json, stdout
from bitquilt.core.packing import pack, unpack
from bitquilt.core.types import Layer, LayerPlan
from bitquilt.core.units import size_text
from bitquilt.model.linear import QuantizedLinear
from bitquilt.ops import cpu_kernels
from bitquilt.ops.reference import decode_uniform
from bitquilt.recipes import make_recipe

# Processor features that the kernels use, as /proc/cpuinfo spells them: x86, then ARM.
_X86 = "avx2 fma f16c avx512f avx512bw avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16"
_ARM = "asimd asimddp i8mm bf16 sve sve2"
_OPTIONAL = {
    "datasets": "hub data sets as calibration text",
    "pyarrow": "parquet files",
    "lm-eval": "bitquilt eval --tasks",
    "jinja2": "reports",
    "matplotlib": "plots",
    "triton": "fast products on a GPU",
}
_MX = "emulated: exact but not fast (weights and inputs are rounded to MX numbers and multiplied in fp32)"
_REFERENCE = "reference (dequantize, then matmul): exact but not fast"


@dataclass(frozen=True)
class _Transformers:
    """The installed version, and the versions that this package supports."""

    version: str
    supported: str
    in_range: bool


@dataclass(frozen=True)
class _Processor:
    name: str
    torch_capability: str
    features: list[str]
    cores: int | None
    logical: int | None
    torch_threads: int


@dataclass(frozen=True)
class _GpuInfo:
    name: str
    memory: int
    compute_capability: str


@dataclass(frozen=True)
class _Diagnosis:
    """What --json prints."""

    bitquilt: str
    python: str
    torch: str
    transformers: _Transformers
    cpu: _Processor
    memory: dict[str, int]
    disk: dict[str, int]
    gpus: list[_GpuInfo]
    optional: dict[str, str | None]
    quantized_matmul: dict[str, str]
    mx_matmul: str
    self_test: str


def doctor(json_output: Json = False) -> None:
    """Examine the machine, run the self-test and print both."""
    from huggingface_hub.constants import HF_HUB_CACHE

    failure = self_test()
    memory = psutil.virtual_memory()
    found = _Diagnosis(
        bitquilt=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=_transformers(),
        cpu=_processor(),
        memory={"total": memory.total, "available": memory.available},
        disk={"free_here": shutil.disk_usage(".").free, "free_in_hub_cache": _free(Path(HF_HUB_CACHE))},
        gpus=[_gpu(i) for i in range(torch.cuda.device_count())],
        optional={name: _version(name) for name in _OPTIONAL},
        quantized_matmul={device: _body(device) for device in ("CPU", "CUDA")},
        mx_matmul=_MX,
        self_test="ok" if failure is None else f"FAILED: {failure}",
    )
    if json_output:
        print_json(asdict(found))
    else:
        for name, text in _lines(found):
            stdout.print(f"{name:<13} {text}")
    if failure is not None:
        raise Exit(EXIT_WRONG_RESULT)


def self_test() -> str | None:
    """Pack, unpack and multiply a random layer of 1, 2 and 3 bits. Return what went wrong, or None."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(72, 120, generator=generator), torch.randn(5, 120, generator=generator)
    plan = LayerPlan((2, 1, 3, 2), 32)  # the last group is ragged
    solution = make_recipe("rtn", bits=2, group_size=32).quantize(Layer("self-test", weight, None, None), plan, None)
    quantized = solution.weight
    back = unpack(pack(quantized), quantized.layout)
    parts = []
    for before, after in zip(quantized.segments, back.segments, strict=True):
        if not torch.equal(before.codes, after.codes.to(before.codes.dtype)):
            return f"{before.format.bits}-bit codes change when they are packed and unpacked"
        zero = torch.empty(0) if before.zero is None else before.zero
        form = before.format
        parts.append(decode_uniform(before.codes, before.scale, zero, form.bits, form.group_size))
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


def _transformers() -> _Transformers:
    here, wanted = importlib.metadata.version("transformers"), SpecifierSet()
    try:
        lines = importlib.metadata.requires("bitquilt") or []
    except importlib.metadata.PackageNotFoundError:  # run from the source tree
        lines = []
    for requirement in map(Requirement, lines):
        if requirement.name == "transformers":
            wanted = requirement.specifier
    return _Transformers(here, str(wanted), wanted.contains(here, prereleases=True))


def _processor() -> _Processor:
    flags: set[str] = set()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags |= set(value.split())
        elif key.strip() == "model name":
            name = value.strip()
    return _Processor(
        name=name,
        torch_capability=torch.backends.cpu.get_cpu_capability(),
        features=[flag for flag in f"{_X86} {_ARM}".split() if flag in flags],
        cores=psutil.cpu_count(logical=False),
        logical=psutil.cpu_count(),
        torch_threads=torch.get_num_threads(),
    )


def _gpu(index: int) -> _GpuInfo:
    properties = torch.cuda.get_device_properties(index)
    return _GpuInfo(properties.name, properties.total_memory, f"{properties.major}.{properties.minor}")


def _free(path: Path) -> int:
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _body(device: str) -> str:
    """The body of `quantized_matmul` on a device, and why no faster one is used."""
    own = torch._C._dispatch_has_kernel_for_dispatch_key("bitquilt::quantized_matmul", device)
    if not own:
        missing = "to get kernels: pip install 'bitquilt[gpu]'" if device == "CUDA" else "installed without its kernels"
        return f"{_REFERENCE}; {missing}"
    if device == "CUDA":
        asked = os.environ.get("BITQUILT_ISA") == cpu_kernels.REFERENCE
        return f"{_REFERENCE}; BITQUILT_ISA asks for it" if asked else f"Triton kernels, triton {_version('triton')}"
    level = cpu_kernels.level()
    if level == cpu_kernels.REFERENCE:
        return f"{_REFERENCE}; BITQUILT_ISA asks for it"
    return f"native kernels, {level}{' with matrix units' if cpu_kernels.matrix_units(level) else ''}"


def _lines(found: _Diagnosis) -> Iterator[tuple[str, str]]:
    """Label and text, with markup, of each line."""
    cpu, versions = found.cpu, found.transformers
    supported = "supported" if versions.in_range else "[yellow]not supported[/]"
    yield "bitquilt", f"{found.bitquilt}, python {found.python} ({sys.executable})"
    yield "torch", found.torch
    yield "transformers", f"{versions.version}: {supported} (wanted {versions.supported or 'any'})"
    yield "processor", f"{cpu.name}, {cpu.logical} logical cores, of which torch uses {cpu.torch_threads}"
    yield "features", f"{' '.join(cpu.features) or 'none known'} (torch: {cpu.torch_capability})"
    yield "memory", f"{size_text(found.memory['available'])} of {size_text(found.memory['total'])} free"
    here, cache = size_text(found.disk["free_here"]), size_text(found.disk["free_in_hub_cache"])
    yield "disk", f"{here} free in this folder, {cache} in the hub cache"
    for gpu in found.gpus:
        yield "gpu", f"{gpu.name}, {size_text(gpu.memory)}, compute {gpu.compute_capability}"
    if not found.gpus:
        yield "gpu", "none that torch can use: everything runs on the processor"
    for name, version in found.optional.items():
        yield name, version or f"[yellow]not installed[/] (for {_OPTIONAL[name]})"
    yield "matmul", found.quantized_matmul["CPU"]
    if found.gpus:
        yield "on the gpu", found.quantized_matmul["CUDA"]
    yield "mx matmul", found.mx_matmul
    style = "green" if found.self_test == "ok" else "bold red"
    yield "self-test", f"[{style}]{found.self_test}[/]"
