"""How close to memory speed does one layer decode? 4096 x 11008, one token, against the read bandwidth and torch.

    python -m benchmarks.kernels                     # 1 and 2 threads, 1 GiB of copies: needs 4 GiB, 3 minutes
    python -m benchmarks.kernels --formats u2 c4 --threads 1 --gib 0.5 --activations exact int8

Formats: `u3` uniform, 3 bits, group size 128; `u3g32` group size 32; `c3` a codebook per column; `cmpq` what that
recipe stores: columns of 2, 3 and 4 bits in another order, 0.5 % outliers. Every product reads another copy of the
layer, more of them than any cache holds, as generating a token does. The limit is a plain read loop over as much
memory, in the same run. `weight GB/s` counts what is stored: codes, scales, zeros. `prefill` is 512 tokens, the weight
unpacked once per product, in turns with torch's bf16 product. `ready s/GB`: what the first use of a weight costs; the
line above each table of rows says what it costs to write to new memory at all.
`--small-pages` leaves the weights where torch puts them.
"""

import argparse
import functools
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import OUTPUT, markdown_table, stamp
from bitquilt.core.packing import storage_bits, tensor_specs
from bitquilt.core.types import Format, Layout
from bitquilt.model import linear
from bitquilt.model.linear import QuantizedLinear
from bitquilt.ops import cpu_kernels
from bitquilt.ops.large_pages import reserve

ROWS, COLUMNS, GROUP_SIZE, PREFILL = 4096, 11008, 128, 512
FORMATS = ["u2", "u3", "u4", "u2g32", "c2", "c3", "c4", "cmpq"]


def seconds_each(work: Callable[[int], Any], copies: int, rounds: int) -> float:
    """The fastest round's mean over all copies."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for i in range(copies):
            work(i)
        best = min(best, (time.perf_counter() - started) / copies)
    return best


def layout_of(name: str) -> Layout:
    """See above. ValueError: a name that means nothing."""
    match = re.fullmatch(r"([uc])([1-8])(?:g(\d+))?", name)
    if name == "cmpq":
        parts = tuple((Format(bits, 1, "codebook"), width) for bits, width in ((2, 4000), (3, 4008), (4, 3000)))
        return Layout(ROWS, COLUMNS, parts, "order", 1, ROWS * (COLUMNS // 200))
    if match is None:
        raise ValueError(f"no format {name}")
    bits, group_size = int(match[2]), int(match[3] or GROUP_SIZE)
    return Layout(
        ROWS, COLUMNS, ((Format(bits, group_size) if match[1] == "u" else Format(bits, 1, "codebook"), COLUMNS),)
    )


def random_layer(layout: Layout, seed: int) -> QuantizedLinear:
    """Random bits as codes and zeros, scales of a hundredth, outliers spread evenly."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = layout.out_features, layout.in_features
    tensors: dict[str, Tensor] = {}
    for name, spec in tensor_specs(layout).items():
        if name == "permutation":
            tensors[name] = torch.randperm(columns, generator=generator).to(spec.dtype)
        elif name == "outlier_rows":
            tensors[name] = (torch.arange(rows + 1) * (layout.outliers // rows)).to(spec.dtype)
        elif name == "outlier_columns":
            count = layout.outliers // rows
            free = torch.randint(0, columns // count, (rows, count), generator=generator)
            tensors[name] = (torch.arange(count) * (columns // count) + free).view(-1).to(spec.dtype)
        elif spec.dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, spec.shape, dtype=torch.uint8, generator=generator)
        else:
            tensors[name] = (torch.rand(spec.shape, generator=generator) / 100).to(spec.dtype)
    return QuantizedLinear.from_tensors(tensors, layout)


def layer_rows(name: str, threads: int, size: float, rounds: int, modes: list[str]) -> Iterator[dict[str, Any]]:
    layout = layout_of(name)
    layer_bytes = storage_bits(layout) // 8
    first = random_layer(layout, 0)
    layers = [
        QuantizedLinear.from_tensors({k: b.clone() for k, b in first.named_buffers()}, layout)
        for _ in range(max(1, round(size / layer_bytes)))
    ]
    started = time.perf_counter()
    for layer in layers:
        layer.settle()
    ready = (time.perf_counter() - started) / len(layers)
    x = torch.randn(1, COLUMNS, dtype=torch.bfloat16)
    for mode in modes:
        cpu_kernels.use_activations(mode)
        seconds = seconds_each(lambda i: layers[i](x), len(layers), rounds)
        yield {
            "weight": name,
            "activations": mode,
            "threads": threads,
            "MB": layer_bytes / 1e6,
            "bpw": 8 * layer_bytes / ROWS / COLUMNS,
            "ms": seconds * 1e3,
            "weight GB/s": layer_bytes / seconds / 1e9,
            "ready s/GB": ready / layer_bytes * 1e9,
        }
    cpu_kernels.use_activations(None)


def dense_row(threads: int, size: float, rounds: int) -> dict[str, Any]:
    layer_bytes = 2 * ROWS * COLUMNS
    weight = torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16)
    weights = [weight.clone() for _ in range(max(1, round(size / layer_bytes)))]
    x = torch.randn(1, COLUMNS, dtype=torch.bfloat16)
    seconds = seconds_each(lambda i: torch.nn.functional.linear(x, weights[i]), len(weights), rounds)
    return {
        "weight": "torch bf16",
        "threads": threads,
        "MB": layer_bytes / 1e6,
        "bpw": 16.0,
        "ms": seconds * 1e3,
        "weight GB/s": layer_bytes / seconds / 1e9,
        "times bf16": 1.0,
    }


def prefills(names: list[str], turns: int) -> dict[str, float]:
    """Seconds of `PREFILL` tokens by each format, and by bf16: in turns, the best of each."""
    x = torch.randn(PREFILL, COLUMNS, dtype=torch.bfloat16)
    weight = torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16)
    work: dict[str, Callable[[], Any]] = {"torch bf16": lambda: torch.nn.functional.linear(x, weight)}
    for name in names:
        work[name] = functools.partial(random_layer(layout_of(name), 0), x)
    best = dict.fromkeys(work, float("inf"))
    for _ in range(turns):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def new_memory(size: int) -> float:
    """Seconds per GB of the first writes to memory in large pages."""
    memory = reserve(size)
    started = time.perf_counter()
    memory.zero_()
    return (time.perf_counter() - started) / size * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--activations", nargs="+", choices=cpu_kernels.MODES, default=["exact"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--small-pages", action="store_true")
    arguments = parser.parse_args()
    if arguments.small_pages:
        linear.place = lambda tensors: [t.clone() for t in tensors]
    size, rounds = arguments.gib * 2**30, arguments.rounds
    if not cpu_kernels.built():
        raise SystemExit("the package was installed without its kernels: nothing to measure")
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            fresh = new_memory(int(size))
            limit = cpu_kernels.read_bandwidth(int(size), threads, rounds)
            dense = dense_row(threads, size, rounds)
            prefill = prefills(arguments.formats, rounds)
            measured = [dense]
            for name in arguments.formats:
                measured += layer_rows(name, threads, size, rounds, arguments.activations)
                limit = max(limit, cpu_kernels.read_bandwidth(int(size), threads, 2))  # others read too
            told = f"read bandwidth {limit / 1e9:.1f} GB/s, new memory {fresh:.2f} s/GB, {cpu_kernels.level()}"
            print(f"{threads} threads: {told}", flush=True)
            for row in measured:
                row["share"] = row["weight GB/s"] * 1e9 / limit
                row["times bf16"] = dense["ms"] / row["ms"]
                row["prefill ms"] = prefill[row["weight"]] * 1e3
                row["prefill / bf16"] = prefill["torch bf16"] / prefill[row["weight"]]
                print(json.dumps(row), flush=True)
            rows += measured
    columns = ("weight", "activations", "threads", "MB", "bpw", "ms", "weight GB/s", "share", "times bf16",
               "prefill ms", "prefill / bf16", "ready s/GB")  # fmt: skip
    table = markdown_table(columns, rows)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "cpu_kernels.json").write_text(
        json.dumps({"stamp": stamp(), "level": cpu_kernels.level(), "rows": rows}, indent=1)
    )
    (OUTPUT / "cpu_kernels.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
