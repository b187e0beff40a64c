"""All recipes side by side at about the same TRUE bits per weight, and the Hessians and allocators against each other.

    python -m benchmarks.recipes                                   # three models, 32 x 256 tokens, 12,000 evaluated
    python -m benchmarks.recipes --models demo --rows aptq mg-ptq --targets 3.1
    python -m benchmarks.recipes --parts hessian                   # gptq and slim-llm with B / out instead of X^T X
    python -m benchmarks.recipes --parts allocators                # mg-ptq's maps on the same tables, before and after

Part `table`: every recipe at the setting whose bpw comes nearest to the target: at the target itself where the recipe
takes one (`bpw`), else bits from 2 to 4 (in steps that the recipe takes) and group sizes 32 to 128, predicted by
`packing`. RTN and GPTQ are the baselines; micromix has no element below 4 bits and runs at 4.3 and more. Calibrates and
measures on different files. Finished rows are kept (`benchmarks.rows`): an interrupted run continues.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from benchmarks.common import OUTPUT, markdown_table, stamp
from benchmarks.rows import Run, measured
from benchmarks.scored import TEXTS
from benchmarks.shapes import layer_shapes
from bitquilt.core.packing import storage_bits
from bitquilt.core.types import Format, Layout, uniform_plan
from bitquilt.recipes import make_recipe

TARGETS = (2.3, 2.6, 3.1, 4.2)
WHOLE, FRACTIONS = (2, 3, 4), tuple(round(2 + 0.1 * i, 1) for i in range(21))
GROUPS = (32, 64, 128)
ROWS: dict[str, tuple[str, dict[str, Any], Sequence[float]]] = {
    "rtn": ("rtn", {}, WHOLE),
    "gptq": ("gptq", {}, WHOLE),
    "gptq + scale search": ("gptq", {"scale_search": True}, WHOLE),
    "slim-llm": ("slim-llm", {}, WHOLE),
    "slim-llm+, 10 epochs": ("slim-llm+", {"epochs": 10}, WHOLE),
    "quilt": ("quilt", {}, WHOLE),
    "mg-ptq": ("mg-ptq", {}, FRACTIONS),
    "aptq": ("aptq", {}, FRACTIONS),
    "aptq + scale search, hawq2": (
        "aptq", {"scale_search": True, "allocation": "hawq2", "palette": (2, 3, 4)}, FRACTIONS,
    ),
}  # fmt: skip
CODEBOOKS = ("cmpq", "cmpq+")
SHARED_BUDGET: dict[str, tuple[str, dict[str, Any]]] = {
    "quilt, one budget for all layers": ("quilt", {"group_size": 64}),
    "cmpq+, one budget for all layers": ("cmpq+", {}),
}
MICROMIX = (4.25, 5.0, 5.75)
HESSIANS = {"gptq": {"scale_search": True}, "slim-llm": {}}
COLUMNS = ["model", "target", "row", "setting", "bpw", "kl_mean", "perplexity", "top1_agreement", "cpu_seconds"]


def predicted_bpw(shapes: dict[str, tuple[int, int]], row: str, bits: float, group_size: int) -> float:
    """True bits per weight of a row of ROWS at `bits` on average."""
    name, options, _ = ROWS[row]
    stored = weights = 0.0
    for rows, columns in shapes.values():
        low = int(bits)
        recipe: Any = make_recipe(name, **options)
        if bits == low:
            stored += storage_bits(recipe.layout(rows, columns, uniform_plan(columns, low, group_size)))
        else:
            ends = [
                storage_bits(Layout(rows, columns, ((Format(b, group_size), columns),))) for b in (low, min(low + 1, 8))
            ]
            share = bits - low
            if name == "mg-ptq":  # every layer for itself, in whole groups from below; aptq mixes whole layers
                groups = -(-columns // group_size)
                share = int(share * groups + 1e-9) / groups
            stored += ends[0] + share * (ends[1] - ends[0])
        weights += rows * columns
    return stored / weights


def nearest(shapes: dict[str, tuple[int, int]], row: str, target: float) -> tuple[float, int]:
    """Bits and group size whose predicted bpw is nearest to the target; the smaller group wins a tie."""
    choices = [(bits, group) for bits in ROWS[row][2] for group in GROUPS]
    return min(choices, key=lambda choice: (abs(predicted_bpw(shapes, row, *choice) - target), choice[1]))


def table(model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every recipe near every target; a setting that serves two targets runs once."""
    shapes, results = layer_shapes(model), []
    for target in arguments.targets:
        for row in arguments.rows:
            if row == "micromix":
                continue
            budget = None
            if row in ROWS:
                name, options, _ = ROWS[row]
                bits, group_size = nearest(shapes, row, target)
                chosen = {"bits": bits, "group_size": group_size, **options}
            elif row in SHARED_BUDGET:
                name, chosen = SHARED_BUDGET[row]
                budget = target
            else:
                name, chosen = row, {"bpw": target}
            results += show(model, row, name, chosen, arguments, budget, target=target)
    for bits in MICROMIX if "micromix" in arguments.rows else ():
        results += show(model, "micromix", "micromix", {"bits": bits, "alignment": 32}, arguments, target=bits)
    return results


def hessian(model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The input's Hessian and the sub-block's output's, all else equal."""
    results = []
    for name, options in HESSIANS.items():
        for bits in (2, 3):
            for kind in ("input", "attention"):
                chosen = {"bits": bits, "group_size": 32, "hessian": kind, **options}
                results += show(model, f"{name}, {kind}", name, chosen, arguments)
    return results


def allocators(model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Means over layers of mg-ptq's table errors and swept losses, relative to uniform bits."""
    results = []
    for bits in (2, 3):
        for group_size in (8, 32):
            chosen = {"bits": bits, "group_size": group_size, "allocator": "best"}
            found = measured(
                Run(model, "mg-ptq", chosen, arguments.samples, arguments.tokens), arguments.again, arguments.kept
            )
            if found is None:
                continue
            shares: dict[str, float] = {}
            for layer in found["layers"].values():
                for kind in ("table_error", "swept_loss"):
                    for name, value in layer[kind].items():
                        share = value / max(layer[kind]["uniform"], 1e-30)
                        shares[f"{kind}, {name}"] = shares.get(f"{kind}, {name}", 0.0) + share / len(found["layers"])
            results.append({"part": "allocators", "model": model, **chosen, **shares})
            print(json.dumps(results[-1]), flush=True)
    return results


def show(
    model: str, row: str, name: str, options: dict[str, Any], arguments: argparse.Namespace,
    budget: float | None = None, **extra: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row, printed when it is there; none where the recipe cannot meet the setting."""
    run = Run(model, name, options, arguments.samples, arguments.tokens, budget)
    found = measured(run, arguments.again, arguments.kept)
    if found is None:
        return []
    value = {"row": row, **extra, **{key: found.get(key) for key in COLUMNS if key in found}}
    print(json.dumps(value), flush=True)
    return [value]


def side_by_side(results: list[dict[str, Any]]) -> str:
    """A table per model, a column per target: KL (bits per weight; perplexity; processor seconds)."""
    text = ""
    for model in dict.fromkeys(r["model"] for r in results):
        mine = [r for r in results if r["model"] == model]
        targets = list(dict.fromkeys(r["target"] for r in mine if r["row"] != "micromix"))
        lines: dict[str, dict[str, Any]] = {}
        for r in mine:
            cell = f"{r['kl_mean']:.3g} ({r['bpw']:.3f}; {r['perplexity']:.4g}; {r['cpu_seconds']:.0f} s)"
            own = r["row"] == "micromix"
            line = lines.setdefault(f"micromix, {r['setting']}" if own else r["row"], {})
            line["its own size" if own else f"about {r['target']:g}"] = cell
        columns = [model, *(f"about {t:g}" for t in targets), "its own size"]
        text += markdown_table(columns, [{model: row, **line} for row, line in lines.items()]) + "\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [*ROWS, *SHARED_BUDGET, *CODEBOOKS, "micromix"]
    parts = ["table", "hessian", "allocators"]
    parser.add_argument("--models", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--rows", nargs="+", default=rows, choices=rows)
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--again", action="store_true", help="measure kept rows anew")
    parser.add_argument("--kept", action="store_true", help="measure nothing: tables of what was measured before")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    for model in arguments.models:
        if "table" in arguments.parts:
            results += table(model, arguments)
        if "hessian" in arguments.parts:
            results += hessian(model, arguments)
        if "allocators" in arguments.parts:
            results += allocators(model, arguments)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "recipes.json").write_text(json.dumps({"stamp": stamp(), "results": results}, indent=1))
    text = side_by_side(results) if arguments.parts == ["table"] else ""
    text += markdown_table(COLUMNS, [r for r in results if "row" in r])
    (OUTPUT / "recipes.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
