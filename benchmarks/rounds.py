"""What does a second round of planning bring? KL of `--rounds 1` and `--rounds 2` at the same true bits per weight.

    python -m benchmarks.rounds                                       # three models, four budgets
    python -m benchmarks.rounds --models demo --budgets 3
    python -m benchmarks.rounds --models                              # the table of what was measured before

gptq with scale search, groups of 128: the rows `global` of `benchmarks.allocation`, measured anew beside two rounds.
Every row is kept as soon as it is measured; the same command continues.
"""

import argparse
import json
from typing import Any

from benchmarks.allocation import DATA, TOKENS
from benchmarks.common import OUTPUT, markdown_table, stamp
from benchmarks.scored import TEXTS, quantize_and_score
from bitquilt import Budget

OPTIONS: dict[str, Any] = {"group_size": 128, "scale_search": True}
BUDGETS = (2.5, 3.0, 3.5, 4.0)
KEPT = OUTPUT / "rounds.json"


def measure(model: str, budget: float, rounds: int) -> dict[str, Any]:
    """Quantize to `budget` true bits per weight, tables and all, and evaluate."""
    found = quantize_and_score(
        model, "gptq", tokens=TOKENS, **DATA, **OPTIONS, budget=Budget("bpw", budget), rounds=rounds
    )
    row = {key: value for key, value in found.row().items() if key in ("bpw", "perplexity", "cpu_seconds")}
    return {"model": model, "budget": budget, "rounds": rounds, **row, "kl": found.score.kl_mean}


def table(rows: list[dict[str, Any]]) -> str:
    """A line per model and budget."""
    lines: dict[tuple[str, float], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["model"], row["budget"])):
        line = lines.setdefault((row["model"], row["budget"]), {"model": row["model"], "budget": row["budget"]})
        line |= {f"{row['rounds']}: {name}": row[name] for name in ("bpw", "kl", "cpu_seconds")}
    return markdown_table(["model", "budget", "1: bpw", "1: kl", "2: bpw", "2: kl", "1: cpu_seconds", "2: cpu_seconds"],
                          list(lines.values()))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(TEXTS), choices=list(TEXTS), help="none: the table only")
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    arguments = parser.parse_args()
    rows = json.loads(KEPT.read_text())["results"] if KEPT.is_file() else []
    done = {(row["model"], row["budget"], row["rounds"]) for row in rows}
    for model in arguments.models:
        for budget in arguments.budgets:
            for rounds in (1, 2):
                if (model, budget, rounds) in done:
                    continue
                rows.append(measure(model, budget, rounds))
                print(json.dumps(rows[-1]), flush=True)
                OUTPUT.mkdir(exist_ok=True)
                KEPT.write_text(json.dumps({"stamp": stamp(), "results": rows}, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
