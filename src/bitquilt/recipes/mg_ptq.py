"""MG-PTQ-style mixed precision (arXiv 2501.18154, ICASSP 2025): bits per column from a graph over the columns.

1. e_j(b): what unit j (a column group, or a column) adds to the sweep's loss at b bits, tabulated with the quantizer
   that is used in the end;
2. the map: exact for the table (dynamic program, or Lagrange multiplier and repair), or a small graph network trained
   on the table over the graph of the inverse Hessian, brought to the exact budget;
3. a GPTQ sweep with bits per unit. All maps are swept before one is chosen, for the table ignores compensation: the
   chosen allocator's map and, where the mean is whole, uniform bits; the better stays. The report shows all.

Why "-style": sizes, losses and tables of the publication were not reachable and there is no public code. Published: a
graph network over columns, edges of second order, an average-bit constraint, gradients through the rounding of bits.
Beyond it: one budget for the whole model, in groups or columns, by the tables of loss that all recipes share.
Deviations: column groups by default (`granularity="column"` for columns), because kernels need groups; an exact
gradient by way of the table; an exact budget; a network per layer, because the loop holds one block in memory; the
exact allocator is the default, since on the table no network can beat it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from bitquilt.allocation.graph_network import GraphTraining, graph_bits
from bitquilt.allocation.knapsack import best_bits, table_error
from bitquilt.core.budget import Budget
from bitquilt.core.recipe import Needs, PlanTerms
from bitquilt.core.types import (
    MAX_BITS,
    MIN_BITS,
    Cost,
    Format,
    Layer,
    LayerPlan,
    LayerStats,
    Layout,
    Permutation,
    QuantizedWeight,
    Solution,
    group_slices,
    uniform_plan,
)
from bitquilt.layer.assembly import assemble
from bitquilt.layer.gptq_sweep import Sweep, sweep
from bitquilt.layer.grids.uniform import OneBitRule, RangeSearch, UniformGrid, fit, scale_dtype_for, symmetric_widths
from bitquilt.layer.grouped_weight import layer_events, live_weight
from bitquilt.layer.hessian import Factor, factorize
from bitquilt.layer.layouts import grouped_layout
from bitquilt.layer.nearest import round_groups
from bitquilt.layer.sensitivity.column_graph import adjacency, column_features
from bitquilt.recipes.shared.clipping import TrainedClipping

_COLUMNS = 1  # group size of a plan with bits per column


@dataclass(frozen=True)
class MGPTQ(TrainedClipping):
    """`bits`: nominal mean, any number within the palette; met exactly from below. `allocator`: "exact" or "graph";
    "best" keeps whichever map has the least swept loss. `granularity`: "group", or "column": a permutation gathers
    columns of equal bits, groups of `group_size` are cut inside each width. `one_bit`: the two levels of 1-bit groups.
    `seed`, `steps`, `width`, `learning_rate`, `budget_weight`, `top`, `straight_through`: of the graph network.
    `clipping` and the rest of its training: `recipes.clipping`.
    """

    name: ClassVar[str] = "mg-ptq"
    fractional: ClassVar[bool] = True

    bits: float = 2.0
    group_size: int = 128
    damp: float = 0.01
    palette: tuple[int, ...] = (1, 2, 3, 4)
    allocator: Literal["exact", "graph", "best"] = "exact"
    granularity: Literal["group", "column"] = "group"
    one_bit: OneBitRule = "symmetric"
    top: int = 16
    width: int = 64
    steps: int = 200
    learning_rate: float = 1e-3
    budget_weight: float = 5.0
    straight_through: bool = True
    seed: int = 0

    @property
    def needs(self) -> Needs:
        """Hessian and tokens, and the block's outputs to train clipping."""
        return Needs(hessian=True, sample=True, full_outputs=bool(self.train_batch))

    @property
    def plan_terms(self) -> PlanTerms:
        """Column groups, or columns, at the recipe's mean."""
        return PlanTerms(self._plan_size(), Budget("bits", self.bits))

    def check(self) -> None:
        """Raise ValueError naming the first field that cannot work, before any layer is read."""
        super().check()
        if not self.palette or list(self.palette) != sorted(set(self.palette)):
            raise ValueError(f"palette is {self.palette}; wanted ascending bits, each once, such as (1, 2, 3, 4)")
        if not MIN_BITS <= self.palette[0] <= self.palette[-1] <= MAX_BITS:
            raise ValueError(f"palette is {self.palette}; a code takes {MIN_BITS} to {MAX_BITS} bits")
        if not self.palette[0] <= self.bits <= self.palette[-1]:
            raise ValueError(f"bits is {self.bits:g}; the palette {self.palette} reaches {self.palette[0]} to "
                             f"{self.palette[-1]}")  # fmt: skip
        for name, least in (("top", 1), ("width", 1), ("steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted at least {least}")
        if not (self.learning_rate > 0 and self.budget_weight >= 0):
            raise ValueError("learning_rate has to be above 0 and budget_weight at least 0")

    def prepare(self, stats: LayerStats | None) -> Factor:
        """Factor the Hessian once for all layers that read this input."""
        assert stats is not None
        return factorize(stats.hessian / stats.tokens, self.damp)

    def measure(self, layer: Layer, prepared: Factor) -> Cost:
        """The maps of both allocators, and of uniform bits where the mean is whole, with the swept loss of each.

        Raises ValueError naming the unit whose error is not finite.
        """
        weight = live_weight(layer, prepared)
        columns = weight.shape[1]
        budget = math.floor(self.bits * columns + 1e-9)
        table, units = self._table(layer, weight, prepared, budget)
        widths = [unit.stop - unit.start for unit in units]
        errors, size = table.tolist(), self._plan_size()
        maps = {"exact": best_bits(errors, self.palette, widths, budget)}
        features = column_features(weight, _stats(layer), prepared, units)
        training = GraphTraining(self.width, self.steps, self.learning_rate, self.budget_weight,
                            hard=self.straight_through, seed=self.seed)  # fmt: skip
        graph = adjacency(prepared.upper, units, self.top)
        maps["graph"] = graph_bits(table, self.palette, widths, budget, features, graph, training)
        relaxed = best_bits(errors, self.palette, widths, budget, exact=False)
        tabulated = {name: table_error(errors, self.palette, bits) for name, bits in maps.items()}
        tabulated["lagrangian"] = table_error(errors, self.palette, relaxed)
        plans = [LayerPlan(bits, size) for bits in maps.values()]
        if float(self.bits).is_integer() and int(self.bits) in self.palette:
            plans.append(uniform_plan(columns, int(self.bits), size))
            tabulated["uniform"] = table_error(errors, self.palette, plans[-1].bits)
        swept = {plan.bits: self._solved(layer, plan, prepared)[1] for plan in dict.fromkeys(plans)}
        losses = tuple(swept[plan.bits] for plan in plans)
        names = [*maps, "uniform"][: len(plans)]
        details = {"table_error": tabulated, "swept_loss": dict(zip(names, losses, strict=True))}
        return Cost(tuple(plans), losses, details)

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """Least swept loss of the chosen allocator's map and uniform bits; an earlier map wins a tie."""
        if len(cost.plans) == 1:
            return cost.plans[0]
        wanted = {"exact": (0, 2), "graph": (1, 2), "best": (0, 1, 2)}[self.allocator]
        best = min((i for i in wanted if i < len(cost.plans)), key=lambda i: cost.losses[i])
        return cost.plans[best]

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Factor) -> Solution:
        """Sweep the layer with the plan's bits. Raises ValueError naming the layer if a weight is NaN or Inf."""
        stored, loss = self._solved(layer, plan, prepared)
        scale_dtype = scale_dtype_for(live_weight(layer, prepared))
        return Solution(stored, loss, layer_events(layer, scale_dtype, prepared, self.damp))

    def widths(self, out_features: int) -> tuple[int, ...]:
        """The palette."""
        return self.palette

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """What a plan stores: of columns, groups are cut inside each width, the widest first."""
        symmetric = symmetric_widths(self.one_bit)
        if plan.group_size != _COLUMNS:
            return grouped_layout(out_features, in_features, plan.bits, plan.group_size, symmetric=symmetric)
        bits = np.asarray(plan.bits)
        counts = np.bincount(bits)
        segments = tuple(
            (Format(b, self.group_size, symmetric=b in symmetric), int(counts[b]))
            for b in np.flatnonzero(counts)[::-1].tolist()
        )
        mixed = bool((np.diff(bits) > 0).any())
        return Layout(out_features, in_features, segments, "map" if mixed else "identity", int(mixed))

    def rounded(self, layer: Layer, prepared: Factor, bits: int) -> Tensor:
        """Every group at `bits`; columns as if their neighbours were their group."""
        weight = live_weight(layer, prepared)
        return round_groups(weight, bits, self.group_size, prepared.importance, one_bit=self.one_bit)

    def column_cost(self, layer: Layer, prepared: Factor) -> Tensor:
        """1 / U_jj^2: later columns compensate."""
        return prepared.importance

    def _plan_size(self) -> int:
        return _COLUMNS if self.granularity == "column" else self.group_size

    def _fit(self, columns: Tensor, bits: int, importance: Tensor, scale_dtype: torch.dtype) -> UniformGrid:
        return fit(columns, bits, importance, search=RangeSearch(), one_bit=self.one_bit, scale_dtype=scale_dtype)

    def _errors(self, weight: Tensor, groups: Sequence[slice], importance: Tensor) -> Tensor:
        """Cost of every column at every width, fp64 `[in, |palette|]`, quantized in `groups`."""
        scale_dtype = scale_dtype_for(weight)
        found = torch.empty(weight.shape[1], len(self.palette), dtype=torch.float64, device=weight.device)
        for group in groups:
            part, cost = weight[:, group], importance[group]
            for i, bits in enumerate(self.palette):
                error = part - self._fit(part, bits, cost, scale_dtype).quantize(part)
                found[group, i] = error.double().square().sum(dim=0) * cost.double()
        return found

    def _table(self, layer: Layer, weight: Tensor, factor: Factor, budget: int) -> tuple[Tensor, list[slice]]:
        """e_j(b) fp64 `[units, |palette|]` and the units. Columns have no order and no groups before they have bits:
        their first table weighs by 1 / [H^-1]_jj, in groups of equal energy, for bits will gather such columns (with
        neighbours as groups, large columns spoil the table of small ones); the second in the sweep's order and groups.
        """
        groups = group_slices(weight.shape[1], self.group_size)
        if self.granularity == "group":
            errors = self._errors(weight, groups, factor.importance)
            return torch.stack([errors[group].sum(dim=0) for group in groups]), groups
        importance = factor.inverse_diagonal.reciprocal()
        order = torch.argsort(weight.square().sum(dim=0) * importance, descending=True, stable=True)
        first = _restored(self._errors(weight[:, order], groups, importance[order]), order)
        units = group_slices(weight.shape[1], _COLUMNS)
        order, cut = _by_bits(best_bits(first.tolist(), self.palette, [1] * len(units), budget), self.group_size)
        order = order.to(weight.device)
        importance = self._permuted(layer, order).importance
        return _restored(self._errors(weight[:, order], [group for group, _ in cut], importance), order), units

    def _permuted(self, layer: Layer, order: Tensor) -> Factor:
        stats = _stats(layer)
        return factorize(stats.hessian[order][:, order] / stats.tokens, self.damp)

    def _solved(self, layer: Layer, plan: LayerPlan, factor: Factor) -> tuple[QuantizedWeight, float]:
        """The swept weight and its loss."""
        weight = live_weight(layer, factor)
        scale_dtype = scale_dtype_for(weight)
        order: Tensor | None = None
        cut = list(zip(group_slices(weight.shape[1], plan.group_size), plan.bits, strict=True))
        if plan.group_size == _COLUMNS:
            order, cut = _by_bits(plan.bits, self.group_size)
            order = order.to(weight.device)
            factor = self._permuted(layer, order)
            weight = weight[:, order]
        importance = factor.importance

        def fit_group(k: int, columns: Tensor) -> UniformGrid:
            group, bits = cut[k]
            return self._fit(columns, bits, importance[group], scale_dtype)

        swept = sweep(weight, factor.upper, [group for group, _ in cut], fit_group)
        if order is None:
            return assemble(swept, plan), swept.loss
        return _assemble_columns(swept, cut, order, self.group_size), swept.loss


def _stats(layer: Layer) -> LayerStats:
    assert layer.stats is not None
    return layer.stats


def _restored(errors: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(errors).index_copy_(0, order, errors)


def _by_bits(bits: Sequence[int], group_size: int) -> tuple[Tensor, list[tuple[slice, int]]]:
    """Columns sorted by bits, highest first, equal ones in their order `[in]`; and the groups cut inside each width,
    the last of each perhaps narrower, with their bits."""
    order = sorted(range(len(bits)), key=lambda j: -bits[j])
    cut: list[tuple[slice, int]] = []
    start = 0
    for width in sorted(set(bits), reverse=True):
        count = sum(b == width for b in bits)
        cut += [(slice(start + g.start, start + g.stop), width) for g in group_slices(count, group_size)]
        start += count
    return torch.tensor(order), cut


def _assemble_columns(
    swept: Sweep[UniformGrid],
    cut: Sequence[tuple[slice, int]],
    order: Tensor,
    group_size: int,
) -> QuantizedWeight:
    """One segment per width, the columns where the sweep had them; the map of the columns undoes the order."""
    segments = []
    for width in dict.fromkeys(bits for _, bits in cut):
        members = [k for k, (_, bits) in enumerate(cut) if bits == width]
        columns = slice(cut[members[0]][0].start, cut[members[-1]][0].stop)
        segments.append(UniformGrid.segment([swept.grids[k] for k in members], swept.codes[:, columns], group_size))
    sorted_already = bool((order.diff() > 0).all())
    return QuantizedWeight(tuple(segments), None if sorted_already else Permutation(order, 1))
