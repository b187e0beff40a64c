"""A request to quantize: `wish` reads recipe, options and budget once; `Request` and `Result` are its two ends."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch

from bitquilt.core.budget import SCOPES, Budget, Scope
from bitquilt.core.packing import storage_bits
from bitquilt.core.plan_file import OuterBits, PlanFile
from bitquilt.core.recipe import Plannable, Recipe
from bitquilt.core.types import LayerPlan
from bitquilt.errors import UserError, not_plannable
from bitquilt.recipes import make_recipe, own_allocations, takes_fractions, takes_option, without_bpw

_NOT_BOTH = "options {} go with a recipe's name; set them on the recipe itself"


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


@dataclass(frozen=True)
class Result:
    """A finished run: where the checkpoint lies and what report.json says. `already_done`: nothing was computed."""

    folder: Path
    report: dict[str, Any]
    already_done: bool = False


@dataclass(frozen=True, eq=False)
class Request:
    """What `api.quantize` is asked for; `wanted` and `file` (of `plan`) say where the bits come from."""

    model: str | Path
    wanted: Wish
    calibration: str | Path
    out: Path | None
    samples: int
    self_samples: int
    seq_len: int
    seed: int
    batch_size: int | None
    work_dir: Path | None
    skip: tuple[str, ...]
    include_head: bool
    outer: OuterBits
    plan: str | Path | None
    file: PlanFile | None
    sensitivities: str | Path | None
    rounds: int
    device: torch.device

    @property
    def by_worth(self) -> bool:
        """Whether tables of loss decide where the bits go."""
        return self.wanted.budget is not None and self.wanted.scope != "uniform"

    @property
    def measures(self) -> bool:
        """Whether the run makes the first round's tables itself."""
        return self.by_worth and self.sensitivities is None

    @property
    def calibrates(self) -> bool:
        """Whether the run reads calibration text at all."""
        return self.wanted.recipe.needs.calibration or self.measures or self.rounds == 2


def wish(
    recipe: str | Recipe, options: Mapping[str, Any], budget: Budget | None = None, scope: str | None = None
) -> Wish:
    """Sort out recipe, options and budget. A fraction of a bit, or `bpw`, is a budget for the whole model unless the
    recipe meets it in every layer (`cmpq`, or `slim-llm` with an allocation of its own); `allocation="global"`, or any
    other scope that is no allocation of the recipe's own, makes it one there too.

    Raises UserError for two budgets, an unknown scope, or whatever `make_recipe` refuses.
    """
    if scope is not None and scope not in SCOPES:
        raise UserError(f"unknown allocation {scope!r}; wanted one of {', '.join(SCOPES)}")
    options = dict(options)
    if isinstance(recipe, str):
        allocation = options.get("allocation")
        if allocation in SCOPES and allocation not in own_allocations(recipe):
            scope = scope or options.pop("allocation")
        given = [key for key in ("bits", "bpw") if options.get(key) is not None]
        if budget is not None and given:
            raise UserError(f"{given[0]} and the budget {budget} are two budgets for the same run; give one")
        layerwise = options.get("bpw") is not None and options.get("allocation") in own_allocations(recipe)[:-1]
        aims = takes_fractions(recipe) and (takes_option(recipe, "bpw") or options.get("bpw") is None)
        if not aims and not layerwise:
            budget = budget or _budget_in(options)
        recipe = make_recipe(recipe, **options)
    elif options:
        raise UserError(_NOT_BOTH.format(sorted(options)))
    terms = recipe.plan_terms if isinstance(recipe, Plannable) else None
    if terms is None:
        if budget is not None or scope is not None:
            raise not_plannable(recipe.name)
        return Wish(recipe)
    if budget is None and (terms.plan_required or scope is not None):
        budget = own_budget(recipe)
    if budget is not None:
        recipe = without_bpw(recipe)
    return Wish(recipe, budget, cast(Scope, scope or terms.scope or "global"))


def own_budget(recipe: Recipe) -> Budget:
    """The bits that the recipe is set to. Raises UserError where only calibration data say how many these are."""
    if not isinstance(recipe, Plannable):
        raise not_plannable(recipe.name)
    if (budget := recipe.plan_terms.budget) is None:
        raise UserError(
            f"Recipe {recipe.name} chooses its bit width from calibration data, so it has no fixed budget. "
            "Pass --bits, --bpw, --size or --vram."
        )
    return budget


def wish_for_plan(
    made_for: Mapping[str, Any],
    recipe: str | Recipe | None,
    options: Mapping[str, Any],
    budget: Budget | None = None,
    scope: str | None = None,
) -> Wish:
    """A plan says where the bits go: a recipe without a budget. `made_for`: the plan's recipe as plan.json has it; its
    settings stand where `recipe` and `options` do not say otherwise.

    Raises UserError for a budget beside the plan, and for whatever `make_recipe` refuses.
    """
    options = dict(options)
    name: Any = made_for.get("name") if recipe is None else recipe
    budgets = [str(budget)] if budget is not None else [f"{options['bpw']} bpw"] if options.get("bpw") else []
    bits = options.get("bits")
    fraction = isinstance(bits, float) and not bits.is_integer()
    if fraction and not takes_fractions(name or "slim-llm"):
        budgets.append(f"{bits} bits")
    if budgets or scope is not None:
        what = f"budget {budgets[0]}" if budgets else f"allocation {scope}"
        raise UserError(f"a plan and the {what} both say where the bits go; give one")
    if isinstance(recipe, str) or recipe is None:
        if name == made_for.get("name"):
            kept = {key: value for key, value in made_for.items() if key != "name"}
            if kept.get("bpw") is not None:
                kept.pop("bits", None)
            options = {**kept, **options}
        recipe = make_recipe(name or "slim-llm", **options)
    elif options:
        raise UserError(_NOT_BOTH.format(sorted(options)))
    return Wish(recipe)


def same_outer(made_for: OuterBits, asked: OuterBits) -> OuterBits:
    """The bits of embedding and head: the plan's. Raises UserError if the run asks for others."""
    for name, bits in asked.given.items():
        planned = made_for.given.get(name)
        if bits != planned:
            raise UserError(
                f"{name} bits is {bits}, the plan was made for {planned or 'none'}: it would take other bytes; leave "
                f"out {name} bits, plan again with them, or set {name}_bits in the plan"
            )
    return made_for


def check_bytes(
    made_for: Mapping[str, Any],
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, int]],
    plans: Mapping[str, LayerPlan],
) -> None:
    """Raise UserError if `recipe` would store a plan in other bytes than the recipe that the plan was made for does.

    A plan that names no recipe, or one that cannot be planned, promises no bytes.
    """
    if "name" not in made_for or not isinstance(recipe, Plannable):
        return
    planned = wish_for_plan(made_for, None, {}).recipe
    if not isinstance(planned, Plannable):
        return
    for name, plan in plans.items():
        one, other = planned.layout(*shapes[name], plan), recipe.layout(*shapes[name], plan)
        if one != other:
            raise UserError(
                f"the plan was made for {_told(planned, recipe)}: {name} would take {storage_bits(other) // 8} bytes "
                f"instead of {storage_bits(one) // 8}; leave the recipe to the plan, plan again, or empty "
                "the plan's recipe: a map alone is for any"
            )


def _told(planned: Recipe, recipe: Recipe) -> str:
    """What tells two recipes apart, in words."""
    if planned.name != recipe.name:
        return f"recipe {planned.name}, not {recipe.name}"
    names = [f.name for f in fields(planned)]  # type: ignore[arg-type]
    differ = [n for n in names if n not in ("bits", "bpw") and getattr(planned, n) != getattr(recipe, n)]
    return f"{planned.name} with " + ", ".join(f"{n}={getattr(planned, n)}, not {getattr(recipe, n)}" for n in differ)


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
