"""The scripts that CI runs: size gates of the package, requirements read from pyproject.toml."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from tools.requirements import extra, lowest
from tools.size_gates import MOST_FILES, MOST_FUNCTION_LINES, measure, report, written

COUNTS = ("long_functions", "fmt_skip", "large_folders", "repeated_file_names", "repeated_class_names")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "room" / "corner").mkdir(parents=True)
    (tmp_path / "api.py").write_text("class Thing:\n    pass\n")
    (tmp_path / "room" / "__init__.py").write_text("")
    (tmp_path / "room" / "corner" / "one.py").write_text("x = 1\ny = 2\n")
    return tmp_path


def gates(**changed: Any) -> dict[str, Any]:
    return {"lines": {"root": 2, "room": 2}, "total_lines": 4, **dict.fromkeys(COUNTS, 0), **changed}


def test_lines_are_counted_by_room_and_fit_their_gates(package):
    size = measure(package)
    assert size.lines == {"root": 2, "room": 2}
    assert size.files == {"root": 1, "room": 2}
    table, failures = report(size, gates())
    assert failures == []
    assert [line.split()[0] for line in table] == ["room", "room", "root", "all", *COUNTS]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"total_lines": 3}, "all rooms: 4 lines, the gate is 3"),
        ({"lines": {"root": 2, "room": 1}}, "room: 2 lines, the gate is 1"),
        ({"lines": {"root": 2}}, "room: no gate"),
        ({"lines": {"root": 2, "room": 2, "attic": 9}}, "attic: no such room"),
    ],
)
def test_a_room_above_its_gate_or_without_one_fails(package, changed, named):
    _, failures = report(measure(package), gates(**changed))
    assert len(failures) == 1
    assert failures[0].startswith(named)


def _long(package: Path) -> None:
    line = "    x = 1\n"
    exactly, over = line * (MOST_FUNCTION_LINES - 1), line * MOST_FUNCTION_LINES
    (package / "long.py").write_text(f"def exactly():\n{exactly}\n\ndef over():\n{over}")


def _skipped(package: Path) -> None:
    (package / "skipped.py").write_text("x = [1,2]  # fmt: skip\n")


def _same_file(package: Path) -> None:
    (package / "one.py").write_text("")


def _same_class(package: Path) -> None:
    (package / "other.py").write_text("if True:\n    class Thing:\n        pass\n")


def _full_folder(package: Path) -> None:
    for i in range(MOST_FILES):
        (package / "room" / f"file{i}.py").write_text("")


@pytest.mark.parametrize(
    ("spoil", "gate"), list(zip([_long, _skipped, _full_folder, _same_file, _same_class], COUNTS, strict=True))
)
def test_each_count_fails_on_its_own(package, spoil, gate):
    spoil(package)
    roomy = {"total_lines": 10**6, "lines": {"root": 10**6, "room": 10**6}}
    _, failures = report(measure(package), gates(**roomy))
    assert [failure.split(":")[0] for failure in failures] == [gate]
    table, failures = report(measure(package), gates(**roomy, **{gate: 2}))
    assert failures == []
    assert "lower the gate" in next(line for line in table if line.startswith(gate))


def test_a_function_of_exactly_the_limit_passes(package):
    _long(package)
    assert [place.split()[1] for place in measure(package).counts["long_functions"]] == ["over"]


def test_lowest_pins_every_minimum_and_refuses_a_dependency_without_one():
    groups = {"datasets": ["datasets>=3.0"], "report": ["jinja2>=3.1"], "docs": ["mkdocs[x]>=1"]}
    project = {"dependencies": ["torch>=2.6", "transformers>=5.16,<6"], "optional-dependencies": groups}
    assert lowest(project) == ["datasets==3.0", "jinja2==3.1", "torch==2.6", "transformers==5.16"]
    assert extra(project, "docs") == ["mkdocs[x]>=1"]
    with pytest.raises(SystemExit, match=r"numpy.*no minimum"):
        lowest({**project, "dependencies": ["numpy"]})
    with pytest.raises(SystemExit, match="no optional group 'gpu'"):
        extra(project, "gpu")


def test_written_gates_are_the_measurements_and_leave_the_rest_alone(package):
    old = (
        "[a]\nx = 1\n\n[tool.bitquilt.size]\ntotal_lines = 9\n\n[tool.bitquilt.size.lines]\nattic = 9\n\n[b]\ny = [2]\n"
    )
    new = tomllib.loads(written(old, measure(package)))
    assert (new["a"], new["b"]) == ({"x": 1}, {"y": [2]})
    assert new["tool"]["bitquilt"]["size"] == gates()
