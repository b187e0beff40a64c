"""A run's report.json as typed values: `read_run` reads the file, and `parse` fills a dataclass from any JSON.

Reading is lenient: a missing or malformed value becomes None, zero or empty, so that pages and tables need no checks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from bitquilt.core.events import Untouched
from bitquilt.core.json_files import read_json
from bitquilt.core.types import Event
from bitquilt.errors import UserError

Json = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class RunStage:
    """A stage of the run: its time, and the process's highest memory up to its end."""

    name: str
    seconds: float
    peak_memory_bytes: float | None


@dataclass(frozen=True)
class RunBudget:
    """The budget of a run; `spent` is the run's own count in the same unit. `target` is None without a budget."""

    kind: str
    target: float | None
    spent: float | None

    @property
    def in_bytes(self) -> bool:
        """Whether target and spent are bytes, not bits per weight."""
        return self.kind not in ("bits", "bpw")


@dataclass(frozen=True)
class RunPrediction:
    """Predicted KL in nats per token, and the ends of the range of perplexities, both on the calibration text."""

    kl: float | None
    ppl_range: tuple[float, ...]
    perplexity_full_precision: float | None


@dataclass(frozen=True)
class RunSeconds:
    """Wall time of this process, and of the blocks over all processes that took part."""

    this_process: float | None
    blocks: float | None


@dataclass(frozen=True)
class RunFacts:
    """What report.json says. `stored` is the whole file, {} where there is none; `fingerprint` holds the settings."""

    stored: Json
    created: str
    model: Json
    fingerprint: Json
    machine: Json
    events: tuple[Event, ...]
    untouched: tuple[Untouched, ...]
    stages: tuple[RunStage, ...]
    budget: RunBudget
    prediction: RunPrediction
    seconds: RunSeconds
    peak_memory_bytes: float | None
    continued_after_block: int | None
    logit_difference: float | None
    folder_bytes: int | None

    @property
    def recipe(self) -> Json:
        """The recipe's name and settings."""
        return section(self.fingerprint, "recipe")

    @property
    def model_sha256(self) -> str:
        """The hash of the full-precision model; "" where unknown."""
        return string(section(self.fingerprint, "model").get("sha256"))

    @property
    def planned(self) -> bool:
        """Whether a plan for the whole model gave the bits."""
        return bool(self.fingerprint.get("plan") or self.fingerprint.get("budget"))


def read_run(folder: Path) -> RunFacts:
    """Read the report.json of a checkpoint's folder. Raises UserError for a file that is damaged or not ours."""
    path = folder / "report.json"
    if not path.is_file():
        return parse(RunFacts, {})
    fix = "copy it again, or move it away to go on without it"
    try:
        stored = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}; {fix}") from None
    if not isinstance(stored, dict) or "fingerprint" not in stored:
        raise UserError(f"{path} was not written by bitquilt; {fix}")
    return parse(RunFacts, stored)


def parse(kind: type[T], stored: Json) -> T:
    """Fill the fields of a dataclass from the JSON values of the same names; a field `stored` gets all of them."""
    hints = get_type_hints(kind)
    found = {**stored, "stored": stored}
    values = {f.name: _read(hints[f.name], found.get(f.name)) for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**values)


def section(value: Json, key: str) -> dict[str, Any]:
    """The object under `key`; {} where there is none, or something else."""
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def string(value: object) -> str:
    """A string, or "" for anything else."""
    return value if isinstance(value, str) else ""


def number(value: object) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of more than 308 digits
        return None


def whole(value: object) -> int | None:
    """A whole number, or None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _read(hint: Any, value: object) -> object:
    if is_dataclass(hint):
        return parse(hint, value if isinstance(value, dict) else {})  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        wanted = dict if is_dataclass(inner) else int | float
        return (
            tuple(_read(inner, item) for item in value if isinstance(item, wanted)) if isinstance(value, list) else ()
        )
    if hint is bool:
        return value is True
    if hint in (str, float, int):
        return string(value) if hint is str else hint(number(value) or 0)
    if hint in (float | None, int | None):
        return number(value) if hint == float | None else whole(value)
    return value if isinstance(value, dict) else {}
