"""What is asked for? wish(recipe, options, budget, scope) -> Wish: a recipe, and the budget of a plan for the whole
model where there is one. The recipe's own allocation stands where it decides layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bitquilt.allocation.budget import Budget
from bitquilt.allocation.scopes import SCOPES, Scope
from bitquilt.errors import UserError
from bitquilt.protocols import Plannable, Recipe
from bitquilt.recipes import make_recipe, own_allocations, takes_fractions


@dataclass(frozen=True)
class Wish:
    """What to make: a recipe, and the budget and scope of a plan for the whole model; `budget` None where the recipe
    gives every layer its own bits."""

    recipe: Recipe
    budget: Budget | None = None
    scope: Scope = "global"

    @property
    def values(self) -> dict[str, Any]:
        """The budget for a fingerprint; empty without."""
        if self.budget is None:
            return {}
        return {"budget": {"kind": self.budget.kind, "target": self.budget.value, "ctx": self.budget.ctx,
                           "scope": self.scope}}  # fmt: skip


def wish(
    recipe: str | Recipe, options: Mapping[str, Any], budget: Budget | None = None, scope: str | None = None
) -> Wish:
    """Sort out recipe, options and budget. A fraction of a bit, or `bpw`, is a budget for the whole model unless the
    recipe meets it in every layer (`cmpq`, or `slim-llm` with an allocation of its own); `allocation="global"` makes it
    one there too.

    Raises UserError for two budgets, an unknown scope, or whatever `make_recipe` refuses.
    """
    if scope is not None and scope not in SCOPES:
        raise UserError(f"unknown allocation {scope!r}; wanted one of {', '.join(SCOPES)}")
    options = dict(options)
    if isinstance(recipe, str):
        given = [key for key in ("bits", "bpw") if options.get(key) is not None]
        if budget is not None and given:
            raise UserError(f"{given[0]} and the budget {budget} are two budgets for the same run; give one")
        layerwise = options.get("bpw") is not None and options.get("allocation") in own_allocations(recipe)[:-1]
        if not takes_fractions(recipe) and not layerwise:
            budget = budget or _budget_in(options)
        recipe = make_recipe(recipe, **options)
    elif options:
        raise UserError(f"options {sorted(options)} go with a recipe's name; set them on the recipe itself")
    if budget is None and (getattr(recipe, "allocation", None) == "global" or scope is not None):
        bpw = getattr(recipe, "bpw", None)
        budget = Budget("bpw", bpw) if bpw is not None else Budget("bits", float(recipe.bits))  # type: ignore[attr-defined]
    if budget is not None and getattr(recipe, "bpw", None) is not None:
        recipe = replace(recipe, bpw=None)  # type: ignore[type-var]
    if budget is not None and not isinstance(recipe, Plannable):
        raise UserError(f"recipe {recipe.name} decides its own bits; give it a number of bits instead of a budget")
    return Wish(recipe, budget, scope or "global")


def _budget_in(options: dict[str, Any]) -> Budget | None:
    """Take a budget out of a recipe's options, for recipes with whole bits in every layer."""
    bits, bpw = options.get("bits"), options.get("bpw")
    if bits is not None and bpw is not None:
        raise UserError("bits and bpw are two budgets for the same run; give one: bits counts codes only, bpw all")
    try:
        if bpw is not None:
            del options["bpw"]
            return Budget("bpw", float(bpw))
        if isinstance(bits, float) and not bits.is_integer():
            del options["bits"]
            return Budget("bits", bits)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None
    if isinstance(bits, float):
        options["bits"] = int(bits)
    return None
