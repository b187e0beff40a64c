"""plan.json: where the bits went, readable, diffable, editable by hand and replayable.

    {"recipe": {"name": "slim-llm", "bits": 2, ...},
     "layers": {"model.layers.0.mlp.up_proj": {"group_size": 32, "bits": "1223222..."}, ...},
     "embedding_bits": 8,
     "head_bits": 6}

One digit per column group, in the original order of the columns. Groups of one column are channels with a codebook
each; all others have a multiple of 8. The recipe, and the bits of embedding and head where they take part, say what the
plan was made for: with others the same map takes other bytes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError

from bitquilt.core.types import LayerPlan
from bitquilt.errors import UserError


def _channels_or_groups(group_size: int) -> int:
    if group_size != 1 and (group_size < 8 or group_size % 8):
        raise ValueError("wanted a positive multiple of 8, or 1 for channels with a codebook each")
    return group_size


def _named(recipe: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(recipe.get("name", ""), str):
        raise ValueError("wanted the name of a recipe")
    return recipe


@dataclass(frozen=True)
class OuterBits:
    """What is rounded to nearest beside the blocks, and to how many bits; None stays as it is."""

    embedding: int | None = None
    head: int | None = None

    @property
    def given(self) -> dict[str, int]:
        """Those that are not None, by name."""
        return {name: bits for name, bits in (("embedding", self.embedding), ("head", self.head)) if bits is not None}


class PlannedLayer(BaseModel):
    """One layer's entry."""

    model_config = ConfigDict(extra="forbid")
    group_size: Annotated[int, AfterValidator(_channels_or_groups)]
    bits: Annotated[str, StringConstraints(pattern=r"^[1-8]+$")]


class PlanFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid")
    recipe: Annotated[dict[str, Any], AfterValidator(_named)]
    layers: dict[str, PlannedLayer]
    embedding_bits: int | None = None
    head_bits: int | None = None

    @property
    def outer(self) -> OuterBits:
        """Of embedding and head."""
        return OuterBits(self.embedding_bits, self.head_bits)

    @property
    def plans(self) -> dict[str, LayerPlan]:
        """By module path."""
        return {name: LayerPlan(tuple(map(int, layer.bits)), layer.group_size) for name, layer in self.layers.items()}


def plan_json(recipe: Mapping[str, Any], plans: Mapping[str, LayerPlan], outer: OuterBits) -> dict[str, Any]:
    """The file's content before a run, as `plan_to_json` gives it after one."""
    layers = {
        name: {"group_size": plan.group_size, "bits": "".join(map(str, plan.bits))} for name, plan in plans.items()
    }
    return _content(recipe, layers, outer)


def plan_to_json(recipe: Mapping[str, Any], records: list[dict[str, Any]], outer: OuterBits) -> dict[str, Any]:
    """The plan of a finished run."""
    layers = {
        name: {"group_size": entry["group_size"], "bits": entry["bits"]}
        for record in records
        if record.get("planned", True)
        for name, entry in record["layers"].items()
    }
    return _content(recipe, layers, outer)


def _content(recipe: Mapping[str, Any], layers: dict[str, Any], outer: OuterBits) -> dict[str, Any]:
    found: dict[str, Any] = {"recipe": dict(recipe), "layers": layers}
    found |= {f"{name}_bits": bits for name, bits in outer.given.items()}
    return dict(json.loads(json.dumps(found)))


def check_plan(plans: Mapping[str, LayerPlan], shapes: Mapping[str, tuple[int, int]], channels: bool = False) -> None:
    """Raise UserError naming the first layer (of `shapes`, `[out, in]` by path) that the plans do not fit or know.

    `channels`: whether the recipe gives bits to single channels; every other recipe to groups of columns.
    """
    for name, (_, width) in shapes.items():
        if name not in plans:
            raise UserError(f"the plan has no entry for {name}; add one, or skip the layer")
        plan = plans[name]
        if (plan.group_size == 1) != channels:
            wanted = "group_size 1: the recipe works channel by channel" if channels else "groups of a multiple of 8"
            raise UserError(f"the plan's entry {name} has group_size {plan.group_size}; wanted {wanted}")
        if len(plan.bits) != len(plan.widths(width)):
            raise UserError(
                f"the plan's entry {name} gives {len(plan.bits)} groups of {plan.group_size} columns for {width} "
                f"inputs; wanted {len(plan.widths(width))}"
            )
    if unknown := sorted(plans.keys() - shapes.keys()):
        raise UserError(
            f"the plan has an entry for {unknown[0]}, which is not quantized in this run; remove it, or give the flags "
            "that the plan was made with"
        )


def read_plan(path: str | Path) -> PlanFile:
    """Raises UserError naming the entry that is wrong."""
    try:
        return PlanFile.model_validate(json.loads(Path(path).read_text()))
    except OSError as error:
        raise UserError(f"cannot read the plan {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"the plan {path} is not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = " > ".join(map(str, first["loc"]))
        raise UserError(f"the plan {path}, entry {where}: {first['msg']}; got {str(first['input'])[:60]!r}") from None
