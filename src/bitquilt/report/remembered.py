"""What was measured, and how is it remembered? `evaluation.json` in a checkpoint's folder: one record per protocol.

    {"format_version": 1, "evaluations": [{"date": ..., "text": {"source", "sha256"}, "reference", "perplexity", ...}]}

A record is what `bitquilt eval --json` prints. Figures of two checkpoints stand in one table only if their protocols
are equal: text (by its hash), window, stride, tokens; divergences also only if the reference is (by its hash).
"""

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitquilt._version import __version__
from bitquilt.data.calibration import describe_source
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import Checkpoint
from bitquilt.model.config import QUANT_METHOD
from bitquilt.report.evaluation import Evaluation
from bitquilt.stream.workdir import write_json

FILE = "evaluation.json"
_FORMAT_VERSION = 1

Record = dict[str, Any]
Protocol = str


def describe_evaluation(
    model: str,
    figures: Evaluation | None,
    *,
    text: str | Path | None = None,
    reference: Checkpoint | None = None,
    dtype: str | None = None,
    asked: Mapping[str, int | None] | None = None,
    tasks: Mapping[str, Mapping[str, float]] | None = None,
    limit: int | None = None,
) -> Record:
    """A record: the figures, and all that says what they were measured on. UserError: no such text.

    `asked`: seq_len, stride and max_tokens as they were given, so that the same measurement can be known again."""
    record: Record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "bitquilt": __version__,
        "model": model,
        "reference": None if reference is None else reference.name,
        "reference_sha256": None if reference is None else reference.fingerprint(),
        "text": None if text is None else describe_source(text),
        "dtype": dtype,
        "asked": None if asked is None else dict(asked),
        **({} if figures is None else figures.to_json()),
    }
    return record | ({"tasks": {name: dict(scores) for name, scores in tasks.items()}, "limit": limit} if tasks else {})


def remember(checkpoint: Checkpoint, record: Record) -> Path | None:
    """Add a record to a bitquilt checkpoint's folder, in the place of an older one of the same protocol.

    None, and nothing is written, for every other model: their folders are not ours, nor is a file of that name that
    we did not write. OSError where the folder cannot be written to.
    """
    if checkpoint.model_config.quantized_by != QUANT_METHOD:
        return None
    path = checkpoint.folder / FILE
    try:
        before = read_records(path) if path.is_file() else []
    except UserError:
        return None
    kept = [old for old in before if _identity(old) != _identity(record)]
    write_json(path, {"format_version": _FORMAT_VERSION, "evaluations": [*kept, record]})
    return path


def read_records(path: Path) -> list[Record]:
    """The records in a file: `evaluation.json`, or one that `eval --json` printed. Raises UserError for any other."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the evaluation {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"the evaluation {path} is not JSON: {error}; measure again with bitquilt eval") from None
    records = value.get("evaluations", [value]) if isinstance(value, dict) else None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path} is no evaluation; wanted what `bitquilt eval ... --json` prints, or {FILE}")
    if (
        isinstance(value, dict)
        and isinstance(version := value.get("format_version"), int)
        and version > _FORMAT_VERSION
    ):
        raise UserError(f"{path} has format version {version}, this bitquilt reads {_FORMAT_VERSION}; upgrade bitquilt")
    for record in records:
        if not _measured(record) and not isinstance(record.get("tasks"), dict):
            raise UserError(f"{path} holds a record without a perplexity and without tasks: it is no evaluation")
    return records


def protocol(record: Record) -> Protocol:
    """What two records must share for their figures to be compared."""
    text = record.get("text")
    content = (text.get("sha256") or text.get("source")) if isinstance(text, dict) else None
    return json.dumps([content, *(record.get(key) for key in ("seq_len", "stride", "tokens"))])


def newest(records: Sequence[Record], wanted: Protocol | None = None) -> Record | None:
    """The last record with a perplexity, of the wanted protocol; with a divergence if there is any such."""
    measured = [r for r in records if _measured(r)]
    if wanted is not None:
        measured = [r for r in measured if protocol(r) == wanted]
    with_kl = [r for r in measured if number(r.get("kl_mean")) is not None]
    best = with_kl or measured
    return best[-1] if best else None


def protocol_text(record: Record) -> str:
    """The protocol in words, to stand beside figures."""
    text = record.get("text")
    source = Path(str(text["source"])).name if isinstance(text, dict) and text.get("source") else "a text unknown"
    stride = "" if record.get("stride") is None else f", stride {record['stride']}"
    return f"{source}: {record.get('seq_len')}-token windows{stride}, {record.get('tokens')} tokens"


def number(value: Any) -> float | None:
    """A finite number, or None for anything else that a file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _measured(record: Record) -> bool:
    """Whether a text was scored; the perplexity of a broken model may be beyond the numbers."""
    return number(record.get("perplexity")) is not None or number(record.get("cross_entropy")) is not None


def _identity(record: Record) -> str:
    tasks = record.get("tasks")
    return protocol(record) + json.dumps(
        [
            record.get("reference_sha256"),
            record.get("dtype"),
            record.get("limit"),
            sorted(tasks) if isinstance(tasks, dict) else [],
        ]
    )
