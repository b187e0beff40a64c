"""The native sweep against the Python sweep: processor seconds of one layer, their ratio, and whether both agree.

    python -m benchmarks.sweep                  # the layers of SmolLM2-135M, on one thread
    python -m benchmarks.sweep --large          # and 4096 x 4096, as in LLaMA-7B: minutes

`gptq`: groups of 128 on min-max grids of 3 bits. `cmpq+`: channels of 2, 3 and 4 bits with shared tables.
"""

import argparse
import json
import resource
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import OUTPUT, markdown_table, stamp
from benchmarks.layer import realistic_inputs
from bitquilt.core.types import group_slices
from bitquilt.layer.codebook_weight import LevelTables, sweep_channels
from bitquilt.layer.gptq_sweep import sweep
from bitquilt.layer.grids.uniform import fit
from bitquilt.layer.hessian import factorize
from bitquilt.ops import sweep_kernels

SHAPES = ((576, 576), (1536, 576), (576, 1536))


def processor_seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of `work`, and the seconds of this process that it took on all processors."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    result = work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def works(rows: int, columns: int) -> dict[str, Callable[[], Tensor]]:
    """Sweeps of one random layer by recipe; each returns all its codes."""
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(rows, columns, generator=g), realistic_inputs(columns, 2 * columns, g)
    hessian = x.t() @ x / len(x)
    plain = factorize(hessian, 0.01)
    ordered = factorize(hessian, 0.01, hessian.diagonal().argsort(descending=True))
    bits, none = [2 + j % 3 for j in range(columns)], torch.zeros(rows, columns, dtype=torch.bool)

    def uniform() -> Tensor:
        return sweep(weight, plain.upper, group_slices(columns, 128), lambda _k, w: fit(w, 3)).codes

    def shared() -> Tensor:
        stored, _, _ = sweep_channels(weight, bits, LevelTables(), none, ordered.importance, ordered)
        return torch.cat([segment.codes for segment in stored.segments], dim=1)

    return {"gptq": uniform, "cmpq+": shared}


def compared(shape: tuple[int, int], name: str, work: Callable[[], Tensor]) -> dict[str, Any]:
    """One row of the table: the fastest of three native sweeps, and one in Python."""
    runs = [processor_seconds(work) for _ in range(3)]
    found, native = min(runs, key=lambda run: run[1])
    with mock.patch.object(sweep_kernels, "usable", return_value=False):
        wanted, python = processor_seconds(work)
    times = {"Python, s": python, "native, s": native, "ratio": python / native}
    agree = float((found == wanted).double().mean())
    return {"layer": f"{shape[0]} x {shape[1]}", "sweep": name, **times, "equal codes": agree}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="also 4096 x 4096")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = (*SHAPES, (4096, 4096)) if arguments.large else SHAPES
    rows = [compared(shape, name, work) for shape in shapes for name, work in works(*shape).items()]
    print(markdown_table(list(rows[0]), rows))
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "sweep.json").write_text(json.dumps({"about": stamp(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
