"""plan.json, the record of where the bits went: `read_plan`, `plan_json` and `check_plan`.

    {"recipe": {"name": "slim-llm", "bits": 2, ...},
     "layers": {"model.layers.0.mlp.up_proj": {"group_size": 32, "bits": "1223222..."}, ...},
     "embedding_bits": 8,
     "head_bits": 6}

An embedding or head that shares the budget has a digit per row instead: "tables": {"model.embed_tokens": "4222..."}.

The file can be read, compared, edited by hand and replayed. Each layer has one digit per column group, in the original
order of the columns. A group has one column (a channel with a codebook of its own) or a multiple of 8. The recipe and
the bits of embedding and head say what the plan was made for: with other settings the same map takes other bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, PrivateAttr, StringConstraints, ValidationError

from bitquilt.core.json_files import parse_json
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
    """Bits of the token embedding and of the head, which are rounded to nearest; None leaves one unquantized."""

    embedding: int | None = None
    head: int | None = None

    @property
    def given(self) -> dict[str, int]:
        """The bits that are not None, by name."""
        return {name: bits for name, bits in (("embedding", self.embedding), ("head", self.head)) if bits is not None}


class PlannedLayer(BaseModel):
    """The entry of one layer."""

    model_config = ConfigDict(extra="forbid")
    group_size: Annotated[int, AfterValidator(_channels_or_groups)]
    bits: Annotated[str, StringConstraints(pattern=r"^[1-8]+$")]


class PlanFile(BaseModel):
    """The content of a plan.json."""

    model_config = ConfigDict(extra="forbid")
    recipe: Annotated[dict[str, Any], AfterValidator(_named)]
    layers: dict[str, PlannedLayer]
    embedding_bits: int | None = None
    head_bits: int | None = None
    tables: dict[str, Annotated[str, StringConstraints(pattern=r"^[1-8]+$")]] = {}
    _sha256: str = PrivateAttr(default="")

    @property
    def sha256(self) -> str:
        """Hash of the file that `read_plan` read; empty for a plan that was not read from a file."""
        return self._sha256

    @property
    def outer(self) -> OuterBits:
        """Bits of embedding and head."""
        return OuterBits(self.embedding_bits, self.head_bits)

    @property
    def table_rows(self) -> dict[str, NDArray[np.uint8]]:
        """Bits of every row of the tables, uint8 `[rows]`, by path."""
        return {path: np.frombuffer(bits.encode(), np.uint8) - ord("0") for path, bits in self.tables.items()}

    @property
    def plans(self) -> dict[str, LayerPlan]:
        """Plans of the layers, by module path."""
        return {name: LayerPlan(tuple(map(int, layer.bits)), layer.group_size) for name, layer in self.layers.items()}


def plan_json(
    recipe: Mapping[str, Any],
    plans: Mapping[str, LayerPlan],
    outer: OuterBits,
    tables: Mapping[str, NDArray[np.uint8]] | None = None,
) -> dict[str, Any]:
    """Content of the file for these plans by module path; `tables`: bits of every row, uint8 `[rows]`, by path."""
    layers = {
        name: {"group_size": plan.group_size, "bits": "".join(map(str, plan.bits))} for name, plan in plans.items()
    }
    found: dict[str, Any] = {"recipe": dict(recipe), "layers": layers}
    found |= {f"{name}_bits": bits for name, bits in outer.given.items()}
    if tables:
        found["tables"] = {path: (bits + ord("0")).astype(np.uint8).tobytes().decode() for path, bits in tables.items()}
    return dict(json.loads(json.dumps(found)))


def check_plan(plans: Mapping[str, LayerPlan], shapes: Mapping[str, tuple[int, int]], channels: bool = False) -> None:
    """Raise UserError naming the first layer that has no plan, does not fit its plan or is not quantized.

    `shapes`: `[out, in]` of the layers to quantize, by path. `channels`: the recipe gives bits to single channels
    instead of column groups.
    """
    for name, (_, width) in shapes.items():
        if name not in plans:
            raise UserError(f"the plan has no entry for {name}; add one, or leave the layer out with --skip {name}")
        plan = plans[name]
        if (plan.group_size == 1) != channels:
            wanted = "group_size 1: the recipe works channel by channel" if channels else "groups of a multiple of 8"
            raise UserError(f"the plan's entry {name} has group_size {plan.group_size}; wanted {wanted}; plan again")
        if len(plan.bits) != len(plan.widths(width)):
            raise UserError(
                f"the plan's entry {name} gives {len(plan.bits)} groups of {plan.group_size} columns for {width} "
                f"inputs; wanted {len(plan.widths(width))} groups; plan again for this model"
            )
    if unknown := sorted(plans.keys() - shapes.keys()):
        raise UserError(
            f"the plan has an entry for {unknown[0]}, which this run does not quantize; remove the entry, or run with "
            "the --skip and --include-head flags that the plan was made with"
        )


def check_plan_tables(tables: Mapping[str, str], rows: Mapping[str, int]) -> None:
    """Raise UserError naming the first of a plan's tables that is not the model's. `rows`: of each, by path."""
    for name, bits in tables.items():
        if name not in rows:
            raise UserError(
                f"the plan has bits for the rows of {name}, not a table of this model that can share a budget; "
                "plan again for this model and these flags"
            )
        if len(bits) != rows[name]:
            raise UserError(f"the plan gives bits to {len(bits)} rows of {name}; it has {rows[name]}; plan again")
        if "1" in bits:
            raise UserError(f"the plan gives 1 bit to a row of {name}; wanted 2 to 8")


def read_plan(path: str | Path) -> PlanFile:
    """Read a plan.json. Raises UserError naming the entry that is wrong."""
    try:
        data = Path(path).read_bytes()
        found = PlanFile.model_validate(parse_json(data))
        found._sha256 = hashlib.sha256(data).hexdigest()
        return found
    except OSError as error:
        raise UserError(
            f"cannot read the plan {path}: {error.strerror}; `bitquilt plan MODEL --out FILE` writes one"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = " > ".join(map(str, first["loc"]))
        raise UserError(f"the plan {path}, entry {where}: {first['msg']}; got {str(first['input'])[:60]!r}") from None
    except ValueError as error:
        raise UserError(f"the plan {path} is not JSON: {error}") from None
