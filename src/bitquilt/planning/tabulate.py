"""What do a block's statistics say each width of its layers costs the loss? Tables(job, ...).add(...) per block.

Also what solving the layers at one bit really does to them, which is in none of the statistics.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitquilt.core.recipe import Plannable, RoundsInputs
from bitquilt.core.types import Layer, LayerPlan, LayerStats, uniform_plan
from bitquilt.errors import UserError
from bitquilt.layer.sensitivity.kfac import activation_rows, corrected, tried_at_one_bit, width_losses
from bitquilt.model.linear import QuantizedLinear
from bitquilt.planning.sensitivities import Method
from bitquilt.stream.job import Job
from bitquilt.stream.layers import preparing

_FLOOR, _LEAST = 1e-4, 1e-12  # of the mean squared gradient of the layer's rows; and in itself


def has_one_bit(recipe: Plannable) -> bool:
    """Whether a plan of `recipe` may hold one-bit groups."""
    return 1 in recipe.widths(2**10)


class Tables:
    """Turns the statistics of loaded layers into tables, layer by layer."""

    def __init__(
        self, job: Job, recipe: Plannable, method: Method, tokens: int, first: Mapping[str, LayerPlan] | None
    ) -> None:
        self.job, self.recipe, self.method, self.tokens = job, recipe, method, tokens
        self.first, self.tries = first, method == "kfac" and has_one_bit(recipe)
        self._prepare = preparing(job.recipe)
        self.losses: dict[str, NDArray[np.float32]] = {}
        self.widths: dict[str, tuple[int, ...]] = {}

    def add(
        self,
        weights: Mapping[str, Tensor],
        stats: Mapping[str, LayerStats],
        squares: Mapping[str, Tensor],
        made: Mapping[str, Sequence[float]],
    ) -> None:
        """`weights` fp32 `[out, in]`; sums over tokens: `squares`, the squared gradient at each output `[out]`, and
        `made`, the square of the loss's first order in the error that a stand-in made, then in that of one bit."""
        # backwards: what was prepared last to try one bit, as a rule for the widest input of a block, is still there
        for name, weight in reversed(list(weights.items())):
            seen = stats[name]
            if seen.tokens == 0:  # an expert no token reached: every channel counts the same, and very little
                seen = LayerStats(torch.eye(weight.shape[1], device=weight.device), 1)
            layer = Layer(name, weight, None, seen)
            prepared = self._prepare(seen)
            columns = self.recipe.column_cost(layer, prepared)
            if self.method == "activation":
                rows = activation_rows(weight, columns)
            else:
                rows = squares.get(name, weight.new_zeros(len(weight))).float() / self.tokens
                # a row or an expert that no token reached: next to nothing, but not so little that bits are no gain
                rows = rows.clamp_min(max(_FLOOR * float(rows.mean()), _LEAST))
            widths = self.recipe.widths(len(weight))
            try:
                table = self._table(layer, prepared, rows, columns).cpu().numpy()
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
            cost = [0.5 * value / self.tokens for value in made.get(name, ())]
            if self.first is not None and cost:
                table = corrected(table, widths, self.first[name].bits, cost.pop(0))
            if cost:
                table = tried_at_one_bit(table, cost.pop())
            if not np.isfinite(table).all():
                raise UserError(f"the sensitivity of {name} is not finite: its gradients or inputs overflow")
            self.losses[name], self.widths[name] = table, widths
        self._prepare = preparing(self.job.recipe)  # nothing of this block stays

    @torch.no_grad()
    def one_bit_errors(self, weights: Mapping[str, Tensor], stats: Mapping[str, LayerStats]) -> dict[str, Tensor]:
        """By layer the error `[out, in]` of its weight solved at one bit, where the recipe has that width and tokens
        reached the layer."""
        errors, group_size = {}, self.recipe.plan_terms.unit_columns
        for name, weight in weights.items():
            seen = stats[name]
            if seen.tokens == 0 or min(self.recipe.widths(len(weight))) > 1:
                continue
            plan = uniform_plan(weight.shape[1], 1, group_size)
            try:
                solved = self.job.recipe.quantize(Layer(name, weight, None, seen), plan, self._prepare(seen))
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
            solved_weight = QuantizedLinear.from_weight(solved.weight).dequantize()
            errors[name] = solved_weight.to(weight.device) - weight
        return errors

    def _table(self, layer: Layer, prepared: Any, rows: Tensor, columns: Tensor) -> Tensor:
        recipe, weight = self.recipe, layer.weight
        rounded, widths = partial(recipe.rounded, layer, prepared), recipe.widths(len(weight))
        group_size = recipe.plan_terms.unit_columns
        if not isinstance(recipe, RoundsInputs):
            return width_losses(weight, rounded, rows, columns, widths, group_size)
        inputs, order = partial(recipe.input_error, layer, prepared), recipe.column_order(layer, prepared)
        return width_losses(weight, rounded, rows, columns, widths, group_size, inputs=inputs, order=order)
