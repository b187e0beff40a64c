"""What the losses of single layers add up to when everything is quantized at once: `interaction_factors`, `predict`.

To second order losses add. At few bits an error meets those of the layers before it, and the sum is too small. How much
depends on the width that made the error and hardly on the model: measured KL over the sum of the tables, everything at
one width (slim-llm, groups of 32, 60,000 held-out tokens), is 1.79, 1.90, 2.15 at 2 bits and 1.20, 1.22, 1.30 at 3 bits
on demo, babyllama-1m-chars and stories260k. Layer by layer it is 1.0 to 1.2 and 0.9 to 1.0. So

    KL = constant * sum over widths b of factor(b) * (the tables' sum over the groups at b bits)

These runs give the constant 1. In 58 runs that the factors were not fitted on (gptq, slim-llm, cmpq; global, published
and uniform plans of 2.25 to 4.5 true bits; three models) it is 1.2, because plans exploit errors of their tables. Where
later layers are solved to repair the earlier ones (`quilt`), errors no longer add up: 0.64 (26 runs). The constant
changes no plan. Plain numbers, no tensors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitquilt.core.plan_file import OuterBits
from bitquilt.core.recipe import Recipe
from bitquilt.core.types import LayerPlan
from bitquilt.model.free_tables import part_name
from bitquilt.planning.sensitivities import Sensitivities

_CONSTANT, _REPAIRED = 1.2, 0.64
# Geometric means of the figures above; at 4 bits a guess between them and 1. At one bit the tables hold the measured
# cost of solving the layer. Tried were 1.94, 4 and 1000 (no one-bit groups): 4 is never much worse than none, better in
# six of nine cases on the calibration text: KL 2.32, 1.87, 1.96 on stories260k (cmpq, 2.45 bpw), 0.389, 0.466, 0.566
# on babyllama-1m-chars (slim-llm, groups of 64, 2.31), 0.166, 0.169, 0.196 on the demo model (128, 2.14).
_FACTORS = {1: 4.0, 2: 1.94, 3: 1.24, 4: 1.05}
# Measured over predicted KL, each model predicted with the constant of the two others, is 0.72 to 2.06, with repair
# 0.59 to 1.72 (docs/lab/sensitivities.md, python -m benchmarks.prediction); the range adds a margin.
RANGE = (0.55, 2.1)


@dataclass(frozen=True)
class LossPrediction:
    """Predicted KL in nats per token, by layer and in total, and the range of perplexities that it allows.

    `perplexity`: of the full-precision model on the calibration text; None where the model has no next-token logits.
    `without`: parts whose loss is not in the prediction.
    """

    losses: Mapping[str, float]
    perplexity: float | None
    without: tuple[str, ...] = ()

    @property
    def kl(self) -> float:
        """Predicted KL of the whole model."""
        return sum(self.losses.values())

    def to_json(self) -> dict[str, Any]:
        """The prediction in forecast and report."""
        found: dict[str, Any] = {"kl": self.kl, "perplexity_full_precision": self.perplexity}
        if self.perplexity is not None:
            found["ppl_range"] = list(perplexity_range(self.kl, self.perplexity))
        if self.without:
            found["without"] = f"the rounding of the {' and the '.join(self.without)}"
        return found


def predict(
    known: Sensitivities | None,
    plans: Mapping[str, LayerPlan],
    recipe: Recipe,
    outer: OuterBits,
    tables: Mapping[str, NDArray[np.uint8]] | None = None,
) -> LossPrediction | None:
    """Predict the loss of quantizing everything at once by `recipe`; None without sensitivities.

    `tables`: bits of the rows of embedding and head. A layer whose plan does not match its table, as after an edit by
    hand, is left out.
    """
    if known is None:
        return None
    losses = predicted_losses(known, plans, recipe) | _row_losses(known, tables or {})
    return LossPrediction(losses, known.perplexity, tuple(outer.given))


def _row_losses(known: Sensitivities, tables: Mapping[str, NDArray[np.uint8]]) -> dict[str, float]:
    """Predicted loss of each part of a table."""
    found = {}
    for name, bits in tables.items():
        own = known.tables.get(name)
        if own is not None and len(bits) == len(own.order) and set(np.unique(bits).tolist()) <= set(own.widths):
            for width in np.unique(bits).tolist():
                found[part_name(name, width)] = float(own.expected([width])[bits == width].sum(dtype=np.float64))
    return found


def predicted_losses(known: Sensitivities, plans: Mapping[str, LayerPlan], recipe: Recipe) -> dict[str, float]:
    """Predicted loss of each layer in nats per token, as `predict` sums it."""
    losses, repaired = {}, recipe.needs.drift
    for name, plan in plans.items():
        widths, table = known.widths.get(name, ()), known.losses.get(name)
        if table is None or len(table) != len(plan.bits) or not set(plan.bits) <= set(widths):
            continue
        column = np.searchsorted(widths, plan.bits)
        factors = np.array(interaction_factors(widths, repaired))[column]
        losses[name] = float((factors * table[np.arange(len(column)), column]).sum(dtype=np.float64))
    return losses


def interaction_factors(widths: Sequence[int], repaired: bool = False) -> list[float]:
    """Return constant times factor for each width. `repaired`: later layers are solved to repair earlier ones."""
    constant = _REPAIRED if repaired else _CONSTANT
    return [constant * _FACTORS.get(bits, 1.0) for bits in widths]


def perplexity_range(kl: float, perplexity: float) -> tuple[float, float]:
    """Range of perplexities for a predicted KL: on the same text, cross-entropy rises by about the KL."""
    low, high = (min(700.0, math.log(perplexity) + bound * kl) for bound in RANGE)
    return math.exp(low), math.exp(high)
