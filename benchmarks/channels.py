"""One LLaMA-7B-shaped layer channel by channel: seconds and peak memory of cmpq and cmpq+.

    python -m benchmarks.channels                # 4096 x 4096 and 4096 x 11008, 3 nominal bits
    python -m benchmarks.channels --in-features 4096 --rows "cmpq"

Random weights with heavy tails, inputs as in benchmarks.layer. Each row runs in a process of its own: the peak is of
the whole process, less what it held before the recipe began (Python, torch, weight, Hessian, sample).
"""

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import torch

from benchmarks.common import OUTPUT, markdown_table, stamp
from benchmarks.layer import realistic_inputs, timed
from bitquilt.core.packing import bits_per_weight, pack
from bitquilt.core.types import Layer, LayerStats
from bitquilt.recipes import make_recipe

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "cmpq": ("cmpq", {}),
    "cmpq, published": ("cmpq", {"published": True}),
    "cmpq+": ("cmpq+", {}),
}
TOKENS = 2048
_MIB = 2**20


def measure(row: str, out_features: int, in_features: int, bits: float) -> dict[str, Any]:
    """Seconds of each verb and the growth of the process's peak, in this process."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(out_features, in_features, generator=generator)
    weight *= 1 + 0.3 * torch.randn(weight.shape, generator=generator).square()
    x = realistic_inputs(in_features, TOKENS, generator)
    layer = Layer("layer", weight, None, LayerStats(x.t() @ x, TOKENS, x))
    name, options = ROWS[row]
    recipe = make_recipe(name, bits=bits, **options)
    before = peak()
    prepared, prepare_seconds = timed(lambda: recipe.prepare(layer.stats))
    cost, measure_seconds = timed(lambda: recipe.measure(layer, prepared))
    plan = recipe.allocate(cost, in_features)
    solution, solve_seconds = timed(lambda: recipe.quantize(layer, plan, prepared))
    _, pack_seconds = timed(lambda: pack(solution.weight))
    return {
        "layer": f"{out_features} x {in_features}",
        "recipe": row,
        "bpw": bits_per_weight(solution.weight.layout),
        "prepare s": prepare_seconds,
        "measure s": measure_seconds,
        "quantize s": solve_seconds,
        "pack s": pack_seconds,
        "peak above start MiB": (peak() - before) / _MIB,
        "weight fp32 MiB": weight.nbytes / _MIB,
    }


def peak() -> int:
    """Largest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-features", type=int, default=4096)
    parser.add_argument("--in-features", type=int, nargs="+", default=[4096, 11008])
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--one", action="store_true", help="measure the first row here and print it")
    arguments = parser.parse_args()
    if arguments.one:
        with torch.no_grad():
            found = measure(arguments.rows[0], arguments.out_features, arguments.in_features[0], arguments.bits)
        print(json.dumps(found))
        return
    results = []
    for width in arguments.in_features:
        for row in arguments.rows:
            command = [sys.executable, "-m", "benchmarks.channels", "--one", "--rows", row, "--in-features", str(width)]
            command += ["--out-features", str(arguments.out_features), "--bits", str(arguments.bits)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(answer.splitlines()[-1]))
            print(json.dumps(results[-1]), flush=True)
    table = markdown_table(list(results[0]), results)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "channels.json").write_text(json.dumps({"stamp": stamp(), "rows": results}, indent=1))
    (OUTPUT / "channels.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
