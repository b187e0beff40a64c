"""Check the size of src/bitquilt against the gates in pyproject.toml, [tool.bitquilt.size]. `measure` counts, `report`
compares and prints a line per room. `size_gates.py --write` sets every gate to today's measurement (`written`): the
commit that raises one says why."""

import ast
import re
import sys
import tomllib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MOST_FUNCTION_LINES = 60
MOST_FILES = 20


@dataclass(frozen=True)
class Size:
    """Measurements of one package. `lines` by room; the rest by gate name, each with the places it counts."""

    lines: dict[str, int]
    files: dict[str, int]
    counts: dict[str, list[str]]


def measure(package: Path) -> Size:
    """Count the Python files below `package`. A room is a folder directly below it; other files belong to `root`."""
    lines: Counter[str] = Counter()
    files: Counter[str] = Counter()
    folders: dict[str, list[str]] = defaultdict(list)
    names: dict[str, list[str]] = defaultdict(list)
    classes: dict[str, list[str]] = defaultdict(list)
    long_functions, skips = [], []
    for path in sorted(package.rglob("*.py")):
        text, place = path.read_text(), path.relative_to(package)
        room = place.parts[0] if len(place.parts) > 1 else "root"
        lines[room] += len(text.splitlines())
        files[room] += 1
        folders[f"{place.parent}/"].append(place.name)
        if path.name != "__init__.py":
            names[path.name].append(str(place))
        skips += [f"{place}:{i}" for i, line in enumerate(text.splitlines(), 1) if "# fmt: skip" in line]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(f"{place}:{node.lineno}")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MOST_FUNCTION_LINES:
                    long_functions.append(f"{place}:{node.lineno} {node.name} ({length} lines)")
    counts = {
        "long_functions": long_functions,
        "fmt_skip": skips,
        "large_folders": [f"{name} ({len(found)} files)" for name, found in folders.items() if len(found) > MOST_FILES],
        "repeated_file_names": _repeated(names),
        "repeated_class_names": _repeated(classes),
    }
    return Size(dict(lines), dict(files), counts)


def _repeated(places: dict[str, list[str]]) -> list[str]:
    return [f"{name}: {', '.join(found)}" for name, found in places.items() if len(found) > 1]


def report(size: Size, gates: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Lines to print, and the failures among them. Every room needs a gate, and every gate a room."""
    table, failures = [f"{'room':<22}{'files':>6}{'lines':>8}{'gate':>8}"], []
    for room in sorted(size.lines.keys() | gates["lines"].keys()):
        have, most = size.lines.get(room), gates["lines"].get(room)
        table.append(f"{room:<22}{size.files.get(room, 0):>6}{have or 0:>8}{most if most is not None else '-':>8}")
        if have is None or most is None:
            failures.append(f"{room}: {'no such room' if have is None else 'no gate'}; edit [tool.bitquilt.size.lines]")
        elif have > most:
            failures.append(f"{room}: {have} lines, the gate is {most}; delete some, or raise the gate and say why")
    total = sum(size.lines.values())
    table.append(f"{'all':<22}{sum(size.files.values()):>6}{total:>8}{gates['total_lines']:>8}")
    if total > gates["total_lines"]:
        failures.append(f"all rooms: {total} lines, the gate is {gates['total_lines']}")
    for name, places in size.counts.items():
        most = gates[name]
        table.append(f"{name:<22}{'':>6}{len(places):>8}{most:>8}{'   lower the gate' if len(places) < most else ''}")
        if len(places) > most:
            failures.append(f"{name}: {len(places)}, the gate is {most}:\n    " + "\n    ".join(places))
    return table, failures


def written(text: str, size: Size) -> str:
    """Return pyproject.toml's `text` with every gate set to `size`."""
    values = {"total_lines": sum(size.lines.values()), **{name: len(found) for name, found in size.counts.items()}}
    lines = ["[tool.bitquilt.size]", *(f"{name} = {value}" for name, value in values.items()), ""]
    lines += [
        "[tool.bitquilt.size.lines]",
        *(f"{room} = {count}" for room, count in sorted(size.lines.items())),
        "",
        "",
    ]
    before, start, rest = text.partition("[tool.bitquilt.size]\n")
    after = re.split(r"^(?=\[(?!tool\.bitquilt\.size))", rest, maxsplit=1, flags=re.MULTILINE)
    if not start or len(after) != 2:
        raise SystemExit("pyproject.toml needs a table [tool.bitquilt.size] followed by another table")
    return before + "\n".join(lines) + after[1]


def main() -> int:
    """Print the table, then what fails; exit status 1 if anything does."""
    project, size = ROOT / "pyproject.toml", measure(ROOT / "src" / "bitquilt")
    if sys.argv[1:] == ["--write"]:
        project.write_text(written(project.read_text(), size))
    gates = tomllib.loads(project.read_text())["tool"]["bitquilt"]["size"]
    table, failures = report(size, gates)
    print("\n".join(table))
    for failure in failures:
        print(f"size gate: {failure}", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
