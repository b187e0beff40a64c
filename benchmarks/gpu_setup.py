"""What the parts of `benchmarks.gpu` share: sizes, random layers, time on a GPU. Needs PyTorch and Triton alone."""

import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import bitquilt  # noqa: F401
except ImportError:  # a bare machine: the package's rooms without its front door, which needs all its requirements
    for name in [name for name in sys.modules if name.split(".")[0] == "bitquilt"]:
        del sys.modules[name]
    package = types.ModuleType("bitquilt")
    package.__path__ = [str(Path(__file__).parents[1] / "src" / "bitquilt")]
    sys.modules["bitquilt"] = package

from bitquilt import ops
from bitquilt.core.packing import op_layout, storage_bits, tensor_specs
from bitquilt.core.types import Format, Layout
from bitquilt.ops.gpu_order import ARRANGED, arrange, arrangeable

GROUP_SIZE = 128


@dataclass(frozen=True)
class Sizes:
    """Of the measurement, and of a model of LLaMA-7B's shape."""

    shapes: tuple[tuple[int, int], ...] = ((4096, 11008), (11008, 4096))
    memory: int = 2**30  # bytes of copies a product rotates through: 20 times an H200's cache
    matrix: int = 8192
    tokens: int = 2048
    width: int = 4096
    inner: int = 11008
    layers: int = 32
    heads: int = 32
    vocabulary: int = 32000
    context: int = 512
    samples: int = 128
    rounds: int = 20
    cuts: int = 30  # tried for a product, two seconds each to compile


TINY = Sizes(((32, 256),), 2**12, 64, 520, 128, 256, 2, 2, 64, 16, 4, 1, 2)


@dataclass(frozen=True)
class Setting:
    """Where, how large, and the copy bandwidth in bytes per second, where it is known."""

    device: torch.device
    sizes: Sizes
    tiny: bool
    blocks: int
    bandwidth: float

    @classmethod
    def of(cls, device: str, tiny: bool, blocks: int, copied: dict[str, Any] | None) -> "Setting":
        """`copied`: what the part `copy` found."""
        bandwidth = float("nan") if copied is None else copied["bytes_per_second"]
        return cls(torch.device(device), TINY if tiny else Sizes(), tiny, blocks, bandwidth)


def name_of(device: torch.device) -> str:
    """Of the GPU and its software."""
    if device.type != "cuda":
        return "none"
    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"


@dataclass(frozen=True, eq=False)
class Packed:
    """A random weight: random bits as codes and zeros, scales of a hundredth; codes as a GPU reads them."""

    layout: Layout
    arguments: tuple[Any, ...]

    @classmethod
    def random(cls, layout: Layout, device: torch.device, seed: int = 0) -> "Packed":
        """On `device`, the same for the same seed."""
        generator = torch.Generator(device).manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        for name, spec in tensor_specs(layout).items():
            if spec.dtype == torch.uint8:
                low, high = (
                    (118, 122) if name.startswith("scale") else (0, 256)
                )  # of MX: powers of two near a hundredth
                tensors[name] = torch.randint(
                    low, high, spec.shape, dtype=torch.uint8, device=device, generator=generator
                )
            else:
                found = torch.rand(spec.shape, device=device, generator=generator) / 100
                tensors[name] = found.to(spec.dtype)
        empty = torch.empty(0, device=device)
        count = range(len(layout.segments))
        extra = [tensors.get(f"zero_{i}", tensors.get(f"gain_{i}", empty)) for i in count]
        codes, numbers = [tensors[f"codes_{i}"] for i in count], op_layout(layout)
        for i in count:  # as a layer does that moves to a GPU
            grid, bits, group_size, width = numbers[4 * i : 4 * i + 4]
            if arrangeable(grid, bits, group_size, width):
                codes[i] = arrange(codes[i], grid, bits, width)
                numbers[4 * i] += ARRANGED
        return cls(layout, (codes, [tensors[f"scale_{i}"] for i in count], extra, numbers, None, 0, None, None, None))

    def __call__(self, x: Tensor) -> Tensor:
        """x `[..., in]` -> `[..., out]`."""
        product: Tensor = ops.quantized_matmul(x, *self.arguments, None, self.layout.out_features)
        return product

    @property
    def nbytes(self) -> int:
        """All that is stored."""
        return storage_bits(self.layout) // 8


def uniform(rows: int, columns: int, bits: int) -> Layout:
    """Asymmetric, groups of 128 columns."""
    return Layout(rows, columns, ((Format(bits, GROUP_SIZE), columns),))


def codebook(rows: int, columns: int, bits: int, shared: bool) -> Layout:
    """A table of levels per column, or one for the layer and a gain per column."""
    if shared:
        form = Format(bits, columns, "codebook", gain_dtype=torch.float8_e4m3fn)
    else:
        form = Format(bits, 1, "codebook")
    return Layout(rows, columns, ((form, columns),))


def mx(rows: int, columns: int, bits: int) -> Layout:
    """MXFP4, MXFP6 (E3M2) or MXFP8."""
    return Layout(rows, columns, ((Format(bits, 32, "mx", torch.uint8, symmetric=True), columns),))


def seconds_each(works: Sequence[Callable[[], Any]], setting: Setting) -> float:
    """Median over the rounds of the mean time of `works`, replayed from one CUDA graph, each having been called once
    before; on a CPU, where times mean nothing, called one after the other."""
    if setting.device.type != "cuda":
        started = time.perf_counter()
        for work in works:
            work()
        return (time.perf_counter() - started) / len(works)
    for work in works:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    times = []
    for _ in range(setting.sizes.rounds + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(works))
    return sorted(times[3:])[len(times[3:]) // 2]
