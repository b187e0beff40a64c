"""`read_json` reads a JSON file that may be damaged, or built to do harm: one kind of error stands for all of it."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """Return a file's JSON value. Raises ValueError for text that is not UTF-8, not JSON, or nested too deeply.

    Raises OSError where the file cannot be read.
    """
    return parse_json(path.read_bytes())


def parse_json(content: bytes | str) -> Any:
    """Return the value of a JSON text; see `read_json`."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
