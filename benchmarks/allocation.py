"""Is a global allocation better than the published one? KL at equal true bits per weight, and the predictions beside.

    python -m benchmarks.allocation                                   # three models, three recipes, five budgets
    python -m benchmarks.allocation --models stories260k --recipes gptq --bpw 2.5

Columns: `global` = column groups (channels) of the whole model; `layers` = one width a layer; `layer` = every layer
the same bits per weight, its groups by the same tables; `uniform` = every layer the same, wider groups evenly spread;
`published` = the recipe's own rule in every layer. Sensitivities and calibration are the same for all. At the end: how
far the predicted KL is from the measured one, for every row that has a prediction.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import bitquilt
from benchmarks.common import OUTPUT, SHARED, markdown_table, stamp
from benchmarks.quality import TEXTS
from bitquilt import Budget
from bitquilt.errors import UserError
from bitquilt.models.structure import quiet_transformers
from bitquilt.recipes import make_recipe
from bitquilt.sensitivity.together import RANGE

RECIPES: dict[str, dict[str, Any]] = {
    "slim-llm": {"group_size": 128},
    "gptq": {"group_size": 128, "scale_search": True},
    "cmpq+": {},
}
BPW = (2.25, 2.5, 3.0, 3.5, 4.0)
DATA: dict[str, Any] = {"samples": 64, "seq_len": 256, "seed": 0}
TOKENS = 30_000


def measure(model: str, name: str, column: str, bpw: float, folder: Path, sensitivities: Path) -> dict[str, Any]:
    """One run; `kl` None where the budget is out of reach."""
    calibration, evaluation = (SHARED / "text" / text for text in TEXTS[model])
    source, out = SHARED / "models" / model, folder / "out"
    options: dict[str, Any] = {"budget": Budget("bpw", bpw), "scope": column, "sensitivities": sensitivities}
    recipe: Any = make_recipe(name, **RECIPES[name])
    if column == "published":
        recipe, options = make_recipe(name, **{**RECIPES[name], "bpw": bpw}), {}
    row: dict[str, Any] = {"model": model, "recipe": name, "bpw": bpw, "column": column}
    started = time.perf_counter()
    try:
        result = bitquilt.quantize(source, recipe, calibration, out, **DATA, **options)
    except UserError as error:
        return {**row, "kl": None, "why": str(error)[:120]}
    row["seconds"] = round(time.perf_counter() - started, 1)
    score = bitquilt.evaluate(out, evaluation, reference=source, seq_len=256, max_tokens=TOKENS)
    row |= {"true bpw": result.report["bpw"], "kl": score.kl_mean, "perplexity": score.perplexity}
    return row | {"predicted": (result.report.get("prediction") or {}).get("kl")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--columns", nargs="+", default=["global", "layers", "layer", "uniform"])
    parser.add_argument("--bpw", nargs="+", type=float, default=list(BPW))
    parser.add_argument("--output", type=Path, default=OUTPUT / "allocation.json")
    arguments = parser.parse_args()
    OUTPUT.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    with quiet_transformers():
        for model in arguments.models:
            for name in arguments.recipes:
                tables = OUTPUT / f"{model}-{name}-{RECIPES[name].get('group_size', 1)}.sensitivities"
                if not tables.is_file():
                    calibration = SHARED / "text" / TEXTS[model][0]
                    source = SHARED / "models" / model
                    bitquilt.measure_model(source, tables, name, calibration, **DATA, **RECIPES[name])
                for bpw in arguments.bpw:
                    for column in arguments.columns:
                        with tempfile.TemporaryDirectory() as folder:
                            rows.append(measure(model, name, column, bpw, Path(folder), tables))
                        print(json.dumps(rows[-1]), flush=True)
                    arguments.output.write_text(json.dumps({"stamp": stamp(), "results": rows}, indent=1))
    print(table(rows, arguments.columns))
    print(json.dumps(law_error(rows)))


def law_error(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far predicted KL is from measured KL: no factor of the law was taken from these runs."""
    ratios = [row["kl"] / row["predicted"] for row in rows if row["kl"] and row.get("predicted")]
    logs = [abs(math.log(ratio)) for ratio in ratios]
    return {
        "budgets": len(ratios),
        "measured / predicted": [round(ratio, 3) for ratio in sorted(ratios)],
        "mean factor off": math.exp(sum(logs) / max(1, len(logs))),
        "inside the printed range": sum(RANGE[0] <= ratio <= RANGE[1] for ratio in ratios),
    }


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """A line per model, recipe and budget, the columns side by side."""
    lines: dict[tuple[str, str, float], dict[str, Any]] = {}
    for row in rows:
        key = (row["model"], row["recipe"], row["bpw"])
        lines.setdefault(key, {"model": key[0], "recipe": key[1], "bpw": key[2]})[row["column"]] = row["kl"]
    return markdown_table(["model", "recipe", "bpw", *columns], list(lines.values()))


if __name__ == "__main__":
    main()
