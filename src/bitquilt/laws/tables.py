"""Predictions for a table of points: `predict_rows` returns rows ready for JSON, `write_rows` writes them as CSV."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitquilt.errors import UserError
from bitquilt.laws.bpw import BpwLaw
from bitquilt.laws.cross_domain import CrossDomainLaw
from bitquilt.laws.data import BILLION, ONLY_DOMAIN, Runs, as_floats, read_points, read_table
from bitquilt.laws.files import LawFile
from bitquilt.laws.summary import Prediction

Row = dict[str, Any]


def predict_rows(
    file: LawFile, points: Path, domain: str | None = None, level: float = 0.9
) -> tuple[list[Row], list[str]]:
    """Predict every row of the CSV `points`: its own columns, then loss, low, high, spread (nats per token).

    Rows name their law in a `domain` column; `domain` names it for a table without one. Also returns the warnings.
    Raises UserError for bad tables and for a law that the file does not hold.
    """
    if file.kind == "bpw":
        return _predict_bpw(file, points, level)
    asked = read_points(points)
    inputs: dict[str, list[Any]] = {"n_params": _counts(asked.n), "n_tokens": _counts(asked.d)}
    inputs["ratio"] = asked.ratio.tolist()
    if asked.domains != (ONLY_DOMAIN,):
        inputs["domain"] = asked.domain.tolist()
    if file.kind == "cross-domain":
        return _predict_cross(file, points, asked, inputs, level)
    rows: list[Row] = [{} for _ in range(len(asked))]
    notes: list[str] = []
    for name in asked.domains:
        mine = np.flatnonzero(asked.domain == name)
        part = asked.where(mine)
        law = file.dcpt(domain if name == ONLY_DOMAIN else name)
        prediction = law.interval(part.n, part.d, part.ratio, level)
        places = mine.tolist()
        own = {key: [column[i] for i in places] for key, column in inputs.items()}
        for i, row in zip(places, _rows(own, prediction), strict=True):
            rows[i] = row
        notes += [note if name == ONLY_DOMAIN else f"{name}: {note}" for note in prediction.warnings]
    return rows, notes


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV. Raises UserError when the file cannot be written."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; choose another --output") from None


def _predict_bpw(file: LawFile, points: Path, level: float) -> tuple[list[Row], list[str]]:
    law = next(iter(file.laws.values()))
    assert isinstance(law, BpwLaw)
    bpw = as_floats(*read_table(points, ("bpw",)))["bpw"]
    prediction = law.interval(bpw, level)
    return _rows({"bpw": bpw.tolist()}, prediction), list(prediction.warnings)


def _predict_cross(
    file: LawFile, points: Path, asked: Runs, inputs: dict[str, list[Any]], level: float
) -> tuple[list[Row], list[str]]:
    law = next(iter(file.laws.values()))
    assert isinstance(law, CrossDomainLaw)
    if asked.k1 is None or asked.k2 is None:
        raise UserError(f"{points} lacks k1 and k2, which a cross-domain law needs; measure them on a short run")
    inputs |= {"k1": asked.k1.tolist(), "k2": asked.k2.tolist()}
    prediction = law.interval(asked.n, asked.d, asked.ratio, asked.k1, asked.k2, level)
    return _rows(inputs, prediction), list(prediction.warnings)


def _rows(inputs: Mapping[str, list[Any]], prediction: Prediction) -> list[Row]:
    columns = {
        **inputs,
        "loss": prediction.loss.tolist(),
        "low": prediction.low.tolist(),
        "high": prediction.high.tolist(),
        "spread": prediction.spread.tolist(),
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _counts(billions: Any) -> list[float | int]:
    """Plain counts from 1e9; integers where they were integers."""
    return [round(v) if abs(v - round(v)) < 1e-6 * v else v for v in (billions * BILLION).tolist()]
