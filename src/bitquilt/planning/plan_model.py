"""Make it fit: `plan` says what a budget buys, before anything is quantized. Also what `quantize` asks for its plans.

The recipe's own allocation stands where a recipe decides layer by layer at whole bits; any other budget is a plan for
the whole model.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitquilt.core.budget import Budget, Scope
from bitquilt.core.events import Observer, Stage, Untouched, silent
from bitquilt.core.packing import bits_per_weight, storage_bits
from bitquilt.core.plan_file import OuterBits, plan_json
from bitquilt.core.recipe import Plannable, Recipe
from bitquilt.core.types import Layout
from bitquilt.data.calibration import SELF, check_calibration, clip_to_context, make_calibration
from bitquilt.errors import UserError, not_plannable
from bitquilt.model.checkpoint import Checkpoint, open_checkpoint
from bitquilt.model.outline import open_outline
from bitquilt.model.remote import RemoteCheckpoint, open_headers
from bitquilt.model.structure import Skeleton, open_skeleton, vocabulary_size
from bitquilt.model.ties import tied_layers
from bitquilt.planning.estimate import estimate, permits
from bitquilt.planning.interaction import perplexity_range
from bitquilt.planning.measure_sensitivities import measure
from bitquilt.planning.planner import Planned, Planner
from bitquilt.planning.sensitivities import Method, Sensitivities, read_sensitivities
from bitquilt.planning.tabulate import has_one_bit
from bitquilt.planning.untouched import survey
from bitquilt.request import Wish, own_budget, wish
from bitquilt.stream.devices import choose_device
from bitquilt.stream.embedding_and_head import rounded_tables
from bitquilt.stream.job import CalibratedJob, all_targets
from bitquilt.stream.job import shapes as shapes_of
from bitquilt.stream.model_training import TrainingMemory
from bitquilt.stream.run_report import recipe_json

_CTX = 2048  # tokens of the cache that `plan` states where no context is asked for
# What the tables do not depend on: how many bits there are, and who gives them out.
_BUDGETED = ("bits", "bpw", "allocation", "swap")


@dataclass(frozen=True, eq=False)
class Outlook:
    """What `plan` found. `planned.plans` is what `quantize` would do; `summary` is everything as plain JSON values."""

    wish: Wish
    planned: Planned
    summary: dict[str, Any]
    untouched: tuple[Untouched, ...]
    outer: OuterBits

    def plan_json(self) -> dict[str, Any]:
        """The content of a plan.json for `quantize --plan`."""
        return plan_json(recipe_json(self.wish.recipe), self.planned.plans, self.outer)


def plan(
    model: str | Path,
    recipe: str | Recipe = "slim-llm",
    *,
    budget: Budget | None = None,
    scope: str | None = None,
    sensitivities: str | Path | None = None,
    ctx: int | None = None,
    tie: bool = False,
    skip: Sequence[str] = (),
    include_head: bool = False,
    embedding_bits: int | None = None,
    head_bits: int | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    **options: Any,
) -> Outlook:
    """What a budget buys, from safetensors headers alone (of a hub id nothing else is fetched).

    Without `budget` the recipe's own bits. `sensitivities`: a file that `measure_model` wrote, to give bits out by what
    they are worth; without, every layer gets the same. `tie`: layers that serving engines fuse share their bits.
    `embedding_bits`, `head_bits`: the token embedding, the head in so many bits, which the budget counts.
    `samples`, `seq_len`: of the quantization whose time is estimated. Raises UserError for what the caller can mend,
    an unreachable budget among it (`Unreachable`).
    """
    wanted, outer = wish(recipe, options, budget, scope), OuterBits(embedding_bits, head_bits)
    checkpoint = open_headers(model)
    refuse_quantized(checkpoint)
    skeleton = open_outline(checkpoint)
    layers = all_targets(skeleton, skip, include_head)
    shapes = shapes_of(layers)
    known = None if sensitivities is None else load_sensitivities(sensitivities, checkpoint, wanted.recipe)
    ties = tied_layers(skeleton.model, shapes) if tie else []
    planner = open_planner(skeleton, wanted.recipe, shapes, known, ties=ties, outer=outer)
    own = wanted.budget is None
    shared: Scope = (planner.units.recipe.plan_terms.scope or "uniform") if own else wanted.scope
    planned = planner.plan(wanted.budget or own_budget(wanted.recipe), shared)
    untouched = survey(skeleton, {*layers, *(table.path for table in planner.tables)})
    seq_len, _ = clip_to_context(seq_len, checkpoint)
    measures = not own and wanted.scope != "uniform" and known is None
    terms = planner.units.recipe.plan_terms
    tokens = samples * seq_len
    outlook = estimate(
        skeleton, shapes, tokens, data=wanted.recipe.needs.calibration, search=terms.searches_ranges, measures=measures
    )
    trains = TrainingMemory(wanted.recipe, skeleton, shapes, seq_len).total
    outlook = replace(outlook, peak_memory_bytes=outlook.peak_memory_bytes + trains, training_bytes=trains)
    ctx = ctx or (wanted.budget.ctx if wanted.budget else None) or _CTX
    memory = planner.memory(planned.layouts, ctx)
    least, most = planner.reach(Budget("size", 1.0))
    budget_value = wanted.values.get("budget")
    summary = {
        "model": str(model),
        "recipe": recipe_json(wanted.recipe),
        "budget": None if budget_value is None else {**budget_value, "spent": planned.spent},
        "fits": True,
        "bytes": planned.size.total,
        "tensor_bytes": planned.size.tensors,
        "bpw": planned.bpw,
        "nominal_bits": planned.nominal_bits,
        "reachable_bytes": [int(least), int(most)],
        "reachable": list(planned.reach),
        "memory": {**asdict(memory), "total": memory.total, "ctx": ctx},
        "estimate": asdict(outlook),
        "layers": {
            name: {
                "shape": [layout.out_features, layout.in_features],
                "bits": _counts(planned.plans[name].bits if name in planned.plans else _one_width(layout)),
                "bpw": bits_per_weight(layout),
                "nominal_bits": layout.nominal_bits,
                "bytes": storage_bits(layout) // 8,
                "predicted_loss": planned.losses.get(name),
            }
            for name, layout in planned.layouts.items()
        },
        "tied": [list(names) for names in ties],
        "untouched": [asdict(item) for item in untouched],
        "permits": permits({name: planned.layouts[name] for name in shapes}),
        "prediction": _prediction(planned, known, outer),
        "sensitivities": None if sensitivities is None else str(sensitivities),
    }
    return Outlook(wanted, planned, summary, untouched, outer)


def measure_model(
    model: str | Path,
    path: str | Path,
    recipe: str | Recipe = "slim-llm",
    calibration: str | Path = SELF,
    *,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    skip: Sequence[str] = (),
    include_head: bool = False,
    method: Method = "kfac",
    work_dir: str | Path | None = None,
    device: str = "cpu",
    observer: Observer = silent,
    **options: Any,
) -> Sensitivities:
    """Measure what every width would cost and write it to `path`; plans for any budget read it in seconds.

    `device`: where blocks are computed, as in `quantize`. Raises UserError for what the caller can mend.
    """
    where = choose_device(device)
    recipe = wish(recipe, options).recipe
    if not isinstance(recipe, Plannable):
        raise not_plannable(recipe.name)
    check_calibration(calibration)
    _check_writable(Path(path))
    checkpoint = open_checkpoint(model)
    refuse_quantized(checkpoint)
    skeleton = open_skeleton(checkpoint)
    all_targets(skeleton, skip, include_head)
    ids = make_calibration(
        checkpoint, calibration, samples=samples, seq_len=clip_to_context(seq_len, checkpoint)[0], seed=seed,
        vocabulary=vocabulary_size(skeleton.model), progress=lambda text: observer(Stage(text)),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        found = measure_sensitivities(
            skeleton, recipe, ids, Path(folder), skip=skip, include_head=include_head, method=method, seed=seed,
            observer=observer, device=where,
        )  # fmt: skip
    found.save(Path(path))
    return found


def _check_writable(path: Path) -> None:
    """Before what is to be written there has been measured for minutes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write the sensitivities to {path}: {error.strerror}") from None
    if path.is_dir():
        raise UserError(f"cannot write the sensitivities to {path}: it is a folder")


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise UserError for a model that is quantized already."""
    if method := checkpoint.model_config.quantized_by:
        raise UserError(f"{checkpoint.name} is already quantized ({method}); give the full-precision model")


def _one_width(layout: Layout) -> list[int]:
    """Of embedding and head, which no plan gives out."""
    form, width = layout.segments[0]
    return [form.bits] * -(-width // form.group_size)


def _counts(bits: Sequence[int]) -> dict[str, int]:
    counts = np.bincount(np.asarray(bits))
    return {str(width): int(counts[width]) for width in np.flatnonzero(counts)}


def prediction(losses: Mapping[str, float], known: Sensitivities, outer: OuterBits) -> dict[str, Any]:
    """KL in nats per token and the range of perplexities it allows. What embedding and head in few bits cost is in
    neither, which `without` says."""
    found: dict[str, Any] = {"kl": sum(losses.values()), "perplexity_full_precision": known.perplexity}
    if known.perplexity is not None:
        found["ppl_range"] = list(perplexity_range(found["kl"], known.perplexity))
    if outer.given:
        found["without"] = f"the rounding of the {' and the '.join(outer.given)}"
    return found


def _prediction(planned: Planned, known: Sensitivities | None, outer: OuterBits) -> dict[str, Any] | None:
    if known is None or planned.loss is None:
        return None
    return prediction(planned.losses, known, outer)


def open_planner(
    skeleton: Skeleton,
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, int]],
    sensitivities: Sensitivities | None = None,
    *,
    ties: Sequence[Sequence[str]] = (),
    outer: OuterBits = OuterBits(),
) -> Planner:
    """A planner for these layers, and embedding and head if they are to take few bits. Raises UserError for a recipe
    that cannot be planned, or an embedding or a head that has to stay as it is."""
    if not isinstance(recipe, Plannable):
        raise not_plannable(recipe.name)
    tables = rounded_tables(skeleton, outer, shapes)
    return Planner(skeleton, recipe, recipe_json(recipe), shapes, sensitivities, ties=ties, tables=tables)


def about(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """What sensitivities depend on and is checked when they are used again."""
    values = {key: value for key, value in recipe_json(recipe).items() if key not in _BUDGETED}
    found = {"recipe": json.loads(json.dumps(values))}
    if isinstance(recipe, Plannable) and has_one_bit(recipe):
        found["way to see one-bit groups"] = "each layer solved at one bit"  # older tables only guessed them
    if not isinstance(checkpoint, RemoteCheckpoint):  # of headers alone there is no fingerprint
        found["model"] = checkpoint.fingerprint()
    return found


def load_sensitivities(path: str | Path, checkpoint: Checkpoint, recipe: Recipe) -> Sensitivities:
    """Saved tables. Raises UserError if they are of another model or another recipe."""
    found = read_sensitivities(path)
    found.check(about(checkpoint, recipe), str(path))
    return found


def measure_sensitivities(
    skeleton: Skeleton,
    recipe: Recipe,
    ids: torch.Tensor,
    folder: Path,
    *,
    skip: Sequence[str] = (),
    include_head: bool = False,
    method: Method = "kfac",
    seed: int = 0,
    observer: Observer,
    at: Path | None = None,
    device: torch.device | None = None,
) -> Sensitivities:
    """Tables of loss for every layer, from calibration ids `[samples, tokens]`; `folder` holds what is swapped out.
    `at`: measured in this quantized checkpoint of the model, a second round. `device`: where blocks are computed."""
    job = CalibratedJob(
        skeleton=skeleton,
        recipe=recipe,
        ids=ids,
        batch_size=1,
        folder=folder,
        skip=tuple(skip),
        include_head=include_head,
        device=device or torch.device("cpu"),
    )
    return measure(job, observer, method=method, seed=seed, about=about(skeleton.checkpoint, recipe), at=at)


def file_hash(path: str | Path) -> str:
    """sha256 of a file, for a fingerprint."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
