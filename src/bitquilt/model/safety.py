"""What a model's folder may not do: `check_inside` refuses files from elsewhere, `refuse_hub_kernels` fetched code.

`trusted_text` removes control characters from a string that other people wrote.
"""

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bitquilt.errors import UserError

# Settings in which transformers takes "org/name" for a kernel on the hub, which is code.
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def check_inside(folder: Path, files: Iterable[Path]) -> None:
    """Raise UserError for a file that is outside `folder` once links are followed.

    The snapshots of the hub's cache consist of links to a store of blobs two levels up; that store is allowed.
    """
    home = Path(os.path.realpath(folder))
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    for file in files:
        real = Path(os.path.realpath(file))
        if not any(real.is_relative_to(place) for place in allowed):
            raise UserError(
                f"{file} leads to {real}, which is outside the model's folder; only files inside the folder are read "
                "and copied; put a copy there, or give the folder that holds the files themselves"
            )


def refuse_hub_kernels(config: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for a config whose attention would be fetched from the hub and run."""
    for name, value in _settings(config):
        if name.lstrip("_").removesuffix("_internal") in _IMPLEMENTATIONS and any("/" in text for text in value):
            kernel = next(text for text in value if "/" in text)
            raise UserError(
                f"{path} sets {name} to {kernel!r}, a kernel that transformers would download and run; remove the "
                'setting, or use "sdpa" or "eager"'
            )


def trusted_text(text: str) -> str:
    """Return `text` without control characters, which a terminal would obey; line breaks and tabs stay.

    Characters that change the direction of writing count as control characters.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c for c in text if c in "\n\t" or not (unicodedata.category(c) == "Cc" or _turns(c)))


def _settings(value: Any) -> Iterator[tuple[str, list[str]]]:
    """Every setting at any depth with the strings that it holds."""
    pending = [value]
    while pending:  # not recursive: a file may be nested deeper than Python's stack
        inner = pending.pop()
        if isinstance(inner, Mapping):
            pending += inner.values()
            for key, one in inner.items():
                strings = [one] if isinstance(one, str) else list(one.values()) if isinstance(one, dict) else []
                if texts := [text for text in strings if isinstance(text, str)]:
                    yield str(key), texts
        elif isinstance(inner, list):
            pending += inner


def _turns(character: str) -> bool:
    return "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
