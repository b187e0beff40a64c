"""Measured losses as `Runs`: `read_runs` and `read_points` read CSV files and check them row by row.

CSV columns: `n_params`, `n_tokens` (plain counts), `ratio`, `loss` (nats per token), and optionally `domain`, `k1`,
`k2`. `ratio` is the share of the row's OWN corpus in the training mixture: the corpus whose loss the row gives,
named by `domain`. One run with 30 % code and 70 % general text therefore gives two rows: (domain code, ratio 0.3,
the loss on code) and (domain general, ratio 0.7, the loss on general text).
"""

import csv
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitquilt.errors import UserError
from bitquilt.laws.fit import Array

BILLION = 1e9
MIN_ROWS = 4
POINTS_PER_RUN = 10  # [ours] half of the paper's 20 evaluations a run
ONLY_DOMAIN = "all"  # the name of the one law of a file without a `domain` column

_RUN_COLUMNS = ("n_params", "n_tokens", "ratio", "loss")
_OPTIONAL = ("k1", "k2")


@dataclass(frozen=True)
class Runs:
    """Measured losses, one entry a point: `n`, `d` in 1e9, `ratio` in [0, 1], `loss` in nats per token, `domain` a
    name. `k1`, `k2` (cross-domain law only) are the early signals of the domain. Points to predict have no loss."""

    n: Array
    d: Array
    ratio: Array
    loss: Array
    domain: NDArray[np.str_]
    k1: Array | None = None
    k2: Array | None = None

    @staticmethod
    def of(
        n: Iterable[float],
        d: Iterable[float],
        ratio: Iterable[float],
        loss: Iterable[float],
        domain: Sequence[str] | str = ONLY_DOMAIN,
        k1: Iterable[float] | None = None,
        k2: Iterable[float] | None = None,
    ) -> "Runs":
        """Build runs from equally long columns, N and D in 1e9. Raises UserError naming the row (counted from 1)."""
        columns = {"n": _floats(n), "d": _floats(d), "ratio": _floats(ratio), "loss": _floats(loss)}
        columns |= {name: _floats(c) for name, c in (("k1", k1), ("k2", k2)) if c is not None}
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"the columns are not equally long: got {lengths}; give one value a point in each")
        names = np.array([domain] * lengths["n"] if isinstance(domain, str) else list(domain), dtype=np.str_)
        places = [f"row {i + 1}" for i in range(lengths["n"])]
        _check(columns, names, places)
        return Runs(domain=names, **columns)

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def domains(self) -> tuple[str, ...]:
        """The names in order of appearance."""
        return tuple(dict.fromkeys(self.domain.tolist()))

    @property
    def x(self) -> Array:
        """`[points, 3]`: N, D (1e9) and ratio."""
        return np.stack([self.n, self.d, self.ratio], axis=1)

    @property
    def run(self) -> NDArray[np.int64]:
        """`[points]`: the number of the training run; points with equal N, ratio and domain are one run."""
        keys = list(zip(self.n.tolist(), self.ratio.tolist(), self.domain.tolist(), strict=True))
        numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        return np.array([numbers[key] for key in keys], dtype=np.int64)

    @property
    def sha256(self) -> str:
        """Hash of the values, independent of the order of the rows and the notation of the numbers."""
        columns = [c for c in (self.n, self.d, self.ratio, self.loss, self.k1, self.k2) if c is not None]
        rows = zip(self.domain.tolist(), *(column.tolist() for column in columns), strict=True)
        return hashlib.sha256("\n".join(sorted(map(repr, rows))).encode()).hexdigest()

    def where(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> "Runs":
        """The points chosen by a mask or by indices."""
        columns: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: column[keep] for name, column in columns.items() if column is not None})

    def of_domain(self, name: str) -> "Runs":
        """The points of one domain. Raises UserError for an unknown name."""
        if name not in self.domains:
            raise UserError(f"no domain {name!r} in the data: got {', '.join(self.domains)}; choose one of them")
        return self.where(self.domain == name)

    def decaying_sample(self, per_run: int = POINTS_PER_RUN) -> "Runs":
        """At most `per_run` evaluations of each run, at growing distances in tokens: early ones determine most of the
        shape, late ones are alike. (D-CPT paper: exponentially decaying sampling; spacing: ours.)"""
        keep: list[int] = []
        for run in range(int(self.run.max()) + 1):
            mine = np.flatnonzero(self.run == run)
            mine = mine[np.argsort(self.d[mine], kind="stable")]
            if len(mine) > per_run:
                wanted = np.geomspace(self.d[mine[0]], self.d[mine[-1]], per_run)
                nearest = np.abs(np.log(self.d[mine])[None] - np.log(wanted)[:, None]).argmin(axis=1)
                mine = mine[np.unique(nearest)]
            keep.extend(mine.tolist())
        return self.where(np.sort(np.array(keep, dtype=np.int64)))


def read_runs(path: Path) -> Runs:
    """Read and check a CSV of runs. Raises UserError naming the line and the mistake."""
    columns, names, places = _read(path, _RUN_COLUMNS)
    _check(columns, names, places)
    if len(places) < MIN_ROWS:
        raise UserError(
            f"{path} has too few rows: got {len(places)}, wanted at least {MIN_ROWS}, better 3 sizes x 5 ratios x "
            "3 token counts; measure more runs"
        )
    return Runs(domain=names, **columns)


def read_points(path: Path) -> Runs:
    """Read points to predict: the columns of `read_runs` without `loss` (nan there; a `loss` column is ignored)."""
    columns, names, places = _read(path, _RUN_COLUMNS[:3])
    _check(columns, names, places)
    return Runs(domain=names, loss=np.full(len(places), np.nan), **columns)


def read_table(
    path: Path, required: Sequence[str], optional: Sequence[str] = ()
) -> tuple[dict[str, list[str]], list[str]]:
    """Read a CSV file into columns of text, and the place of every row for messages.

    Raises UserError for an unreadable or empty file, missing columns and rows of the wrong length.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [(reader_line, row) for reader_line, row in _numbered(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; wanted a CSV file in UTF-8") from None
    if not rows:
        raise UserError(f"{path} is empty: wanted a header with the columns {', '.join(required)} and one row a point")
    header = [cell.strip() for cell in rows[0][1]]
    missing = [name for name in required if name not in header]
    if missing:
        raise UserError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}: got {', '.join(header)}; "
            f"wanted {', '.join(required)}{''.join(f', optionally {name}' for name in optional)}, separated by commas"
        )
    if len(rows) == 1:
        raise UserError(f"{path} has a header and no rows: wanted one row a point")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise UserError(f"{path} line {line}: got {len(row)} cells, wanted {len(header)} as in the header")
    wanted = [name for name in (*required, *optional) if name in header]
    table = {name: [row[header.index(name)].strip() for _, row in rows[1:]] for name in wanted}
    return table, [f"{path} line {line} (row {i})" for i, (line, _) in enumerate(rows[1:], start=1)]


def as_floats(table: Mapping[str, Sequence[str]], places: Sequence[str]) -> dict[str, Array]:
    """Convert text columns to numbers. Raises UserError for other text and for nan or infinity."""
    columns: dict[str, Array] = {}
    for name, cells in table.items():
        values = []
        for cell, place in zip(cells, places, strict=True):
            try:
                value = float(cell)
            except ValueError:
                raise UserError(f"{place}: {name} is {cell!r}, wanted a number; correct or remove the row") from None
            if not math.isfinite(value):
                raise UserError(f"{place}: {name} is {cell}, wanted a finite number; remove runs that diverged")
            values.append(value)
        columns[name] = np.array(values)
    return columns


def _numbered(file: Iterable[str]) -> Iterable[tuple[int, list[str]]]:
    reader = csv.reader(file)
    for row in reader:
        yield reader.line_num, row


def _read(path: Path, required: Sequence[str]) -> tuple[dict[str, Array], NDArray[np.str_], list[str]]:
    table, places = read_table(path, required, ("domain", *_OPTIONAL))
    names = table.pop("domain", [ONLY_DOMAIN] * len(places))
    for name, place in zip(names, places, strict=True):
        if not name:
            raise UserError(f"{place}: the domain is empty, wanted the name of the corpus whose loss the row gives")
    columns = as_floats(table, places)
    columns["n"] = columns.pop("n_params") / BILLION
    columns["d"] = columns.pop("n_tokens") / BILLION
    return columns, np.array(names, dtype=np.str_), places


def _floats(values: Iterable[float]) -> Array:
    return np.array(list(values), dtype=np.float64)


def _check(columns: Mapping[str, Array], names: NDArray[np.str_], places: Sequence[str]) -> None:
    """Raise UserError for the first impossible value: what, where, what was wanted and the likely cause."""
    for name, column in columns.items():
        for value, place in zip(column.tolist(), places, strict=True):
            if not math.isfinite(value):
                raise UserError(f"{place}: {name} is {value}, wanted a finite number; remove runs that diverged")
            if name == "ratio" and not 0 <= value <= 1:
                hint = "a percentage? divide the column by 100" if 1 < value <= 100 else "correct or remove the row"
                raise UserError(f"{place}: ratio is {value:g}, wanted a share between 0 and 1; {hint}")
            if name in ("loss", "k1") and value <= 0:
                raise UserError(
                    f"{place}: {name} is {value:g}, wanted a loss above 0 in nats per token; remove the row"
                )
            if name in ("n", "d") and value <= 0:
                what = {"n": "n_params", "d": "n_tokens"}[name]
                hint = "leave out the evaluation before training" if name == "d" else "correct the row"
                raise UserError(f"{place}: {what} is {value:g}, wanted a count above 0; {hint}")
    if "loss" in columns:
        _check_duplicates(columns, names, places)


def _check_duplicates(columns: Mapping[str, Array], names: NDArray[np.str_], places: Sequence[str]) -> None:
    """Raise UserError for two rows of one point with different losses."""
    seen: dict[tuple[float | str, ...], int] = {}
    keys = zip(names.tolist(), *(columns[name].tolist() for name in ("n", "d", "ratio")), strict=True)
    for i, key in enumerate(keys):
        first = seen.setdefault(key, i)
        if columns["loss"][first] != columns["loss"][i]:
            raise UserError(
                f"{places[i]} repeats {places[first]} with another loss: got {columns['loss'][i]:g} and "
                f"{columns['loss'][first]:g} for the same n_params, n_tokens, ratio and domain, wanted one; "
                "average repeated seeds, or name the missing difference in the domain column"
            )
