"""Is a global allocation better than the published one? KL at equal true bits per weight, and the predictions beside.

    python -m benchmarks.allocation                                   # three models, four recipes, five budgets
    python -m benchmarks.allocation --models stories260k --recipes gptq
    python -m benchmarks.allocation --models stories260k --recipes slim-llm+ mg-ptq micromix
    python -m benchmarks.allocation --models                          # tables of what was measured before

Columns: `published` = the recipe's own rule, layer by layer, at the most bits it can use within the budget; `global` =
column groups (channels) of the whole model at exactly the bits per weight that `published` took; `uniform` = every
layer the same, wider groups evenly spread. GPTQ's published rule is `uniform`. Group sizes of slim-llm are those with
which its rule comes close to the budget: a layer of 256 inputs has two groups of 128, its mean moves in steps of half a
bit. The budgets of slim-llm+ and mg-ptq are nominal bits, the only ones that their own rule takes. Calibration and
sensitivities are the same for all columns. Every row is kept as soon as it is measured; the same command continues.
`benchmarks.prediction` compares predicted and measured KL over all rows.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import bitquilt
from benchmarks.common import OUTPUT, SHARED, markdown_table, stamp
from benchmarks.scored import SEQ_LEN, TEXTS, quantize_and_score
from bitquilt import Budget
from bitquilt.core.types import LayerPlan
from bitquilt.errors import UserError
from bitquilt.model.transformers_logging import quiet_transformers
from bitquilt.planning.sensitivities import Sensitivities, read_sensitivities
from bitquilt.recipes import make_recipe

BPW = (2.5, 3.0, 2.25, 3.5, 4.0)
MORE = (2.75, 3.25, 3.75, 4.25, 4.5)  # for the law: ten budgets of one recipe
SLIM_GROUPS = {2.25: 128, 2.5: 64, 3.0: 32, 3.5: 32, 4.0: 32}
# options and budgets of recipes with two sizes; slim-llm+ trains 5 epochs where the publication has 50
SHORT: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "slim-llm+": ({"group_size": 32, "epochs": 5}, (2, 3)),
    "mg-ptq": ({"group_size": 32}, (2.3, 3)),
    "micromix": ({"alignment": 32}, (5.75, 7.75)),
}
NOMINAL = ("slim-llm+", "mg-ptq")
NO_OUTLIERS = {"error_outliers": 0.0, "act_outliers": 0.0}  # they cost more than they bring on these models
DATA: dict[str, Any] = {"samples": 32, "seed": 0}
TOKENS = 15_000


@dataclass(frozen=True)
class Run:
    """One row: a recipe's name, its options, who gives out the bits, and the budget in true bits per weight."""

    model: str
    recipe: str
    options: dict[str, Any]
    column: str
    budget: float

    @property
    def key(self) -> str:
        """What tells a row from all others."""
        return json.dumps([self.recipe, self.options, self.column, self.budget])

    @property
    def tables(self) -> Path:
        """The file of sensitivities that the run uses."""
        return OUTPUT / f"{self.model}-{self.recipe}-{self.options.get('group_size', 1)}.sensitivities"


def runs(model: str, recipe: str) -> Iterator[Run]:
    """Every row of a model and recipe; `published` comes before what is compared with it."""
    if recipe == "gptq":
        options: dict[str, Any] = {"group_size": 128, "scale_search": True}
        for budget in BPW:
            yield from (Run(model, recipe, options, column, budget) for column in ("global", "uniform"))
        yield from (Run(model, recipe, options, "global", budget) for budget in MORE)
        return
    if recipe == "quilt":
        for budget in BPW:
            yield from (Run(model, recipe, {"group_size": 64}, column, budget) for column in ("global", "uniform"))
        return
    if recipe in SHORT:
        options, budgets = SHORT[recipe]
        for budget in budgets:
            yield from (Run(model, recipe, options, column, budget) for column in ("published", "global", "uniform"))
        return
    for budget in BPW:
        options = {"group_size": SLIM_GROUPS[budget]} if recipe == "slim-llm" else NO_OUTLIERS
        yield from (Run(model, recipe, options, column, budget) for column in ("published", "global", "uniform"))


def measure(run: Run, target: float) -> dict[str, Any]:
    """Quantize and evaluate; `kl` None where the budget is out of reach. `by_width`: what the tables of the plan's
    groups add up to, by width."""
    row: dict[str, Any] = {"model": run.model, "recipe": run.recipe, "options": run.options, "column": run.column,
                           "budget": run.budget}  # fmt: skip
    recipe: Any = make_recipe(run.recipe, **run.options)
    options: dict[str, Any] = {"budget": Budget("bpw", target), "scope": run.column, "sensitivities": run.tables}
    if run.column == "published":
        unit = "bits" if run.recipe in NOMINAL else "bpw"
        recipe, options = make_recipe(run.recipe, **run.options, **{unit: target}), {}
    try:
        found = quantize_and_score(run.model, recipe, tokens=TOKENS, **DATA, **options)
    except UserError as error:
        return {**row, "kl": None, "why": str(error)[:160]}
    known, values = read_sensitivities(run.tables), found.row()
    return {
        **row,
        **{key: values[key] for key in ("bpw", "nominal_bits", "perplexity", "seconds")},
        "kl": values["kl_mean"],
        "by_width": by_width(known, found.plans),
        "calibration_perplexity": known.perplexity,
    }


def by_width(known: Sensitivities, plans: Mapping[str, LayerPlan]) -> dict[str, float]:
    """Sum of the tables over the groups of each width, nats per token."""
    sums: dict[str, float] = {}
    for name, plan in plans.items():
        column = np.searchsorted(known.widths[name], plan.bits)
        losses = known.losses[name][np.arange(len(column)), column]
        for bits in sorted(set(plan.bits)):
            chosen = np.asarray(plan.bits) == bits
            sums[str(bits)] = sums.get(str(bits), 0.0) + float(losses[chosen].sum(dtype=np.float64))
    return dict(sorted(sums.items()))


def read_rows(model: str) -> list[dict[str, Any]]:
    """What was measured before."""
    path = _path(model)
    return list(json.loads(path.read_text())["results"]) if path.is_file() else []


def _path(model: str) -> Path:
    return OUTPUT / f"allocation-{model}.json"


def run_model(model: str, recipes: list[str], most: int | None = None) -> None:
    """Every row that is missing, at most so many, each kept as soon as it is done."""
    rows = read_rows(model)
    before = len(rows)
    done = {Run(model, r["recipe"], r["options"], r["column"], r["budget"]).key: r for r in rows}
    for recipe in recipes:
        for run in runs(model, recipe):
            if run.key in done:
                continue
            if most is not None and len(rows) - before >= most:
                return
            if not run.tables.is_file():
                calibration = SHARED / "text" / TEXTS[model][0]
                source = SHARED / "models" / model
                bitquilt.measure_model(
                    source, run.tables, recipe, calibration, seq_len=SEQ_LEN, bos=False, **DATA, **run.options
                )
            published = done.get(Run(model, recipe, run.options, "published", run.budget).key) or {}
            # equal bits: to a rounding error, which a budget never forgives
            target = run.budget if published.get("bpw") is None else published["bpw"] * (1 + 1e-12)
            row = done[run.key] = measure(run, target)
            print(json.dumps(row), flush=True)
            rows.append(row)
            _path(model).write_text(json.dumps({"stamp": stamp(), "results": rows}, indent=1))


def table(rows: list[dict[str, Any]]) -> str:
    """A line per model, recipe and budget, the columns side by side; bits per weight of the global plan."""
    lines: dict[tuple[str, str, float], dict[str, Any]] = {}
    for row in rows:
        if row["budget"] in MORE:
            continue
        key = (row["model"], row["recipe"], row["budget"])
        line = lines.setdefault(key, {"model": key[0], "recipe": key[1], "budget": key[2]})
        line[row["column"]] = row["kl"]
        line[f"bpw, {row['column']}"] = row.get("bpw")
        line["group size"] = row["options"].get("group_size")
    columns = ["model", "recipe", "budget", "group size"]
    for column in ("published", "global", "uniform"):
        columns += [f"bpw, {column}", column]
    return markdown_table(columns, list(lines.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(TEXTS), choices=list(TEXTS), help="none: tables only")
    recipes = ["slim-llm", "gptq", "cmpq", "quilt"]
    parser.add_argument("--recipes", nargs="+", default=recipes, choices=[*recipes, *SHORT])
    parser.add_argument("--rows", type=int, help="of each model; the same command continues after them")
    arguments = parser.parse_args()
    OUTPUT.mkdir(exist_ok=True)
    with quiet_transformers():
        for model in arguments.models:
            run_model(model, arguments.recipes, arguments.rows)
    print(table([row for model in TEXTS for row in read_rows(model)]))


if __name__ == "__main__":
    main()
