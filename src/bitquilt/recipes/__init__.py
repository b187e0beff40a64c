"""`RECIPES` holds the recipes by name, `usual_recipe` names the default, `make_recipe` makes one from its name and
options."""

import difflib
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from typing import Any, Protocol, runtime_checkable

from pydantic import TypeAdapter, ValidationError

from bitquilt.core.recipe import Recipe
from bitquilt.errors import UserError
from bitquilt.recipes.aptq import APTQ
from bitquilt.recipes.cmpq.cmpq import CMPQ
from bitquilt.recipes.cmpq.cmpq_plus import CMPQPlus
from bitquilt.recipes.former_options import usual_values, without_former_options
from bitquilt.recipes.gptq import GPTQ
from bitquilt.recipes.mg_ptq import MGPTQ
from bitquilt.recipes.micromix import MicroMix
from bitquilt.recipes.quilt import Quilt
from bitquilt.recipes.rtn import RTN
from bitquilt.recipes.shared.traits import NamedRecipe
from bitquilt.recipes.slim_llm.slim_llm import SlimLLM
from bitquilt.recipes.slim_llm.slim_llm_plus import SlimLLMPlus

_KINDS: tuple[type[NamedRecipe], ...] = (
    RTN,
    GPTQ,
    SlimLLM,
    SlimLLMPlus,
    CMPQ,
    CMPQPlus,
    Quilt,
    APTQ,
    MGPTQ,
    MicroMix,
)
RECIPES: dict[str, type[NamedRecipe]] = {kind.name: kind for kind in _KINDS}


@runtime_checkable
class TakesBpw(Protocol):
    """A recipe with an option `bpw`, its own budget in true bits per weight."""

    bpw: float | None


def usual_recipe(engine: str | None = None) -> str:
    """Return the name of the recipe that a run takes without one: the lowest loss at every size of SmolLM2-135M
    (docs/results.md), or of those whose uniform steps the files of an `engine` hold."""
    return CMPQPlus.name if engine is None else Quilt.name


def make_recipe(name: str, /, **options: Any) -> Recipe:
    """Make a recipe from its name and its options; `published=True` follows the publication.

    Options that no longer exist are accepted with the value that is now fixed, so old plans can be read. Raises
    UserError for an unknown name or option, and for a value that cannot work.
    """
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}{_nearest(name, RECIPES)}; known are {', '.join(RECIPES)}")
    kind = RECIPES[name]
    options = without_former_options(name, options)
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if options.get("bpw") is not None and "bits" in options and "bpw" in known:
        raise UserError("bits and bpw are two budgets for the same run; give one: bits counts codes only, bpw all")
    for option in (option for option in options if option not in known):
        if option == "published":
            raise UserError(f"recipe {name} has no published variant; leave out `published`")
        if option == "clipping" and kind.traits.why_not_clipped:
            raise UserError(f"recipe {name} takes no clipping={options[option]!r}: it {kind.traits.why_not_clipped}")
        raise UserError(
            f"recipe {name} has no option {option!r}{_nearest(option, known)}; it has {', '.join(sorted(known))}"
        )
    try:
        recipe = TypeAdapter(kind).validate_python(options)
        recipe.check()
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"recipe {name}, option {first['loc'][0]!r}: got {first['input']!r}; {first['msg']}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    return recipe


def usual_options(name: str) -> dict[str, Any]:
    """The default of every option of a recipe, including options that no longer exist; empty for an unknown name."""
    return {**usual_values(name), **asdict(RECIPES[name]())} if name in RECIPES else {}  # type: ignore[call-overload]


def takes_fractions(name: str) -> bool:
    """Return whether the mean of the bits of the recipe of this name may be any number."""
    return name in RECIPES and RECIPES[name].traits.fractional


def takes_option(name: str, option: str) -> bool:
    """Return whether the recipe of this name has an option of that name."""
    return name in RECIPES and any(field.name == option for field in fields(RECIPES[name]))  # type: ignore[arg-type]


def own_allocations(name: str) -> tuple[str, ...]:
    """The values of the recipe's option `allocation`; empty where it has none."""
    return RECIPES[name].traits.own_allocations if name in RECIPES else ()


def without_bpw(recipe: Recipe) -> Recipe:
    """The recipe without its own budget in true bits per weight, for a plan that brings one."""
    if isinstance(recipe, TakesBpw) and recipe.bpw is not None:
        return replace(recipe, bpw=None)  # type: ignore[type-var]
    return recipe


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
