"""How far is predicted KL from measured KL? The law's constant fitted on all models but one, tried on that one.

    python -m benchmarks.prediction          # after benchmarks.allocation, whose rows it reads; nothing is run

The law: KL = constant * sum over widths of factor(width) * the tables' sum over the groups of that width. Rows that
place one-bit groups without the tables (published, uniform) are left out. The factors per width were measured before
(`planning.interaction`), the constant is what is fitted: the geometric mean of measured over predicted, every model
counting alike.
"""

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.allocation import read_rows
from benchmarks.common import OUTPUT, markdown_table, stamp
from benchmarks.scored import TEXTS
from bitquilt.planning.interaction import RANGE, interaction_factors


def unscaled(row: dict[str, Any]) -> float:
    """The law without its constant, up to the factor that `interaction_factors` holds."""
    widths = [int(bits) for bits in row["by_width"]]
    factors = dict(zip(widths, interaction_factors(widths, _repaired(row)), strict=True))
    return sum(factors[int(bits)] * loss for bits, loss in row["by_width"].items())


def _repaired(row: dict[str, Any]) -> bool:
    return bool(row["recipe"] == "quilt")


def constant(rows: Sequence[dict[str, Any]]) -> float:
    """Measured over predicted, every model alike."""
    logs: dict[str, list[float]] = {}
    for row in rows:
        logs.setdefault(row["model"], []).append(math.log(row["kl"] / unscaled(row)))
    return math.exp(float(np.mean([np.mean(values) for values in logs.values()])))


def describe(name: str, ratios: Sequence[float], budgets: int, fitted: float | None) -> dict[str, Any]:
    """A line of the table."""
    return {
        "left out": name,
        "constant of the others": fitted,
        "runs": len(ratios),
        "budgets": budgets,
        "mean factor off": math.exp(float(np.mean(np.abs(np.log(ratios))))),
        "measured / predicted": f"{min(ratios):.2f} .. {max(ratios):.2f}",
        "inside the printed range": sum(RANGE[0] <= ratio <= RANGE[1] for ratio in ratios),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = [
        row
        for model in TEXTS
        for row in read_rows(model)
        if row["kl"] and ("1" not in row["by_width"] or row["column"] == "global")
    ]
    value: dict[str, Any] = {"stamp": stamp(), "range": RANGE}
    for what, repaired in (("recipes that do not repair", False), ("quilt", True)):
        rows = [row for row in found if _repaired(row) == repaired]
        lines, everything = [], []
        for model in dict.fromkeys(row["model"] for row in rows):
            others = [row for row in rows if row["model"] != model]
            if not others:
                continue
            fitted = constant(others)
            mine = [row for row in rows if row["model"] == model]
            ratios = [row["kl"] / unscaled(row) / fitted for row in mine]
            everything += ratios
            lines.append(describe(model, ratios, len({(row["recipe"], row["budget"]) for row in mine}), fitted))
        if not everything:
            continue
        budgets = len({(row["model"], row["recipe"], row["budget"]) for row in rows})
        lines.append(describe("each in turn", everything, budgets, None))
        value[what] = {"constant": constant(rows), "results": lines}
        print(f"{what}\n\n{markdown_table(list(lines[0]), lines)}")
        print("constant over all models, beside what is built in:", round(value[what]["constant"], 3), "\n")
    (OUTPUT / "prediction.json").write_text(json.dumps(value, indent=1))


if __name__ == "__main__":
    main()
