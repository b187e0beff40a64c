"""One row of a table: a recipe on a model, its true size, KL and perplexity. Kept, so that no row is computed twice.

`python -m benchmarks.curve` and `benchmarks.recipes` share these rows: a file each in benchmarks/output/rows, named
after what was asked for. Delete files, or pass --again, where the code of a recipe has changed.
"""

import hashlib
import json
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import bitquilt
from benchmarks.common import OUTPUT, SHARED, stamp
from benchmarks.quality import TEXTS
from bitquilt.errors import UserError
from bitquilt.models.structure import quiet_transformers
from bitquilt.recipes import make_recipe

ROWS = OUTPUT / "rows"


@dataclass(frozen=True)
class Run:
    """`recipe` with `options` on `model`, calibrated on `samples` x 256 tokens, measured on `tokens` others."""

    model: str
    recipe: str
    options: dict[str, Any] = field(default_factory=dict)
    samples: int = 32
    tokens: int = 8_000

    @property
    def path(self) -> Path:
        """Where the row is kept."""
        asked = json.dumps(asdict(self), sort_keys=True)
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
    calibration, evaluation = (SHARED / "text" / text for text in TEXTS[run.model])
    source = SHARED / "models" / run.model
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        started, cpu = time.perf_counter(), time.process_time()
        out = Path(folder) / "out"
        made = make_recipe(run.recipe, **run.options)
        report = bitquilt.quantize(source, made, calibration, out, samples=run.samples, seq_len=256).report
        seconds, busy = time.perf_counter() - started, time.process_time() - cpu
        score = bitquilt.evaluate(out, evaluation, reference=source, seq_len=256, max_tokens=run.tokens)
    layers = {n: v for n, v in report["layers"].items() if "table_error" in v}
    return {
        "model": run.model,
        "setting": setting(run.options),
        "bpw": report["bpw"],
        "nominal_bits": report["nominal_bits"],
        "kl_mean": score.kl_mean,
        "perplexity": score.perplexity,
        "top1_agreement": score.top1_agreement,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy, 1),
        **({"layers": layers} if layers else {}),
    }


def setting(options: dict[str, Any]) -> str:
    """The budget among the options, in words."""
    return " ".join(f"{key}={value}" for key, value in options.items() if key in ("bits", "group_size", "bpw"))
