"""`LossTables` turns the statistics of a block's layers into loss tables: what each width of each group costs.

For recipes with one-bit groups it also tries each layer at one bit, since the statistics do not show what that costs.
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
from bitquilt.layer.sensitivity.kfac import corrected, tried_at_one_bit, width_losses
from bitquilt.model.linear import QuantizedLinear
from bitquilt.planning.sensitivities import has_one_bit
from bitquilt.stream.layers import preparing

_FLOOR, _LEAST = 1e-4, 1e-12  # least squared gradient of a row: share of the mean over the layer's rows, and absolute


class LossTables:
    """Loss tables, built block by block: `losses` fp32 `[groups, widths]` and `widths`, by layer.

    `tokens`: how many were measured. `first`: plans of the quantized model in which they were measured, if any.
    """

    def __init__(self, recipe: Plannable, tokens: int, first: Mapping[str, LayerPlan] | None = None) -> None:
        self.recipe, self.tokens, self.first, self.tries_one_bit = recipe, tokens, first, has_one_bit(recipe)
        self._prepare = preparing(recipe)
        self.losses: dict[str, NDArray[np.float32]] = {}
        self.widths: dict[str, tuple[int, ...]] = {}

    def add(
        self,
        weights: Mapping[str, Tensor],
        stats: Mapping[str, LayerStats],
        squares: Mapping[str, Tensor],
        made: Mapping[str, Sequence[float]],
    ) -> None:
        """Add the tables of a block's layers.

        `weights`: fp32 `[out, in]`. `squares`: summed squared gradient at each output `[out]`. `made`: sums of the
        squared first-order loss of errors, first of the layer's quantized weight, then of its weight at one bit.
        """
        # in reverse: what was prepared last for the one-bit trial, usually for the widest input, is still cached
        for name, weight in reversed(list(weights.items())):
            seen = stats[name]
            if seen.tokens == 0:  # an expert that no token reached: every channel counts the same, and very little
                seen = LayerStats(torch.eye(weight.shape[1], device=weight.device), 1)
            layer = Layer(name, weight, None, seen)
            prepared = self._prepare(seen)
            columns = self.recipe.column_cost(layer, prepared)
            rows = squares.get(name, weight.new_zeros(len(weight))).float() / self.tokens
            # a row or an expert that no token reached costs next to nothing, but enough that more bits are still a gain
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
                raise UserError(
                    f"the sensitivity of {name} is not finite: its gradients or inputs overflow; check the model, or "
                    f"leave the layer out with --skip {name}"
                )
            self.losses[name], self.widths[name] = table, widths
        self._prepare = preparing(self.recipe)  # drop everything cached for this block

    @torch.no_grad()
    def one_bit_errors(self, weights: Mapping[str, Tensor], stats: Mapping[str, LayerStats]) -> dict[str, Tensor]:
        """Error `[out, in]` of each weight solved at one bit, for layers that have that width and saw tokens."""
        errors, group_size = {}, self.recipe.plan_terms.unit_columns
        for name, weight in weights.items():
            seen = stats[name]
            if seen.tokens == 0 or min(self.recipe.widths(len(weight))) > 1:
                continue
            plan = uniform_plan(weight.shape[1], 1, group_size)
            try:
                solved = self.recipe.quantize(Layer(name, weight, None, seen), plan, self._prepare(seen))
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
