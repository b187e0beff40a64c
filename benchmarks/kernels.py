"""How close to memory speed does one layer decode? 4096 x 11008, one token, against the read bandwidth and torch.

    python -m benchmarks.kernels                     # bits 2 3 4, 1 and 2 threads, 2 GiB of copies: needs 5 GiB
    python -m benchmarks.kernels --bits 2 --threads 1 --gib 0.5

Every product reads another copy of the layer, more of them than any cache holds, as generating a token does. The
limit is a plain read loop over as much memory, in the same run. `weight GB/s` counts what is stored: codes, scales,
zeros. `prefill` is 512 tokens, the weight unpacked once per product.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import OUTPUT, markdown_table, stamp
from bitquilt.models.linear import QuantizedLinear
from bitquilt.ops import kernels
from bitquilt.packing import op_layout, storage_bits, tensor_specs
from bitquilt.types import Format, Layout

ROWS, COLUMNS, GROUP_SIZE, PREFILL = 4096, 11008, 128, 512


def seconds_each(work: Callable[[int], Any], copies: int, rounds: int) -> float:
    """The fastest round's mean over all copies."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for i in range(copies):
            work(i)
        best = min(best, (time.perf_counter() - started) / copies)
    return best


def random_layer(layout: Layout, seed: int) -> QuantizedLinear:
    """Random bits as codes and zeros, scales of a hundredth."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, spec in tensor_specs(layout).items():
        if spec.dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, spec.shape, dtype=torch.uint8, generator=generator)
        else:
            tensors[name] = (torch.rand(spec.shape, generator=generator) / 100).to(spec.dtype)
    return QuantizedLinear.from_tensors(tensors, layout)


def layer_row(form: Format, threads: int, size: float, rounds: int, bandwidth: float) -> dict[str, Any]:
    layout = Layout(ROWS, COLUMNS, ((form, COLUMNS),))
    layer_bytes = storage_bits(layout) // 8
    copies = max(1, round(size / layer_bytes))
    first = random_layer(layout, 0)
    layers = [
        QuantizedLinear.from_tensors({k: b.clone() for k, b in first.named_buffers()}, layout) for _ in range(copies)
    ]
    x, many = torch.randn(1, COLUMNS, dtype=torch.bfloat16), torch.randn(PREFILL, COLUMNS, dtype=torch.bfloat16)
    seconds = seconds_each(lambda i: layers[i](x), copies, rounds)
    handles = [layer.settle() for layer in layers]
    out, digits = torch.empty(1, ROWS, dtype=torch.bfloat16), 1 if kernels.activations() == "int8" else 2

    def bare(i: int) -> None:
        handle = handles[i]
        assert handle is not None
        handle.native.matmul(x.data_ptr(), 2, 1, COLUMNS, 0, out.data_ptr(), digits, threads)

    bare_seconds = seconds_each(bare, copies, rounds)
    prefill = seconds_each(lambda i: layers[i](many), min(copies, 4), rounds)
    return {
        "weight": f"{form.bits} bits" + (" codebook" if form.grid == "codebook" else ""),
        "activations": kernels.activations(),
        "threads": threads,
        "MB": layer_bytes / 1e6,
        "ms": seconds * 1e3,
        "ms without Python": bare_seconds * 1e3,
        "weight GB/s": layer_bytes / seconds / 1e9,
        "share": layer_bytes / seconds / bandwidth,
        "prefill ms": prefill * 1e3,
        "layout": op_layout(layout),
    }


def dense_row(threads: int, size: float, rounds: int, bandwidth: float) -> dict[str, Any]:
    layer_bytes = 2 * ROWS * COLUMNS
    copies = max(1, round(size / layer_bytes))
    weight = torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16)
    weights = [weight.clone() for _ in range(copies)]
    x, many = torch.randn(1, COLUMNS, dtype=torch.bfloat16), torch.randn(PREFILL, COLUMNS, dtype=torch.bfloat16)
    seconds = seconds_each(lambda i: torch.nn.functional.linear(x, weights[i]), copies, rounds)
    prefill = seconds_each(lambda i: torch.nn.functional.linear(many, weights[i]), min(copies, 4), rounds)
    return {
        "weight": "torch bf16",
        "threads": threads,
        "MB": layer_bytes / 1e6,
        "ms": seconds * 1e3,
        "weight GB/s": layer_bytes / seconds / 1e9,
        "share": layer_bytes / seconds / bandwidth,
        "times bf16": 1.0,
        "prefill ms": prefill * 1e3,
        "prefill / bf16": 1.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--codebooks", type=int, nargs="*", default=[2, 3, 4], help="their bits")
    parser.add_argument("--activations", nargs="+", choices=kernels.MODES, default=list(kernels.MODES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    size = arguments.gib * 2**30
    if kernels._kernels is None:
        raise SystemExit("the package was installed without its kernels: nothing to measure")
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            bandwidth = kernels._kernels.read_bandwidth(int(size), threads, arguments.rounds)
            print(f"{threads} threads: read bandwidth {bandwidth / 1e9:.1f} GB/s, {kernels.level()}", flush=True)
            dense = dense_row(threads, size, arguments.rounds, bandwidth)
            rows.append(dense)
            forms = [Format(bits, GROUP_SIZE) for bits in arguments.bits]
            forms += [Format(bits, 1, "codebook") for bits in arguments.codebooks]
            for form, mode in itertools.product(forms, arguments.activations):
                kernels.use_activations(mode)
                row = layer_row(form, threads, size, arguments.rounds, bandwidth)
                row["times bf16"] = dense["ms"] / row["ms"]
                row["prefill / bf16"] = dense["prefill ms"] / row["prefill ms"]
                rows.append(row)
                print(json.dumps(row), flush=True)
    columns = ("weight", "activations", "threads", "MB", "ms", "ms without Python", "weight GB/s", "share",
               "times bf16", "prefill ms", "prefill / bf16")  # fmt: skip
    table = markdown_table(columns, rows)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "kernels.json").write_text(
        json.dumps({"stamp": stamp(), "level": kernels.level(), "rows": rows}, indent=1)
    )
    (OUTPUT / "kernels.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
