"""Options that several verbs share; a dataclass becomes one flag per field (`app.grouped`). `read_flags` reads the
recipe and the budget that the flags of `plan` and `quantize` name."""

import ast
import functools
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from typer import Argument, Option

from bitquilt.core.budget import SCOPES, Budget
from bitquilt.core.settings import GENERAL, Calibration, Selection
from bitquilt.errors import UserError
from bitquilt.recipes import RECIPES, own_allocations, takes_fractions, takes_option, usual_recipe
from bitquilt.request import Wish, wish

_DATA = "text, jsonl, json, csv, parquet, a folder of these, a hub data set, or token ids in safetensors"
_CALIBRATION = f"{_DATA.capitalize()}; general: comes with Bitquilt; self: the model writes it."
_RECIPES = f"{', '.join(RECIPES)}. Default: {usual_recipe()}, or {usual_recipe('any')} with --for."
_COLUMN = "Column of a data set to read. Default: text, messages, conversations, or instruction with output."
_SCOPES = """What may differ in bits. global: column groups of the whole model; layers: whole layers; layer: groups
within a layer, with the same mean in every layer; pairs: as layer, with N-1 and N+1 in equal numbers; uniform: nothing.
Or a rule of the recipe: sba, dp (slim-llm); trace, hawq2 (aptq); norm, error_table (cmpq, cmpq+)."""
_FOR = (
    "Engine to export to (mlx, vllm, gptq, gguf): use only widths and groups that it holds, and count its files' bytes."
)
_EFFORT = "For quilt and cmpq+. fast (default); normal: train each block; best: then the whole model."
_recipe = functools.partial(Option, rich_help_panel="Recipe")
_budget = functools.partial(Option, rich_help_panel="Bits and budget")
_data = functools.partial(Option, rich_help_panel="Calibration")
_layers = functools.partial(Option, rich_help_panel="Which layers")
_window = functools.partial(Option, rich_help_panel="Evaluation")


class Dtype(StrEnum):
    """Data type a model computes in; `auto` is the type it is stored in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[str, Argument(metavar="MODEL", help="Folder of a full-precision model, or its hub id (org/name).")]
AnyModel = Annotated[str, Argument(metavar="MODEL", help="Model folder or hub id, quantized or not.")]
Quantized = Annotated[str, Argument(metavar="DIR", help="Folder or hub id of a checkpoint that bitquilt wrote.")]
Device = Annotated[str, Option(help="Device that computes: cpu, cuda, cuda:N, or auto (a GPU if there is one).")]
DtypeOption = Annotated[Dtype | None, Option(help="Type to compute in. Default: float32 on a CPU, else as stored.")]
Text = Annotated[str | None, _window(metavar="SOURCE", help=f"Text to evaluate on: {_DATA}.")]
Reference = Annotated[str | None, _window(metavar="BASE", help="Full-precision model; adds the KL divergence from it.")]
TrustCode = Annotated[
    bool, Option("--trust-remote-code", help="Run Python code from the model's folder. Only for people you trust.")
]
_BOS = "Begin every window of a text with BOS, where the tokenizer adds it."
Count = int | None
Number = float | None
Word = str | None
Words = list[str] | None


@dataclass(frozen=True)
class RecipeOptions:
    """The recipe and its settings."""

    recipe: Annotated[Word, _recipe("--recipe", "-r", help=_RECIPES)] = None
    group_size: Annotated[Count, _recipe(help="Input channels per scale, a multiple of 8. Default: by recipe.")] = None
    effort: Annotated[Word, _recipe(metavar="LEVEL", help=_EFFORT)] = None
    published: Annotated[bool, _recipe("--published", help="Follow the publication, without our improvements.")] = False
    settings: Annotated[Words, _recipe("--set", metavar="NAME=VALUE", help="Set any other option. Repeatable.")] = None


@dataclass(frozen=True)
class BudgetOptions:
    """What the model may take, and which parts of it may differ in bits."""

    bits: Annotated[Number, _budget(metavar="N", help="Mean code width. The range depends on the recipe.")] = None
    bpw: Annotated[Number, _budget(metavar="N", help="True bits per weight of the blocks: codes, scales, maps.")] = None
    total_bpw: Annotated[Number, _budget(metavar="N", help="Bits of the whole folder per parameter.")] = None
    size: Annotated[Word, _budget(metavar="BYTES", help="Size of the output folder: 6.5GiB, 800MB.")] = None
    vram: Annotated[Word, _budget(metavar="BYTES", help="Memory for weights, cache and workspace. Needs --ctx.")] = None
    ctx: Annotated[Count, _budget(metavar="N", help="Context length in tokens that --vram must hold.")] = None
    allocation: Annotated[Word, _budget(help=_SCOPES)] = None
    engine: Annotated[Word, _budget("--for", metavar="ENGINE", help=_FOR)] = None


@dataclass(frozen=True)
class CalibrationOptions:
    """Calibration data."""

    calibration: Annotated[str, _data(metavar="SOURCE", help=_CALIBRATION)] = GENERAL
    samples: Annotated[Count, _data(help="Number of calibration sequences. Default: by the widest layer.")] = None
    seq_len: Annotated[int, _data(help="Tokens per calibration sequence.")] = 512
    seed: Annotated[int, _data(help="Seed of everything that is drawn at random.")] = 0
    trust_remote_code: TrustCode = False
    column: Annotated[Word, _data(metavar="NAME", help=_COLUMN)] = None
    bos: Annotated[bool, _data("--bos/--no-bos", help=_BOS)] = True

    def read(self, self_samples: int = 0) -> Calibration:
        """The value of the same fields. Raises UserError for one that is out of range."""
        fields = {key: value for key, value in vars(self).items() if key != "calibration"}
        return Calibration(self.calibration, self_samples=self_samples, **fields)


@dataclass(frozen=True)
class LayerOptions:
    """Layers to leave out, and layers outside the blocks to take in."""

    skip: Annotated[Words, _layers(metavar="PATTERN", help="Leave out layers, as '*.down_proj'. Repeatable.")] = None
    include_head: Annotated[bool, _layers("--include-head", help="Quantize the output head too, unless tied.")] = False
    embedding_bits: Annotated[Count, _layers(metavar="N", help="Round the embedding, and a tied head, to N bits.")] = (
        None
    )
    head_bits: Annotated[Count, _layers(metavar="N", help="Round an output head that is not tied to N bits.")] = None
    keep_embedding: Annotated[bool, _layers("--keep-embedding", help="Leave embedding and head out of a budget.")] = (
        False
    )
    blocks: Annotated[Word, _layers(metavar="PATH", help="List of blocks. Default: the language model's.")] = None

    def read(self) -> Selection:
        """The value of the same fields."""
        return Selection(**{**vars(self), "skip": self.skip or ()})


@dataclass(frozen=True)
class WindowOptions:
    """How a text is cut into windows for evaluation."""

    seq_len: Annotated[Count, _window(help="Tokens per window. Default: the model's context, at most 2048.")] = None
    stride: Annotated[Count, _window(metavar="N", help="Start a window every N tokens; windows then overlap.")] = None
    max_tokens: Annotated[Count, _window(metavar="N", help="Read only the first N tokens of the text.")] = None
    column: Annotated[Word, _window(metavar="NAME", help=_COLUMN)] = None
    bos: Annotated[bool, _window("--bos/--no-bos", help=_BOS)] = True


@dataclass(frozen=True)
class Asked:
    """The recipe by name, its options by field name, and a budget and scope for the whole model, as the flags say."""

    recipe: str | None
    options: dict[str, Any]
    budget: Budget | None
    scope: str | None
    engine: str | None = None

    @property
    def wish(self) -> Wish:
        """The recipe, budget and scope to plan for."""
        return wish(self.recipe, self.options, self.budget, self.scope, engine=self.engine)


def read_flags(given: RecipeOptions, budget: BudgetOptions, *, by_plan: bool = False) -> Asked:
    """Return what the flags ask for. `by_plan`: a plan names the recipe unless --recipe does.

    Raises UserError for flags that exclude each other."""
    name = given.recipe or usual_recipe(budget.engine)
    names = list(RECIPES) if by_plan and given.recipe is None else [name]
    limit, fractions = _size_budget(budget), takes_fractions(name)
    if given.group_size is not None and not any(takes_option(each, "group_size") for each in names):
        raise UserError(f"recipe {name} has no groups of columns, so --group-size does not apply; leave it out")
    whole = limit is not None or not (fractions or budget.bpw is not None or (budget.bits or 0.0).is_integer())
    allocation, scope = _split_allocation(
        budget.allocation, {a for each in names for a in own_allocations(each)}, whole
    )
    flags = {
        "bits": budget.bits,
        "bpw": budget.bpw,
        "group_size": given.group_size,
        "published": given.published or None,
        "allocation": allocation,
        "effort": given.effort,
    }
    options = {key: value for key, value in flags.items() if value is not None}
    for setting in given.settings or ():
        key, value = parse_setting(setting)
        if key in options:
            raise UserError(f"{key} is given twice: --set {setting} repeats it; leave one out")
        options[key] = value
    if "name" in options:
        raise UserError(f"recipe {name} has no option 'name'; choose the recipe with --recipe")
    return Asked(given.recipe, options, limit, scope, budget.engine)


def parse_setting(text: str) -> tuple[str, Any]:
    """Split "damp=0.05" into ("damp", 0.05). A value that is neither JSON nor a Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise UserError(f"--set {text!r} is not NAME=VALUE; write for example --set damp=0.05")
    for parse in (json.loads, ast.literal_eval):
        try:
            return name.strip(), parse(value)
        except (ValueError, SyntaxError):
            continue
    return name.strip(), value


def _size_budget(given: BudgetOptions) -> Budget | None:
    """Return the budget of --total-bpw, --size or --vram; --bits and --bpw are options of the recipe."""
    if given.total_bpw is None and given.size is None and given.vram is None and given.ctx is None:
        return None
    try:
        found = Budget.of(**{key: value for key, value in vars(given).items() if key not in ("allocation", "engine")})
    except ValueError as error:
        raise UserError(str(error)) from None
    return found if found is not None and found.whole else None


def _split_allocation(given: str | None, own: set[str], whole: bool) -> tuple[str | None, str | None]:
    """Return --allocation as (the recipe's own rule, scope of a plan), one of which is None.

    `whole`: there is a budget for the whole model, so "uniform" is a scope rather than the recipe's own rule."""
    if given is None:
        return None, None
    if given in own and not (whole and given in SCOPES):
        return given, None
    if given in SCOPES:
        return None, given
    raise UserError(f"unknown allocation {given!r}; wanted one of {', '.join(sorted({*SCOPES, *own}))}")
