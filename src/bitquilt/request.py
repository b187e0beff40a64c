"""`Request` is what a run is asked for, `Result` what it returns; `wish` sorts out recipe, options, budget and plan."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch

from bitquilt.core.budget import SCOPES, Budget, Scope
from bitquilt.core.packing import storage_bits
from bitquilt.core.plan_file import OuterBits, PlanFile
from bitquilt.core.recipe import Plannable, Recipe
from bitquilt.core.settings import Calibration, Selection
from bitquilt.core.types import LayerPlan, Layout
from bitquilt.data.calibration import check_calibration
from bitquilt.engines.known import engine_named
from bitquilt.errors import UserError, not_plannable
from bitquilt.layer.grids.blocks import RUN
from bitquilt.model.free_tables import Table, free_tables
from bitquilt.model.structure import Skeleton
from bitquilt.recipes import make_recipe, own_allocations, takes_fractions, takes_option, usual_recipe, without_bpw


@dataclass(frozen=True)
class Wish:
    """A recipe and where its bits come from: a `plan`, a `budget` for the whole model, or the recipe itself.

    `engine`: name of another engine, whose files must be able to hold the result; the budget counts their bytes."""

    recipe: Recipe
    budget: Budget | None = None
    scope: Scope = "global"
    plan: PlanFile | None = None
    engine: str | None = None

    @property
    def by_loss(self) -> bool:
        """Whether a budget is allocated by measured losses."""
        return self.budget is not None and self.scope != "uniform"

    def tables(
        self, skeleton: Skeleton, selection: Selection, layers: Mapping[str, tuple[int, int]]
    ) -> tuple[Table, ...]:
        """Embedding and head of a model where their rows share the budget with its `layers`."""
        if self.budget is None or not self.budget.whole or selection.keep_embedding or self.engine is not None:
            return ()
        return free_tables(skeleton, selection.outer, layers)

    @property
    def budget_json(self) -> dict[str, Any] | None:
        """The budget in fingerprint, report and forecast."""
        if self.budget is None:
            return None
        stated = {"kind": self.budget.kind, "target": self.budget.value, "ctx": self.budget.ctx, "scope": self.scope}
        return stated if self.engine is None else {**stated, "engine": self.engine}


@dataclass(frozen=True)
class Result:
    """A finished run: the output folder and the content of report.json. `already_done`: nothing was computed."""

    folder: Path
    report: dict[str, Any]
    already_done: bool = False


@dataclass(frozen=True, eq=False)
class Request:
    """Everything that a run is asked for, checked as far as that needs no model.

    `sensitivities`: a file of measured losses; without one a run with a budget measures first. `rounds`: 2 quantizes
    once, measures again in the quantized model, plans and quantizes again.

    Raises UserError for a value that is out of range or calibration data that do not exist.
    """

    model: str | Path
    wish: Wish
    calibration: Calibration = field(default_factory=Calibration)
    selection: Selection = field(default_factory=Selection)
    out: Path | None = None
    sensitivities: Path | None = None
    rounds: int = 1
    batch_size: int | None = None
    work_dir: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; wanted at least 1")
        if self.rounds not in (1, 2) or (self.rounds == 2 and not self.wish.by_loss):
            raise UserError(
                f"rounds is {self.rounds}; wanted 1, or 2 with a budget that is allocated by losses, such as a size"
            )
        if self.wish.plan is not None:
            _check_outer(self.wish.plan.outer, self.selection.outer)
        if self.calibrates:
            check_calibration(self.calibration)

    @property
    def measures(self) -> bool:
        """Whether the run measures: for its first plan, or to store rows of embedding and head as a plan says."""
        return (self.wish.by_loss or self.follows_rows) and self.sensitivities is None

    @property
    def follows_rows(self) -> bool:
        """Whether a plan says where the bits go in the rows of embedding or head."""
        return self.wish.plan is not None and bool(self.wish.plan.tables)

    @property
    def calibrates(self) -> bool:
        """Whether the run reads calibration data at all."""
        return self.wish.recipe.needs.calibration or self.measures or self.rounds == 2

    @property
    def outer(self) -> OuterBits:
        """Bits of embedding and head: those of the plan, where there is one."""
        return self.selection.outer if self.wish.plan is None else self.wish.plan.outer


def wish(
    recipe: str | Recipe | None,
    options: Mapping[str, Any],
    budget: Budget | None = None,
    scope: str | None = None,
    plan: PlanFile | None = None,
    engine: str | None = None,
) -> Wish:
    """Make a wish from a recipe or its name and options, a budget and its scope, or a plan.

    Without `recipe`, take the plan's recipe, else cmpq+, or quilt for an engine. A fraction of a bit, or `bpw`, is a
    budget for the whole model, unless the recipe meets it in every layer (`cmpq`, or `slim-llm` with an allocation of
    its own). A scope, or `allocation="global"`, makes it a budget for the whole model there too. For an `engine` every
    layer has one width.

    Raises UserError for two budgets, for a budget together with a plan, for an unknown scope, and for whatever
    `make_recipe` refuses.
    """
    if scope is not None and scope not in SCOPES:
        raise UserError(f"unknown allocation {scope!r}; wanted one of {', '.join(SCOPES)}")
    options = dict(options)
    if plan is not None:
        return replace(_wish_for_plan(plan, recipe, options, budget, scope), engine=engine)
    if isinstance(recipe, str) or recipe is None:
        name = recipe or usual_recipe(engine)
        if engine is not None and takes_option(name, "zeros"):
            options.setdefault("zeros", engine_named(engine).zero_rule)
        if engine is not None and engine_named(engine).zero_rule == "blocks":
            if not takes_option(name, "zeros"):
                raise UserError(f"{name} has no grids for {engine_named(engine).title}; take rtn, gptq or quilt")
            options.setdefault("group_size", RUN)
        budget, scope = _taken_from(options, name, budget, scope)
        recipe = make_recipe(name, **options)
    else:
        _refuse_options(options)
    if not isinstance(recipe, Plannable):
        if budget is not None or scope is not None or engine is not None:
            raise not_plannable(recipe.name)
        return Wish(recipe)
    terms = recipe.plan_terms
    if engine is not None:
        scope = _engine_scope(engine, recipe, budget, scope or options.get("allocation"))
    if budget is None and (terms.plan_required or scope is not None):
        budget = own_budget(recipe)
    if budget is not None:
        recipe = without_bpw(recipe)
    return Wish(recipe, budget, cast(Scope, scope or terms.scope or "global"), engine=engine)


def _engine_scope(name: str, recipe: Plannable, budget: Budget | None, allocation: object) -> Scope | None:
    """Return the scope for plans that the engine `name` can hold, None where the recipe gives every layer a width that
    the engine has. Raises UserError for what it cannot hold."""
    engine = engine_named(name)
    if allocation not in (None, "layers"):
        raise UserError(
            f"{engine.title} holds one width per layer, which is the allocation layers, not {allocation}; leave it out"
        )
    if budget is not None and budget.kind == "vram":
        raise UserError(f"how much memory {engine.title} takes is not known; give --size or --bpw instead of --vram")
    own = recipe.plan_terms.budget
    if engine.alike == "all" and (budget is not None or own is None or own.value not in engine.bits):
        allowed = " or ".join(f"--bits {bits}" for bits in engine.bits)
        raise UserError(f"{engine.title} holds one width in the whole model; give {allowed} and no other budget")
    even = budget is None and own is not None and not recipe.plan_terms.own_widths and own.value in engine.bits
    return None if even else "layers"


def own_budget(recipe: Recipe) -> Budget:
    """Bits that the recipe is set to. Raises UserError for a recipe that cannot be planned or chooses bits itself."""
    if not isinstance(recipe, Plannable):
        raise not_plannable(recipe.name)
    if (budget := recipe.plan_terms.budget) is None:
        raise UserError(
            f"Recipe {recipe.name} chooses its bit width from calibration data, so it has no fixed budget. "
            "Pass --bits, --bpw, --size or --vram."
        )
    return budget


def planned_layout(recipe: Plannable, name: str, shape: tuple[int, int], plan: LayerPlan) -> Layout:
    """Return the layout in which `recipe` stores the layer. Raises UserError for bits that the recipe does not have."""
    try:
        return recipe.layout(*shape, plan)
    except ValueError as error:
        raise UserError(f"{name}: {error}; plan again") from None


def check_bytes(wish: Wish, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise UserError if the recipe stores the wish's plan in other bytes than the recipe that the plan was made for.

    `shapes`: `[out, in]` by path. A plan that names no recipe, or one that cannot be planned, promises no bytes.
    """
    recipe, plan = wish.recipe, wish.plan
    if plan is None or "name" not in plan.recipe or not isinstance(recipe, Plannable):
        return
    planned = make_recipe(plan.recipe["name"], **_options_in(plan))
    if not isinstance(planned, Plannable):
        return
    for name, layer in plan.plans.items():
        one, other = (planned_layout(each, name, shapes[name], layer) for each in (planned, recipe))
        if one != other:
            raise UserError(
                f"the plan was made for {_difference(planned, recipe)}: {name} would take {storage_bits(other) // 8} "
                f"bytes instead of {storage_bits(one) // 8}; leave out the recipe to use the plan's, plan again, or "
                'set "recipe" to {} in the plan to use its bits with any recipe'
            )


def _wish_for_plan(
    plan: PlanFile, recipe: str | Recipe | None, options: dict[str, Any], budget: Budget | None, scope: str | None
) -> Wish:
    """A plan's own recipe with its settings, unless `recipe` and `options` say otherwise."""
    made_for = plan.recipe.get("name")
    name: Any = made_for if recipe is None else recipe
    bits = options.get("bits")
    given = None
    if budget is not None:
        given = f"budget {budget}"
    elif options.get("bpw"):
        given = f"budget {options['bpw']} bpw"
    elif isinstance(bits, float) and not bits.is_integer() and not takes_fractions(name or usual_recipe()):
        given = f"budget {bits} bits"
    elif scope is not None:
        given = f"allocation {scope}"
    if given is not None:
        raise UserError(f"a plan and the {given} both say where the bits go; give one")
    if not (isinstance(recipe, str) or recipe is None):
        _refuse_options(options)
        return Wish(recipe, plan=plan)
    if name == made_for:
        options = {**_options_in(plan), **options}
    return Wish(make_recipe(name or usual_recipe(), **options), plan=plan)


def _options_in(plan: PlanFile) -> dict[str, Any]:
    """Options of the recipe that a plan was made for. `bits` of a recipe with a `bpw` is only its default."""
    options = {key: value for key, value in plan.recipe.items() if key != "name"}
    if options.get("bpw") is not None:
        options.pop("bits", None)
    return options


def _check_outer(planned: OuterBits, asked: OuterBits) -> None:
    """Raise UserError if the run asks for other bits of embedding and head than the plan."""
    for name, bits in asked.given.items():
        if bits != (made_for := planned.given.get(name)):
            raise UserError(
                f"{name} bits is {bits}, the plan was made for {made_for or 'none'}, so the model would take other "
                f"bytes; leave out {name} bits, plan again with them, or set {name}_bits in the plan"
            )


def _difference(planned: Recipe, recipe: Recipe) -> str:
    """What tells two recipes apart, in words."""
    if planned.name != recipe.name:
        return f"recipe {planned.name}, not {recipe.name}"
    names = [f.name for f in fields(planned)]  # type: ignore[arg-type]
    differ = [n for n in names if n not in ("bits", "bpw") and getattr(planned, n) != getattr(recipe, n)]
    return f"{planned.name} with " + ", ".join(f"{n}={getattr(planned, n)}, not {getattr(recipe, n)}" for n in differ)


def _refuse_options(options: Mapping[str, Any]) -> None:
    if options:
        raise UserError(f"options {sorted(options)} go with a recipe's name; set them on the recipe itself")


def _taken_from(
    options: dict[str, Any], name: str, budget: Budget | None, scope: str | None
) -> tuple[Budget | None, str | None]:
    """Take scope and budget out of the options of the recipe `name`, where they are not the recipe's own."""
    own = own_allocations(name)
    allocation = options.get("allocation")
    if allocation in SCOPES and allocation not in own:
        scope = scope or options.pop("allocation")
    given = [key for key in ("bits", "bpw") if options.get(key) is not None]
    if budget is not None and given:
        raise UserError(f"{given[0]} and the budget {budget} are two budgets for the same run; give one")
    layerwise = options.get("bpw") is not None and options.get("allocation") in own[:-1]
    aims = takes_fractions(name) and (takes_option(name, "bpw") or options.get("bpw") is None)
    if not aims and not layerwise:
        budget = budget or _budget_in(options)
    return budget, scope


def _budget_in(options: dict[str, Any]) -> Budget | None:
    """Take a budget out of the options of a recipe that has whole bits in every layer."""
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
