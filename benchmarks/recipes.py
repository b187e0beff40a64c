"""All recipes side by side at about the same TRUE bits per weight, and the Hessians and allocators against each other.

    python -m benchmarks.recipes                                   # three models, 64 x 256 tokens, 12,000 evaluated
    python -m benchmarks.recipes --models demo --rows aptq mg-ptq --targets 3.1
    python -m benchmarks.recipes --parts hessian                   # gptq and slim-llm with B / out instead of X^T X
    python -m benchmarks.recipes --parts allocators                # mg-ptq's maps on the same tables, before and after

Part `table`: every recipe at the setting whose bpw comes nearest to the target: bits from 2 to 4 (in steps that the
recipe takes) and group sizes 32 to 128, predicted by `packing`, run once. RTN and GPTQ are the baselines; micromix runs
at its own 4.5 to 6. Calibrates and measures on different files.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitquilt
from benchmarks.common import OUTPUT, SHARED, markdown_table, stamp
from benchmarks.curve import layer_shapes
from benchmarks.quality import TEXTS
from bitquilt.errors import UserError
from bitquilt.models.structure import quiet_transformers
from bitquilt.packing import storage_bits
from bitquilt.recipes import make_recipe
from bitquilt.types import Format, Layout

TARGETS = (2.3, 2.6, 3.1, 4.2)
WHOLE, FRACTIONS = (2, 3, 4), tuple(round(2 + 0.1 * i, 1) for i in range(21))
GROUPS = (32, 64, 128)
ROWS: dict[str, tuple[str, dict[str, Any], Sequence[float]]] = {
    "rtn": ("rtn", {}, WHOLE),
    "gptq": ("gptq", {}, WHOLE),
    "gptq + scale search": ("gptq", {"scale_search": True}, WHOLE),
    "slim-llm": ("slim-llm", {}, WHOLE),
    "mg-ptq": ("mg-ptq", {}, FRACTIONS),
    "aptq": ("aptq", {}, FRACTIONS),
    "aptq + scale search, hawq2": (
        "aptq", {"scale_search": True, "allocation": "hawq2", "palette": (2, 3, 4)}, FRACTIONS,
    ),
}  # fmt: skip
CODEBOOKS = {"cmpq": "cmpq", "cmpq+": "cmpq+"}
MICROMIX = (4.25, 5.0, 5.75)
HESSIANS = {"gptq": {"scale_search": True}, "slim-llm": {}}
COLUMNS = ["model", "target", "row", "setting", "bpw", "kl_mean", "perplexity", "top1_agreement", "seconds"]


def predicted_bpw(shapes: dict[str, tuple[int, int]], bits: float, group_size: int) -> float:
    """True bits per weight of uniform grids of `bits` on average."""
    stored = weights = 0.0
    for rows, columns in shapes.values():
        low = int(bits)
        ends = [
            storage_bits(Layout(rows, columns, ((Format(b, group_size), columns),))) for b in (low, min(low + 1, 8))
        ]
        stored += ends[0] + (bits - low) * (ends[1] - ends[0])
        weights += rows * columns
    return stored / weights


def nearest(shapes: dict[str, tuple[int, int]], widths: Sequence[float], target: float) -> tuple[float, int]:
    """Bits and group size whose predicted bpw is nearest to the target; the smaller group wins a tie."""
    choices = [(bits, group) for bits in widths for group in GROUPS]
    return min(choices, key=lambda choice: (abs(predicted_bpw(shapes, *choice) - target), choice[1]))


def run(model: str, recipe: str, options: dict[str, Any], size: dict[str, int]) -> tuple[dict[str, Any], Any]:
    """One run and its scores; and its report."""
    calibration, evaluation = (SHARED / "text" / text for text in TEXTS[model])
    source = SHARED / "models" / model
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        started = time.perf_counter()
        out = Path(folder) / "out"
        made = make_recipe(recipe, **options)
        report = bitquilt.quantize(source, made, calibration, out, samples=size["samples"], seq_len=256).report
        seconds = time.perf_counter() - started
        score = bitquilt.evaluate(out, evaluation, reference=source, seq_len=256, max_tokens=size["tokens"])
    value = {
        "model": model,
        "setting": " ".join(f"{key}={value}" for key, value in options.items() if key in ("bits", "group_size", "bpw")),
        "bpw": report["bpw"],
        "nominal_bits": report["nominal_bits"],
        "kl_mean": score.kl_mean,
        "perplexity": score.perplexity,
        "top1_agreement": score.top1_agreement,
        "seconds": round(seconds, 1),
    }
    return value, report


def table(model: str, arguments: argparse.Namespace, size: dict[str, int]) -> list[dict[str, Any]]:
    """Every recipe near every target; a setting that serves two targets runs once."""
    shapes, results, done = layer_shapes(model), [], set()
    for target in arguments.targets:
        for row in arguments.rows:
            if row == "micromix":
                continue
            if row in ROWS:
                name, options, widths = ROWS[row]
                bits, group_size = nearest(shapes, widths, target)
                chosen = {"bits": bits, "group_size": group_size, **options}
            else:
                name, chosen = CODEBOOKS[row], {"bpw": target}
            if (key := (row, str(chosen))) in done:
                continue
            done.add(key)
            results += show(model, row, name, chosen, size, target=target)
    for bits in MICROMIX if "micromix" in arguments.rows else ():
        results += show(model, "micromix", "micromix", {"bits": bits, "alignment": 32}, size, target=bits)
    return results


def hessian(model: str, size: dict[str, int]) -> list[dict[str, Any]]:
    """The input's Hessian and the sub-block's output's, all else equal."""
    results = []
    for name, options in HESSIANS.items():
        for bits in (2, 3):
            for kind in ("input", "attention"):
                chosen = {"bits": bits, "group_size": 32, "hessian": kind, **options}
                results += show(model, f"{name}, {kind}", name, chosen, size)
    return results


def allocators(model: str, size: dict[str, int]) -> list[dict[str, Any]]:
    """Sums over layers of mg-ptq's table errors and swept losses, relative to uniform bits."""
    results = []
    for bits in (2, 3):
        for group_size in (8, 32):
            _, report = run(model, "mg-ptq", {"bits": bits, "group_size": group_size}, size)
            sums: dict[str, float] = {}
            for layer in report["layers"].values():
                for kind in ("table_error", "swept_loss"):
                    for name, value in layer[kind].items():
                        share = value / max(layer[kind]["uniform"], 1e-30)
                        sums[f"{kind}, {name}"] = sums.get(f"{kind}, {name}", 0.0) + share / len(report["layers"])
            results.append({"part": "allocators", "model": model, "bits": bits, "group_size": group_size, **sums})
            print(json.dumps(results[-1]), flush=True)
    return results


def show(
    model: str, row: str, name: str, options: dict[str, Any], size: dict[str, int], **extra: Any
) -> list[dict[str, Any]]:
    """One row, printed when it is there; none where the recipe cannot meet the setting."""
    try:
        value, _ = run(model, name, options, size)
    except UserError as error:
        print(f"{model}, {row}, {options}: {error}", flush=True)
        return []
    value = {"row": row, **extra, **value}
    print(json.dumps(value), flush=True)
    return [value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [*ROWS, *CODEBOOKS, "micromix"]
    parts = ["table", "hessian", "allocators"]
    parser.add_argument("--models", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--rows", nargs="+", default=rows, choices=rows)
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=12_000)
    arguments = parser.parse_args()
    size = {"samples": arguments.samples, "tokens": arguments.tokens}
    results: list[dict[str, Any]] = []
    for model in arguments.models:
        if "table" in arguments.parts:
            results += table(model, arguments, size)
        if "hessian" in arguments.parts:
            results += hessian(model, size)
        if "allocators" in arguments.parts:
            results += allocators(model, size)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "recipes.json").write_text(json.dumps({"stamp": stamp(), "results": results}, indent=1))
    text = markdown_table(COLUMNS, [r for r in results if "row" in r])
    (OUTPUT / "recipes.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
