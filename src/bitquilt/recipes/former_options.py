"""`without_former_options` reads a recipe's entry of an older plan.json, whose options may no longer exist.

former_options.json has, by recipe, each option that went with the value that is now fixed. A second value is the one
that `published=True` computes with.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitquilt.errors import UserError

FORMER: dict[str, dict[str, list[Any]]] = json.loads(Path(__file__).with_suffix(".json").read_text())


def without_former_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of recipe `name` without those that no longer exist.

    Where these have the values of the published variant, `published` is set. Raises UserError for a value that the
    recipe can no longer compute with.
    """
    former = FORMER[name]
    kept = {option: value for option, value in options.items() if option not in former}
    gone = {option: value for option, value in options.items() if option in former}
    choices = {option for option, values in former.items() if len(values) > 1}
    if "published" not in kept and choices and all(gone.get(o, former[o][0]) == former[o][1] for o in choices):
        kept["published"] = True
    published = bool(kept.get("published", False))
    for option, value in gone.items():
        fixed = former[option][-1 if published else 0]
        if value != fixed:
            more = f" ({former[option][1]!r} with published=true)" if option in choices and not published else ""
            raise UserError(
                f"recipe {name}, option {option!r}: got {value!r}; it is no longer an option and is fixed at "
                f"{fixed!r}{more}: leave it out"
            )
    return kept


def usual_values(name: str) -> dict[str, Any]:
    """The value of each option that no longer exists in a report of the recipe's defaults."""
    return {option: values[0] for option, values in FORMER.get(name, {}).items()}
