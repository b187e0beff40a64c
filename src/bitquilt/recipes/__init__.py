"""The recipes by name, and `make_recipe`, which turns a name and options into one."""

import difflib
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from bitquilt.core.recipe import Recipe
from bitquilt.errors import UserError
from bitquilt.recipes.aptq import APTQ
from bitquilt.recipes.cmpq.cmpq import CMPQ
from bitquilt.recipes.cmpq.cmpq_plus import CMPQPlus
from bitquilt.recipes.gptq import GPTQ
from bitquilt.recipes.mg_ptq import MGPTQ
from bitquilt.recipes.micromix import MicroMix
from bitquilt.recipes.quilt import Quilt
from bitquilt.recipes.rtn import RTN
from bitquilt.recipes.slim_llm.slim_llm import SlimLLM
from bitquilt.recipes.slim_llm.slim_llm_plus import SlimLLMPlus

RECIPES: dict[str, type[Any]] = {
    recipe.name: recipe for recipe in (RTN, GPTQ, SlimLLM, SlimLLMPlus, CMPQ, CMPQPlus, Quilt, APTQ, MGPTQ, MicroMix)
}
# why `clipping` is no option of the others
_NOT_CLIPPED = {
    "cmpq": "has free levels, which no range holds together: nothing to clip",
    "cmpq+": "has free levels, which no range holds together: effort=normal trains these",
    "quilt": "trains scales and rounding: effort=normal",
    "micromix": "has powers of two for scales: no range between them to train",
}
MIN_TARGET_BITS, MAX_TARGET_BITS = 2, 8
GROUP_SIZE_STEP = 8


def make_recipe(name: str, /, **options: Any) -> Recipe:
    """A recipe from its name and its fields; `published=True` starts from the public implementation's settings.

    Raises UserError for an unknown name or field, a value of the wrong kind, bits outside 2 .. 8 (channel by channel:
    outside the palette) or a group size that is not a positive multiple of 8.
    """
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}{_nearest(name, RECIPES)}; known are {', '.join(RECIPES)}")
    kind = RECIPES[name]
    published = options.pop("published", False)
    if published and not hasattr(kind, "published"):
        raise UserError(f"recipe {name} has no published variant; leave out `published`")
    known = {field.name for field in fields(kind)}
    if options.get("bpw") is not None and "bits" in options and "bpw" in known:
        raise UserError("bits and bpw are two budgets for the same run; give one: bits counts codes only, bpw all")
    for option in options:
        if option == "clipping" and name in _NOT_CLIPPED:
            raise UserError(f"recipe {name} takes no clipping={options[option]!r}: it {_NOT_CLIPPED[name]}")
        if option not in known:
            raise UserError(
                f"recipe {name} has no option {option!r}{_nearest(option, known)}; it has {', '.join(sorted(known))}"
            )
    start = {f.name: getattr(kind.published(), f.name) for f in fields(kind)} if published else {}
    try:
        recipe: Recipe = TypeAdapter(kind).validate_python({**start, **options})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"recipe {name}, option {first['loc'][0]!r}: got {first['input']!r}; {first['msg']}") from None
    _check_ranges(recipe)
    return recipe


def takes_fractions(name: str) -> bool:
    """Whether the mean of the bits of the recipe of this name may be any number."""
    kind = RECIPES.get(name)
    return bool(getattr(kind, "fractional", False))


def takes_option(name: str, option: str) -> bool:
    """Whether the recipe of this name has a field of that name."""
    return name in RECIPES and any(field.name == option for field in fields(RECIPES[name]))


def without_bpw(recipe: Recipe) -> Recipe:
    """The recipe without a budget of its own in true bits per weight, for a plan that brings one."""
    if getattr(recipe, "bpw", None) is None:
        return recipe
    return replace(recipe, bpw=None)  # type: ignore[type-var]


def own_allocations(name: str) -> tuple[str, ...]:
    """The values of the recipe's own `allocation`; empty where it has none."""
    kind = RECIPES.get(name)
    return get_args(get_type_hints(kind)["allocation"]) if kind is not None and hasattr(kind, "allocation") else ()


def _check_ranges(recipe: Any) -> None:
    if hasattr(recipe, "damp") and not 0 < recipe.damp <= 1:
        raise UserError(f"damp is {recipe.damp}; wanted a share of the Hessian's mean diagonal above 0, at most 1")
    if hasattr(recipe, "check"):
        try:
            recipe.check()
        except ValueError as error:
            raise UserError(str(error)) from None
    if not takes_fractions(recipe.name) and not MIN_TARGET_BITS <= recipe.bits <= MAX_TARGET_BITS:
        raise UserError(f"bits is {recipe.bits}; wanted a whole number from {MIN_TARGET_BITS} to {MAX_TARGET_BITS}")
    if not takes_option(recipe.name, "group_size"):
        return
    if recipe.group_size < GROUP_SIZE_STEP or recipe.group_size % GROUP_SIZE_STEP:
        raise UserError(f"group size is {recipe.group_size}; wanted a positive multiple of 8, such as 32, 64 or 128")


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
