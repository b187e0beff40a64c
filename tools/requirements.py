"""Print requirements read from pyproject.toml: `extra NAME`, the packages of one optional group; `lowest`, every
dependency pinned to its declared minimum."""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_MINIMUM = re.compile(r"([A-Za-z0-9_.-]+)\s*>=\s*([0-9][^,;\s]*)")
_TESTED = ("datasets", "report")  # the groups that the tests need besides the plain dependencies


def extra(project: dict[str, Any], name: str) -> list[str]:
    """The requirements of one optional group."""
    groups = project["optional-dependencies"]
    if name not in groups:
        raise SystemExit(f"pyproject.toml has no optional group {name!r}; it has {', '.join(groups)}")
    return list(groups[name])


def lowest(project: dict[str, Any]) -> list[str]:
    """`name==minimum` for every dependency, those of the groups under test included."""
    pins = []
    for requirement in [*project["dependencies"], *(one for name in _TESTED for one in extra(project, name))]:
        match = _MINIMUM.match(requirement)
        if match is None:
            raise SystemExit(f"pyproject.toml: {requirement!r} declares no minimum; write it as name>=version")
        pins.append(f"{match[1]}=={match[2]}")
    return sorted(pins)


def main(arguments: list[str]) -> None:
    """Print one requirement per line."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if arguments[:1] == ["extra"] and len(arguments) == 2:
        print("\n".join(extra(project, arguments[1])))
    elif arguments == ["lowest"]:
        print("\n".join(lowest(project)))
    else:
        raise SystemExit("usage: requirements.py extra NAME | requirements.py lowest")


if __name__ == "__main__":
    main(sys.argv[1:])
