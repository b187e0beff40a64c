"""Evaluations that a checkpoint keeps in its folder: `describe_evaluation` makes a record, `remember` adds it to
evaluation.json, `read_records` reads such a file and `newest` picks a record.

    {"format_version": 1, "evaluations": [{"date": ..., "text": {"source", "sha256"}, "reference", "perplexity", ...}]}

A record is what `bitquilt eval --json` prints. Two checkpoints share a table only if their protocols are equal:
the text (by its hash and column), the window, the stride, the number of tokens and BOS. Divergences also need the same
reference.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitquilt._version import __version__
from bitquilt.core.json_files import read_json
from bitquilt.data.calibration import describe_source
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import Checkpoint
from bitquilt.model.config import QUANT_METHOD
from bitquilt.report.evaluation import Evaluation
from bitquilt.report.evaluation.evaluator import protocol_text
from bitquilt.report.run_facts import Json, parse, string, whole
from bitquilt.stream.workdir import write_json

FILE = "evaluation.json"
_FORMAT_VERSION = 1

Protocol = str


@dataclass(frozen=True)
class Record:
    """One evaluation, parsed from the JSON in `stored`. `asked`: seq_len, stride and max_tokens as the caller gave
    them, which tells the same measurement again."""

    stored: Json
    text: Json
    reference: str
    reference_sha256: str
    dtype: str
    asked: Json
    tasks: Json
    limit: int | None
    seq_len: int | None
    stride: int | None
    bos: bool
    tokens: int | None
    bytes: int | None
    perplexity: float | None
    cross_entropy: float | None
    reference_perplexity: float | None
    kl_mean: float | None
    kl_median: float | None
    kl_p99: float | None
    kl_max: float | None
    top1_agreement: float | None

    @property
    def scored(self) -> bool:
        """Whether a text was scored. The perplexity alone may be missing: a broken model's is infinite."""
        return self.perplexity is not None or self.cross_entropy is not None

    @property
    def protocol(self) -> Protocol:
        """What two records must share for their figures to be compared."""
        text = [self.text.get("sha256") or self.text.get("source"), self.text.get("column")]
        return json.dumps([*text, self.seq_len, self.stride, self.tokens, self.bos])

    @property
    def protocol_text(self) -> str:
        """The protocol in words, to print next to figures."""
        source = Path(string(self.text.get("source"))).name or "unknown text"
        return f"{source}: {protocol_text(self.seq_len, self.stride, self.tokens, self.bos)}"


def describe_evaluation(
    model: str,
    figures: Evaluation | None,
    *,
    text: str | Path | None = None,
    reference: Checkpoint | None = None,
    dtype: str | None = None,
    asked: Mapping[str, int | str | None] | None = None,
    tasks: Mapping[str, Mapping[str, float]] | None = None,
    limit: int | None = None,
) -> Record:
    """Return a record of the figures and of everything they depend on. Raises UserError if there is no such text."""
    stored: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "bitquilt": __version__,
        "model": model,
        "reference": None if reference is None else reference.name,
        "reference_sha256": None if reference is None else reference.fingerprint(),
        "text": None if text is None else describe_source(text, string((asked or {}).get("column")) or None),
        "dtype": dtype,
        "asked": None if asked is None else dict(asked),
        **({} if figures is None else figures.to_json()),
    }
    if tasks:
        stored |= {"tasks": {name: dict(scores) for name, scores in tasks.items()}, "limit": limit}
    return parse(Record, stored)


def remember(checkpoint: Checkpoint, record: Record) -> Path | None:
    """Add a record to a bitquilt checkpoint's folder, in place of an older one of the same protocol.

    Returns None and writes nothing for any other model, and where a foreign file has that name. Raises OSError where
    the folder is read-only.
    """
    if checkpoint.model_config.quantized_by != QUANT_METHOD:
        return None
    path = checkpoint.folder / FILE
    try:
        before = read_records(path) if path.is_file() else []
    except UserError:
        return None
    kept = [old.stored for old in before if _identity(old) != _identity(record)]
    write_json(path, {"format_version": _FORMAT_VERSION, "evaluations": [*kept, record.stored]})
    return path


def read_records(path: Path) -> list[Record]:
    """Read evaluation.json, or what `eval --json` printed. Raises UserError for any other file."""
    try:
        value = read_json(path)
    except OSError as error:
        raise UserError(f"cannot read the evaluation {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"the evaluation {path} is not JSON: {error}; measure again with bitquilt eval") from None
    found = value.get("evaluations", [value]) if isinstance(value, dict) else None
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise UserError(f"{path} is not an evaluation; wanted the output of `bitquilt eval ... --json`, or {FILE}")
    if (version := whole(value.get("format_version"))) is not None and version > _FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this bitquilt reads {_FORMAT_VERSION}; upgrade bitquilt")
    records = [parse(Record, record) for record in found]
    if not all(record.scored or isinstance(record.stored.get("tasks"), dict) for record in records):
        raise UserError(f"{path} holds a record without a perplexity and without tasks, so it is not an evaluation")
    return records


def newest(records: Sequence[Record], wanted: Protocol | None = None) -> Record | None:
    """The last record of a scored text, of the wanted protocol if given. Records with a divergence come first."""
    scored = [record for record in records if record.scored and wanted in (None, record.protocol)]
    best = [record for record in scored if record.kl_mean is not None] or scored
    return best[-1] if best else None


def _identity(record: Record) -> tuple[object, ...]:
    return record.protocol, record.reference_sha256, record.dtype, record.limit, sorted(record.tasks)
