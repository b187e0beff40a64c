"""One row of a table: a recipe on a model, its true size, KL and perplexity. Kept, so that no row is computed twice.

`python -m benchmarks.curve` and `benchmarks.recipes` share these rows: a file each in benchmarks/output/rows, named
after what was asked for. Delete files, or pass --again, where the code of a recipe has changed.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import OUTPUT, stamp
from benchmarks.scored import quantize_and_score
from bitquilt import Budget
from bitquilt.errors import UserError
from bitquilt.recipes import make_recipe

ROWS = OUTPUT / "rows"


@dataclass(frozen=True)
class Run:
    """`recipe` with `options` on `model`, calibrated on `samples` x 256 tokens, measured on `tokens` others.

    `budget`: bits per weight that all layers share; None: the recipe gives each layer its own.
    """

    model: str
    recipe: str
    options: dict[str, Any] = field(default_factory=dict)
    samples: int = 32
    tokens: int = 8_000
    budget: float | None = None

    @property
    def path(self) -> Path:
        """Where the row is kept."""
        asked = json.dumps({k: v for k, v in asdict(self).items() if v is not None}, sort_keys=True)
        return ROWS / f"{self.model}-{self.recipe}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.json"


def measured(run: Run, again: bool = False, kept_only: bool = False) -> dict[str, Any] | None:
    """The kept row, or a new one; None, and a line that says why, where the recipe cannot meet the setting."""
    if run.path.is_file() and not again:
        row: dict[str, Any] = json.loads(run.path.read_text())
        return row
    if kept_only:
        return None
    try:
        row = {"asked": asdict(run), **measure(run), "stamp": stamp()}
    except UserError as error:
        print(f"{run.model}, {run.recipe}, {run.options}: {error}", flush=True)
        return None
    ROWS.mkdir(parents=True, exist_ok=True)
    fresh = run.path.with_suffix(".new")
    fresh.write_text(json.dumps(row, indent=1))
    fresh.replace(run.path)
    return row


def measure(run: Run) -> dict[str, Any]:
    """Quantize, evaluate. Raises UserError where the recipe cannot meet the setting."""
    budget = {} if run.budget is None else {"budget": Budget("bpw", run.budget)}
    recipe = make_recipe(run.recipe, **run.options)
    found = quantize_and_score(run.model, recipe, tokens=run.tokens, samples=run.samples, **budget)
    layers = {n: v for n, v in found.report["layers"].items() if "table_error" in v}
    chosen = setting(run.options) if run.budget is None else f"{setting(run.options)} budget={run.budget}"
    return {"model": run.model, "setting": chosen, **found.row(), **({"layers": layers} if layers else {})}


def setting(options: dict[str, Any]) -> str:
    """The budget among the options, in words."""
    return " ".join(f"{key}={value}" for key, value in options.items() if key in ("bits", "group_size", "bpw"))
