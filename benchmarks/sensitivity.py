"""Does a proxy know which layer hurts? Predicted loss of each layer at each width against the measured truth.

    python -m benchmarks.sensitivity                       # three models, slim-llm, group size 32
    python -m benchmarks.sensitivity --models demo --widths 2 3 --layers 14 --windows 16     # drawn at random

Truth: one layer quantized by the recipe at one width, everything else in full precision, KL on held-out text. Reported
are Spearman's rank correlation over the layers at each width, and the ratio of the sums (1 = the unit is right).
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.common import OUTPUT, SHARED, markdown_table, stamp
from benchmarks.scored import TEXTS
from bitquilt.models.checkpoint import open_checkpoint
from bitquilt.models.linear import QuantizedLinear
from bitquilt.models.structure import open_skeleton, quiet_transformers
from bitquilt.recipes import make_recipe
from bitquilt.runtime.calibration import load_tokenizer, make_calibration
from bitquilt.runtime.job import Job, all_targets
from bitquilt.runtime.sensitivities import measure
from bitquilt.runtime.stats import collect
from bitquilt.text import token_stream, windows
from bitquilt.types import Layer, uniform_plan

METHODS = ("kfac", "activation")
WINDOWS = 48


def truth(
    model: Any, ids: Tensor, held_out: Tensor, recipe: Any, widths: list[int], names: list[str]
) -> dict[str, list[float]]:
    """KL [widths] of each of these linear layers, quantized alone."""
    linears = {name: model.get_submodule(name) for name in names}
    with torch.no_grad():
        stats = collect(linears, (model(part) for part in ids.split(16)), hessian=True, sample=0, tokens=ids.numel())
        expected = torch.cat([model(part).logits.log_softmax(-1) for part in held_out.split(16)])
    found: dict[str, list[float]] = {}
    for name, module in linears.items():
        weight = module.weight.data
        layer = Layer(name, weight.clone(), None, stats[name])
        prepared = recipe.prepare(stats[name])
        found[name] = []
        for bits in widths:
            plan = uniform_plan(weight.shape[1], bits, recipe.group_size)
            module.weight.data = QuantizedLinear.from_weight(recipe.quantize(layer, plan, prepared).weight).dequantize()
            found[name].append(divergence(model, held_out, expected))
        module.weight.data = weight
    return found


@torch.no_grad()
def divergence(model: Any, ids: Tensor, expected: Tensor) -> float:
    """Mean KL(full precision || model) in nats per token."""
    total = 0.0
    for part, right in zip(ids.split(16), expected.split(16), strict=True):
        total += float((right.exp() * (right - model(part).logits.log_softmax(-1))).sum(dtype=torch.float64))
    return total / ids.numel()


def compare(
    name: str, recipe_name: str, widths: list[int], group_size: int, count: int | None, number: int
) -> list[dict[str, Any]]:
    """A row per proxy and width, over `count` layers drawn at random, and `number` windows of text."""
    source = SHARED / "models" / name
    skeleton = open_skeleton(open_checkpoint(source))
    calibration, evaluation = (SHARED / "text" / text for text in TEXTS[name])
    vocabulary = int(skeleton.checkpoint.config["vocab_size"])
    ids = make_calibration(
        skeleton.checkpoint,
        calibration,
        samples=64,
        seq_len=256,
        seed=0,
        vocabulary=vocabulary,
        progress=lambda _: None,
    )
    held_out = windows(token_stream(evaluation, load_tokenizer(source), vocab_size=vocabulary), 256, number, 1)
    recipe = make_recipe(recipe_name, group_size=group_size)
    layers = list(all_targets(skeleton, (), include_head=False))
    if count is not None:
        layers = sorted(random.Random(0).sample(layers, count), key=layers.index)
    started = time.perf_counter()
    measured = truth(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), ids, held_out, recipe, widths, layers
    )
    seconds = {"truth": time.perf_counter() - started}
    rows = []
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            found = measure(Job(skeleton, recipe, ids, Path(folder), 4), lambda _: None, method=method)
            seconds[method] = time.perf_counter() - started
        for i, bits in enumerate(widths):
            guess = [float(found.losses[n][:, found.widths[n].index(bits)].sum()) for n in layers]
            right = [measured[n][i] for n in layers]
            rows.append({
                "model": name, "proxy": method, "bits": bits, "layers": len(layers),
                "rank correlation": float(spearmanr(guess, right)[0]),
                "sum predicted": sum(guess), "sum measured": sum(right),
                "measured / predicted": sum(right) / sum(guess),
                "seconds": round(seconds[method], 1), "seconds of the truth": round(seconds["truth"], 1),
                "by layer": dict(zip(layers, zip(guess, right, strict=True), strict=True)),
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument("--recipe", default="slim-llm")
    parser.add_argument("--widths", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--layers", type=int, help="so many, drawn at random (default: all)")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of 256 tokens")
    arguments = parser.parse_args()
    rows = []
    with quiet_transformers():
        for model in arguments.models:
            rows += compare(
                model, arguments.recipe, arguments.widths, arguments.group_size, arguments.layers, arguments.windows
            )
            for row in rows[-2 * len(arguments.widths) :]:
                print(json.dumps({key: value for key, value in row.items() if key != "by layer"}), flush=True)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "sensitivity.json").write_text(json.dumps({"stamp": stamp(), "results": rows}, indent=1))
    columns = [key for key in rows[0] if key != "by layer"]
    (OUTPUT / "sensitivity.md").write_text(table := markdown_table(columns, rows))
    print(table)


if __name__ == "__main__":
    main()
