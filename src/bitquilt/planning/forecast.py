"""`Forecast`: everything that `bitquilt.plan` found out; `summary` is the same as plain JSON values."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitquilt.core.events import Untouched
from bitquilt.core.packing import bits_per_weight, storage_bits
from bitquilt.core.plan_file import OuterBits, plan_json
from bitquilt.core.types import Layout
from bitquilt.model.memory import Memory
from bitquilt.planning.contents import Content
from bitquilt.planning.estimate import Estimate, Permit
from bitquilt.planning.planner import Planned
from bitquilt.request import Wish
from bitquilt.stream.run_report import recipe_json


@dataclass(frozen=True, eq=False)
class Forecast:
    """What a budget buys. `planned.plans` is what `quantize` would do if `exact`, else the same bits in every layer.

    `reachable_bytes`: smallest and largest folder with this recipe. `memory`: to run the model with `ctx` tokens.
    `own_rule_bytes`: without a budget, the most that a recipe takes whose own rule needs calibration data.
    `estimate`: what quantizing takes here. `permits`: kernels and formats that take the result, by title. `ties`:
    layers that share their bits.
    """

    model: str | Path
    wish: Wish
    planned: Planned
    outer: OuterBits
    reachable_bytes: tuple[int, int]
    ctx: int
    memory: Memory
    estimate: Estimate
    permits: dict[str, Permit]
    ties: tuple[tuple[str, ...], ...]
    untouched: tuple[Untouched, ...]
    sensitivities: Path | None
    contents: tuple[Content, ...]
    parameters: int
    own_rule_bytes: int | None = None

    @property
    def exact(self) -> bool:
        """Whether `quantize` with the same settings makes this very plan.

        Without tables of losses it measures them first; without a budget some recipes follow a rule of their own. The
        bound is then the budget, or `own_rule_bytes`.
        """
        if self.wish.budget is not None:
            return self.sensitivities is not None or not self.wish.by_loss
        return self.own_rule_bytes is None

    def plan_json(self) -> dict[str, Any]:
        """Content of a plan.json for `quantize --plan`."""
        return plan_json(recipe_json(self.wish.recipe), self.planned.plans, self.outer, self.planned.table_rows)

    @property
    def summary(self) -> dict[str, Any]:
        """Everything as plain JSON values; `bitquilt plan --json` prints it."""
        planned, budget = self.planned, self.wish.budget_json
        return {
            "model": str(self.model),
            "recipe": recipe_json(self.wish.recipe),
            "budget": None if budget is None else {**budget, "spent": planned.spent},
            "fits": True,
            "exact": self.exact,
            "own_rule_bytes": self.own_rule_bytes,
            "bytes": planned.size.total,
            **({} if planned.exported_bytes is None else {"exported_bytes": planned.exported_bytes}),
            "tensor_bytes": planned.size.tensors,
            "bits_per_parameter": 8 * planned.size.total / self.parameters,
            "contents": [{**asdict(one), "bits": one.bits} for one in self.contents],
            "bpw": planned.bpw,
            "nominal_bits": planned.nominal_bits,
            "reachable_bytes": list(self.reachable_bytes),
            "reachable": list(planned.reach),
            "memory": {**asdict(self.memory), "total": self.memory.total, "ctx": self.ctx},
            "estimate": asdict(self.estimate),
            "layers": {name: self._layer(name, layout) for name, layout in planned.layouts.items()},
            "tied": [list(names) for names in self.ties],
            "untouched": [asdict(item) for item in self.untouched],
            "permits": {title: asdict(permit) for title, permit in self.permits.items()},
            "prediction": None if planned.prediction is None else planned.prediction.to_json(),
            "sensitivities": None if self.sensitivities is None else str(self.sensitivities),
        }

    def _layer(self, name: str, layout: Layout) -> dict[str, Any]:
        plans, prediction = self.planned.plans, self.planned.prediction
        return {
            "shape": [layout.out_features, layout.in_features],
            "bits": _counts(plans[name].bits if name in plans else _one_width(layout)),
            "bpw": bits_per_weight(layout),
            "nominal_bits": layout.nominal_bits,
            "bytes": storage_bits(layout) // 8,
            "predicted_loss": None if prediction is None else prediction.losses.get(name),
        }


def _one_width(layout: Layout) -> list[int]:
    """Bits per group of embedding and head, which no plan allocates."""
    form, width = layout.segments[0]
    return [form.bits] * -(-width // form.group_size)


def _counts(bits: Sequence[int]) -> dict[str, int]:
    """Number of groups by bits."""
    counts = np.bincount(np.asarray(bits))
    return {str(width): int(counts[width]) for width in np.flatnonzero(counts)}
