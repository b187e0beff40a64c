"""Law files: `save` and `load` a `LawFile`, one JSON file with a law for every domain.

    {"format": "bitquilt-law", "version": 1, "kind": "dcpt", "source": "runs.csv",
     "laws": {"code": {"parameters": {"E": ...}, "report": {"data_sha256": ..., ...}}}}

`kind` is dcpt, cross-domain or bpw. The file holds everything that a prediction needs, the refits of the bootstrap
included; it holds the hash of the runs, not the runs.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitquilt.errors import UserError
from bitquilt.laws.bpw import BpwLaw
from bitquilt.laws.cross_domain import CrossDomainLaw
from bitquilt.laws.dcpt import DCPTLaw
from bitquilt.laws.fit import Goodness
from bitquilt.laws.summary import FitReport

FORMAT, VERSION = "bitquilt-law", 1
Law = DCPTLaw | CrossDomainLaw | BpwLaw
_LAWS: dict[str, type[Law]] = {"dcpt": DCPTLaw, "cross-domain": CrossDomainLaw, "bpw": BpwLaw}
_REPORT = tuple(FitReport.__dataclass_fields__)


@dataclass(frozen=True)
class LawFile:
    """The laws of one file by domain, all of one kind. `source` is the name of the CSV file they were fitted on."""

    kind: str
    laws: Mapping[str, Law]
    source: str

    def dcpt(self, domain: str | None = None) -> DCPTLaw:
        """The D-CPT law of `domain`, or the only one. Raises UserError for another kind or name, or several laws."""
        if self.kind != "dcpt":
            raise UserError(f"this needs a D-CPT law: got a {self.kind} law; fit runs.csv with --kind dcpt")
        name = domain if domain is not None else next(iter(self.laws))
        if name not in self.laws or (domain is None and len(self.laws) > 1):
            got = "no domain" if domain is None else f"domain {name!r}"
            raise UserError(f"the law file holds {', '.join(self.laws)}: got {got}; name one of them")
        law = self.laws[name]
        assert isinstance(law, DCPTLaw)
        return law

    def domain_name(self, domain: str | None = None, general: str | None = None) -> str:
        """The domain to improve: `domain`, or the only law that is not the general one.

        Raises UserError when there are several.
        """
        if domain is not None:
            return domain
        rest = [name for name in self.laws if name != (general or "general")]
        if len(rest) != 1:
            raise UserError(
                f"the law file holds {', '.join(self.laws)}: say which one to improve with --domain, and which one "
                "is general with --general"
            )
        return rest[0]

    def general_name(self, domain: str | None) -> str | None:
        """The name of the general law: "general", or the only one other than `domain`; None when there are several."""
        others = [name for name in self.laws if name != domain]
        if "general" in others:
            return "general"
        return others[0] if len(others) == 1 else None


def save(path: Path, file: LawFile) -> None:
    """Write the JSON file, whole or not at all. Raises UserError when the folder cannot be written."""
    laws = {}
    for name, law in file.laws.items():
        report = None if law.report is None else _plain(law.report)
        laws[name] = {"parameters": law.parameters, "report": report}
    content = {"format": FORMAT, "version": VERSION, "kind": file.kind, "source": file.source, "laws": laws}
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; choose another --output") from None


def load(path: Path) -> LawFile:
    """Read and check a law file. Raises UserError for other files, other versions and damaged contents."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; wanted a law written by `bitquilt law fit`") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f'{path} is not a law: wanted "format": "{FORMAT}"; write one with `bitquilt law fit`')
    if content.get("version") != VERSION:
        raise UserError(f"{path} has version {content.get('version')}, wanted {VERSION}; fit the runs again")
    kind = content.get("kind")
    if kind not in _LAWS or not isinstance(content.get("laws"), dict) or not content["laws"]:
        raise UserError(f"{path} has kind {kind!r} and no readable laws, wanted one of {', '.join(_LAWS)}")
    laws = {name: _law(kind, entry, f"{path}, law {name!r}") for name, entry in content["laws"].items()}
    return LawFile(kind, laws, str(content.get("source", "")))


def _law(kind: str, entry: Any, place: str) -> Law:
    names = _LAWS[kind].names()
    parameters = entry.get("parameters") if isinstance(entry, dict) else None
    if not isinstance(parameters, dict) or set(parameters) != set(names):
        got = ", ".join(parameters) if isinstance(parameters, dict) else "none"
        raise UserError(f"{place}: wanted the parameters {', '.join(names)}; got {got}")
    bad = [name for name in names if not isinstance(parameters[name], int | float)]
    if bad:
        raise UserError(f"{place}: the parameter {bad[0]} is {parameters[bad[0]]!r}, wanted a number")
    values = {name: float(parameters[name]) for name in names}
    report = None if entry.get("report") is None else _report(entry["report"], len(names), place)
    return _LAWS[kind](**values, report=report)


def _plain(report: FitReport) -> dict[str, Any]:
    return {
        **{name: getattr(report, name) for name in _REPORT},
        "goodness": {key: None if value != value else value for key, value in asdict(report.goodness).items()},
        "ranges": {axis: list(pair) for axis, pair in report.ranges.items()},
        "dropped": dict(report.dropped),
        "warnings": list(report.warnings),
        "near_best": _rounded(report.near_best),
        "bootstrap": _rounded(report.bootstrap),
    }


def _rounded(thetas: np.ndarray[Any, np.dtype[np.float64]]) -> list[list[float]]:
    """Nine digits, which are enough for an interval and make the file a third smaller."""
    return [[float(f"{value:.9g}") for value in theta] for theta in thetas.tolist()]


def _report(entry: Any, width: int, place: str) -> FitReport:
    try:
        return FitReport(
            points=int(entry["points"]),
            goodness=_goodness(entry["goodness"]),
            ranges={str(axis): (float(low), float(high)) for axis, (low, high) in entry["ranges"].items()},
            dropped={str(axis): float(value) for axis, value in entry["dropped"].items()},
            warnings=tuple(map(str, entry["warnings"])),
            near_best=np.array(entry["near_best"], dtype=np.float64).reshape(-1, width),
            bootstrap=np.array(entry["bootstrap"], dtype=np.float64).reshape(-1, width),
            data_sha256=str(entry["data_sha256"]),
            starts=int(entry["starts"]),
            seed=int(entry["seed"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{place}: the report is damaged ({error!r}); fit the runs again") from None


def _goodness(entry: Any) -> Goodness:
    """JSON has no nan: an R2 that could not be computed is null there."""
    r2 = float("nan") if entry["r2"] is None else float(entry["r2"])
    huber, largest, rmse = float(entry["huber"]), float(entry["max_error"]), float(entry["rmse"])
    return Goodness(huber=huber, r2=r2, max_error=largest, rmse=rmse, points=int(entry["points"]))
