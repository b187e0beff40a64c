"""AutoRound (`auto-round` from the package index) on the shared models: same calibration ids, linears and bits as ours.

    python -m venv --system-site-packages ENV && ENV/bin/pip install auto-round py-cpuinfo   # not a dependency of ours
    ENV/bin/python -m benchmarks.autoround                             # stories260k, 2 and 3 bits, group size 32 and 64
    ENV/bin/python -m benchmarks.autoround --models demo --presets default --bits 2 --group-size 64

Its presets `default` (200 steps) and `best` (1000 steps), with symmetric grids (no zero, as it ships) and asymmetric
ones (a zero of as many bits as a code); scales fp16 in groups of the same size; block linears only, and of these those
whose sides are multiples of 32 (stories260k: attention alone; see benchmarks.training --parts attention). The number of
samples is that of benchmarks.training for every preset. `bpw` is what `packing` counts for such grids. Rows are kept in
benchmarks/output/training.json beside ours.
"""

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import SHARED
from benchmarks.scored import SEQ_LEN, TEXTS, calibration_ids, score_weights
from benchmarks.shapes import grid_bpw, layer_shapes
from benchmarks.training import EVALUATED, SAMPLES, Table
from bitquilt.model.transformers_logging import quiet_transformers

STEPS = {"default": 200, "best": 1000}


def measure(model: str, preset: str, bits: int, group_size: int, symmetric: bool, seed: int) -> dict[str, Any]:
    """One run of AutoRound, evaluated as ours are."""
    from auto_round import AutoRound  # type: ignore[import-not-found]

    source = SHARED / "models" / model
    with quiet_transformers():
        module = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
    started = time.perf_counter()
    run = AutoRound(
        module, tokenizer, bits=bits, group_size=group_size, sym=symmetric, iters=STEPS[preset], nsamples=SAMPLES,
        seqlen=SEQ_LEN, batch_size=8, dataset=list(calibration_ids(model, SAMPLES, seed).split(8)), device_map="cpu",
        seed=seed, enable_torch_compile=False, amp=False, scale_dtype="fp16",
    )  # fmt: skip
    rounded, _ = run.quantize()
    seconds = time.perf_counter() - started
    shapes, plain = layer_shapes(model), AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    found = {name: rounded.get_submodule(name).weight.data.float() for name in shapes}
    done = [name for name, weight in found.items() if not torch.equal(weight, plain.get_submodule(name).weight)]
    return {
        "bpw": grid_bpw({name: shapes[name] for name in done}, bits, group_size, symmetric),
        "linears": f"{len(done)} of {len(found)}",
        **score_weights(model, {name: found[name] for name in done}, tokens=EVALUATED),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["stories260k"], choices=list(TEXTS))
    parser.add_argument("--presets", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--group-size", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--grids", nargs="+", default=["sym", "asym"], choices=["sym", "asym"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = Table()
    for model in arguments.models:
        for bits in arguments.bits:
            for group_size in arguments.group_size:
                for preset in arguments.presets:
                    for grid in arguments.grids:
                        key = (model, f"auto-round {preset}, {grid}", bits, group_size, arguments.seed)
                        table.row(key, measure, model, preset, bits, group_size, grid == "sym", arguments.seed)
    table.write()


if __name__ == "__main__":
    main()
