"""A law file says everything again; other files are refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from bitquilt.errors import UserError
from bitquilt.laws import BpwLaw, DCPTLaw, LawFile, load, save
from tests.laws.published import chemistry_general


def test_round_trip(tmp_path: Path) -> None:
    law = DCPTLaw.fit(chemistry_general(), starts=5, draws=6)
    path = tmp_path / "law.json"
    save(path, LawFile("dcpt", {"general": law}, "runs.csv"))
    again = load(path)
    assert again.dcpt() == law
    assert (again.kind, again.source) == ("dcpt", "runs.csv")
    report = again.dcpt("general").report
    assert report is not None
    assert law.report is not None
    assert report.data_sha256 == chemistry_general().sha256
    assert report.warnings == law.report.warnings
    before, after = (one.interval(1.8, 10.0, np.array([0.02, 0.07])) for one in (law, again.dcpt()))
    np.testing.assert_allclose(after.low, before.low, rtol=1e-6)
    np.testing.assert_allclose(after.high, before.high, rtol=1e-6)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"format": "other"}, "is not a law"),
        ({"version": 99}, "has version 99, wanted 1"),
        ({"kind": "chinchilla"}, "kind 'chinchilla'"),
        ({"laws": {}}, "no readable laws"),
        ({"laws": {"a": {"parameters": {"E": 1}}}}, "law 'a': wanted the parameters E, A, k; got E"),
        ({"laws": {"a": {"parameters": {"E": "x", "A": 1, "k": 1}}}}, "parameter E is 'x', wanted a number"),
        ({"laws": {"a": {"parameters": {"E": 1, "A": 1, "k": 1}, "report": {}}}}, "the report is damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, edit: dict[str, object], message: str) -> None:
    path = tmp_path / "law.json"
    save(path, LawFile("bpw", {"all": BpwLaw(2.0, 9.0, 2.0)}, ""))
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    with pytest.raises(UserError, match=message):
        load(path)


def test_no_json_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "law.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path / "law.json")
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot write"):
        save(tmp_path / "no" / "law.json", LawFile("bpw", {"all": BpwLaw(2.0, 9.0, 2.0)}, ""))


def test_choosing_a_law() -> None:
    law = DCPTLaw(1, 1, 1, 1, 1, 1, 1, 0.1, 1)
    file = LawFile("dcpt", {"code": law, "general": law}, "")
    assert file.domain_name() == "code"
    assert file.general_name("code") == "general"
    with pytest.raises(UserError, match="holds code, general: got no domain"):
        file.dcpt()
    with pytest.raises(UserError, match="got domain 'law'"):
        file.dcpt("law")
    three = LawFile("dcpt", {"a": law, "b": law, "c": law}, "")
    assert three.general_name("a") is None
    with pytest.raises(UserError, match="say which one to improve"):
        three.domain_name()
