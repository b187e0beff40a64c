"""Does a proxy know which layer hurts? Predicted loss of each layer at each width against the measured truth.

    python -m benchmarks.sensitivity                       # three models, slim-llm, group size 32
    python -m benchmarks.sensitivity --models demo --widths 2 3 --layers 14 --windows 16     # drawn at random
    python -m benchmarks.sensitivity --cost --models stories260k demo block                  # seconds, no correlations

Truth: one layer quantized by the recipe at one width, everything else in full precision, KL on held-out text. Reported
are Spearman's rank correlation over the layers at each width, and the ratio of the sums (1 = the unit is right).

`--cost`: processor seconds of measuring the tables, and of quantizing with them, one after the other in one process, by
the recipes of COSTS, with 16,384 tokens to calibrate on; `quantize` takes up to sixteen times as many by itself
(`--samples`), of which no more than these are measured. `block`: one block as wide as in a Llama of 1.1 billion
parameters, random weights.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import bitquilt
from benchmarks.common import OUTPUT, SHARED, markdown_table, stamp
from benchmarks.scored import TEXTS
from bitquilt import Budget, Calibration
from bitquilt.core.types import Layer, uniform_plan
from bitquilt.data.calibration import load_tokenizer, make_calibration
from bitquilt.data.tokens import token_stream, windows
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.linear import QuantizedLinear
from bitquilt.model.structure import open_skeleton
from bitquilt.model.transformers_logging import quiet_transformers
from bitquilt.planning.measure_sensitivities import measure
from bitquilt.recipes import make_recipe
from bitquilt.stream.job import CalibratedJob, all_targets
from bitquilt.stream.statistics import collect

COSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "gptq": ("gptq", {}),
    "gptq, scale search": ("gptq", {"scale_search": True}),
    "slim-llm": ("slim-llm", {}),
    "mg-ptq": ("mg-ptq", {}),
    "cmpq": ("cmpq", {}),
    "cmpq+": ("cmpq+", {}),
    "quilt": ("quilt", {}),
}
BLOCK = "block"
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
    """A row per width, over `count` layers drawn at random, and `number` windows of text."""
    source = SHARED / "models" / name
    skeleton = open_skeleton(open_checkpoint(source))
    calibration, evaluation = (SHARED / "text" / text for text in TEXTS[name])
    vocabulary = int(skeleton.checkpoint.config["vocab_size"])
    ids = make_calibration(
        skeleton.checkpoint,
        Calibration(calibration, samples=64, seq_len=256, bos=False),
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
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        job = CalibratedJob(skeleton=skeleton, recipe=recipe, folder=Path(folder), ids=ids, batch_size=4)
        found = measure(job, lambda _: None)
        seconds["proxy"] = time.perf_counter() - started
    for i, bits in enumerate(widths):
        guess = [float(found.losses[n][:, found.widths[n].index(bits)].sum()) for n in layers]
        right = [measured[n][i] for n in layers]
        rows.append({
            "model": name, "proxy": "kfac", "bits": bits, "layers": len(layers),
            "rank correlation": float(spearmanr(guess, right)[0]),
            "sum predicted": sum(guess), "sum measured": sum(right),
            "measured / predicted": sum(right) / sum(guess),
            "seconds": round(seconds["proxy"], 1), "seconds of the truth": round(seconds["truth"], 1),
            "by layer": dict(zip(layers, zip(guess, right, strict=True), strict=True)),
        })  # fmt: skip
    return rows


def one_block(folder: Path) -> tuple[Path, Path]:
    """A Llama of one block, 2048 wide, and 32 x 512 token ids."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=512, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / BLOCK)
    save_file({"input_ids": torch.randint(3, 512, (32, 512))}, folder / "ids.safetensors")
    return folder / BLOCK, folder / "ids.safetensors"


def cost(model: str, row: str, folder: Path, samples: int) -> dict[str, Any]:
    """Processor seconds of measuring and of quantizing to one bit above the least that the recipe reaches."""
    name, options = COSTS[row]
    data: dict[str, Any] = {"samples": samples, "seq_len": 256, "bos": False}
    if model == BLOCK:
        source, calibration = one_block(folder)
        data = {"samples": min(samples // 2, 32), "seq_len": 512, "bos": False}
    else:
        source, calibration = SHARED / "models" / model, SHARED / "text" / TEXTS[model][0]
    started = time.process_time()
    bitquilt.measure_model(source, folder / "tables", name, calibration, **data, **options)
    measured = time.process_time() - started
    alone = {**options, "keep_embedding": True}
    least = bitquilt.plan(source, name, budget=Budget("size", 1e15), **alone).summary["reachable_bytes"][0]
    found = bitquilt.plan(source, name, budget=Budget("size", least), **alone).summary["bpw"]
    recipe = make_recipe(name, **options)
    started = time.process_time()
    bitquilt.quantize(source, recipe, calibration, folder / "out", budget=Budget("bpw", found + 1),
                      sensitivities=folder / "tables", **data)  # fmt: skip
    quantized = time.process_time() - started
    return {"model": model, "recipe": row, "samples": samples, "measuring": round(measured, 1),
            "quantizing": round(quantized, 1), "measuring / quantizing": round(measured / quantized, 2)}  # fmt: skip


def costs(models: list[str], recipes: list[str], samples: int) -> None:
    """A line per model and recipe, kept as soon as it is there."""
    path, rows = OUTPUT / "sensitivity-cost.json", list[dict[str, Any]]()
    torch.set_num_threads(1)
    for model in models:
        for row in recipes:
            with tempfile.TemporaryDirectory() as folder, quiet_transformers():
                rows.append(cost(model, row, Path(folder), samples))
            print(json.dumps(rows[-1]), flush=True)
            OUTPUT.mkdir(exist_ok=True)
            path.write_text(json.dumps({"stamp": stamp(), "results": rows}, indent=1))
    print(markdown_table(list(rows[0]), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(TEXTS), choices=[*TEXTS, BLOCK])
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--recipes", nargs="+", default=list(COSTS), choices=list(COSTS), help="with --cost")
    parser.add_argument("--samples", type=int, default=64, help="with --cost: of 256 tokens, to calibrate on")
    parser.add_argument("--recipe", default="slim-llm")
    parser.add_argument("--widths", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--layers", type=int, help="so many, drawn at random (default: all)")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of 256 tokens")
    arguments = parser.parse_args()
    if arguments.cost:
        costs(arguments.models, arguments.recipes, arguments.samples)
        return
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
