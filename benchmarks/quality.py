"""Quality at equal bits: every recipe on the shared small models, KL and perplexity on held-out text.

    python -m benchmarks.quality            # all models, 2 and 3 bits, group size 32, 64 x 256 tokens
    python -m benchmarks.quality --models stories260k --bits 2

Calibrates and measures on different files of the text each model knows; 256-token windows, 60,000 tokens (at 12,000
the ranking of neighbours is still noise).
Needs the models and texts that BITQUILT_SHARED points to (default ../shared).
"""

import argparse
import json
from typing import Any

from benchmarks.common import OUTPUT, markdown_table, stamp
from benchmarks.scored import TEXTS, quantize_and_score
from benchmarks.shapes import grid_bpw, layer_shapes
from bitquilt import Budget
from bitquilt.core.recipe import Recipe
from bitquilt.recipes import make_recipe

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "gptq": ("gptq", {}),
    "gptq + scale search": ("gptq", {"scale_search": True}),
    "slim-llm, published": ("slim-llm", {"published": True}),
    "slim-llm": ("slim-llm", {}),
    "slim-llm, dp allocation": ("slim-llm", {"allocation": "dp"}),
    "mg-ptq": ("mg-ptq", {}),
    "mg-ptq, graph": ("mg-ptq", {"allocator": "graph"}),
    "mg-ptq, best swept": ("mg-ptq", {"allocator": "best"}),
    "mg-ptq, columns": ("mg-ptq", {"granularity": "column"}),
    "quilt": ("quilt", {}),
}
# As many true bits per weight as RTN takes, shared by all layers of the model.
ONE_BUDGET: dict[str, tuple[str, dict[str, Any]]] = {
    "quilt, one budget": ("quilt", {"group_size": 64}),
    "cmpq+, one budget": ("cmpq+", {}),
}


def measure(model: str, row: str, bits: int, group_size: int, seed: int) -> dict[str, Any]:
    """One recipe on one model: true size, KL and perplexity."""
    if row in ROWS:
        name, options = ROWS[row]
        return measure_recipe(model, row, name, options, bits, group_size, seed)
    name, options = ONE_BUDGET[row]
    budget = Budget("bpw", grid_bpw(layer_shapes(model), bits, group_size))
    return _measured(model, row, bits, make_recipe(name, **options), seed, budget=budget)


def measure_recipe(
    model: str, row: str, name: str, options: dict[str, Any], bits: int, group_size: int, seed: int
) -> dict[str, Any]:
    """The same for any recipe and options."""
    return _measured(model, row, bits, make_recipe(name, bits=bits, group_size=group_size, **options), seed)


def _measured(model: str, row: str, bits: int, recipe: Recipe, seed: int, **settings: Any) -> dict[str, Any]:
    found = quantize_and_score(model, recipe, tokens=60_000, samples=64, seed=seed, **settings)
    more = {"bytes": found.report["bytes"], "kl_p99": found.score.kl_p99}
    return {"model": model, "row": row, "bits": bits, **found.row(), **more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = [*ROWS, *ONE_BUDGET]
    parser.add_argument("--models", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument("--rows", nargs="+", default=known, choices=known)
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results = []
    for model in arguments.models:
        for bits in arguments.bits:
            for row in arguments.rows:
                results.append(measure(model, row, bits, arguments.group_size, arguments.seed))
                print(json.dumps(results[-1]), flush=True)
    columns = ["model", "bits", "row", "bpw", "kl_mean", "perplexity", "top1_agreement"]
    table = markdown_table(columns, results)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "quality.json").write_text(json.dumps({"stamp": stamp(), "results": results}, indent=1))
    (OUTPUT / "quality.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
