"""MG-PTQ-style mixed precision (arXiv 2501.18154, ICASSP 2025): bits per column from a graph over the columns.

1. e_j(b): the loss that unit j (a column group, or a column) adds to the sweep at b bits, tabulated with the quantizer
   of the final weight;
2. the map: exact for the table, or on request from a small graph network over the graph of the inverse Hessian, which
   learns the exact map and is then trained, as published, on the loss after the sweep of the plans that it samples,
   until a stopping rule ends it;
3. a GPTQ sweep with bits per unit. The table ignores compensation, so the chosen allocator's map and, where the mean is
   whole, uniform bits are both swept and the better is kept. The report shows every map that was made.

Why "-style": sizes, losses and tables of the publication were not reachable and there is no public code. Published: a
graph network over columns, edges of second order, an average-bit constraint, gradients through the rounding of bits.
Ours: one budget for the whole model, in groups or columns, by the tables of loss that all recipes share.
Deviations: column groups by default, because kernels need groups; the exact map first, and in the loop the score
function's gradient instead of one through the rounding of bits; an exact budget; a network per layer, because the loop
holds one block in memory; the exact allocator is the default, since no network can beat it on the table, and what the
sweeps in the loop win takes tens of them for each layer. The settings are those of `graph_network.GraphTraining`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from bitquilt.allocation.graph_network import GraphTraining, graph_bits
from bitquilt.allocation.knapsack import best_bits, greedy_bits, table_error
from bitquilt.core.budget import Budget
from bitquilt.core.recipe import Needs, PlanTerms
from bitquilt.core.training import Training
from bitquilt.core.types import (
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
from bitquilt.layer.grids.uniform import RangeSearch, UniformGrid, fit, scale_dtype_for
from bitquilt.layer.grouped_weight import layer_events, live_weight
from bitquilt.layer.hessian import Factor, check_damp, factorize
from bitquilt.layer.layouts import check_group_size, grouped_layout
from bitquilt.layer.nearest import round_groups
from bitquilt.layer.sensitivity.column_graph import adjacency, column_features
from bitquilt.recipes.shared.clipping import ClippingMode, clipping_training
from bitquilt.recipes.shared.traits import Traits, check_mean, check_palette

_COLUMNS = 1  # group size of a plan with bits per column
_NEIGHBOURS = 16  # strongest edges of each unit in the graph
_SYMMETRIC = (1,)  # widths that store no zero


@dataclass(frozen=True)
class MGPTQ:
    """Options of MG-PTQ. KL figures: babyllama, 3 bits, groups of 32 unless said (docs/lab/mg-ptq.md).

    `bits`: mean of the codes' widths, any number within the palette; met exactly from below.
    `group_size`: input columns that share a scale and a zero.
    `damp`: added to the Hessian's diagonal, as a share of its mean; 0.01 as in GPTQ.
    `palette`: widths that a unit may have, ascending.
    `allocator`: "exact", KL 0.0692; "graph" trains the network, 0.0695; "best" makes both maps and keeps the one of
    least swept loss.
    `granularity`: "group", KL 0.0692 at 3.594 bits per weight; "column" as published, 0.0722 at 3.654: a permutation
    gathers columns of equal bits, and groups of `group_size` are cut inside each width.
    `clipping`: "trained" trains the ranges of each block after the sweep; codes and bytes stay. At 2 bits on
    stories260k: KL 2.003 to 1.508.
    """

    name: ClassVar[str] = "mg-ptq"
    traits: ClassVar[Traits] = Traits(fractional=True)

    bits: float = 2.0
    group_size: int = 128
    damp: float = 0.01
    palette: tuple[int, ...] = (1, 2, 3, 4)
    allocator: Literal["exact", "graph", "best"] = "exact"
    granularity: Literal["group", "column"] = "group"
    clipping: ClippingMode = "solved"

    @property
    def needs(self) -> Needs:
        """The Hessian, tokens, and the block's outputs if clipping is trained."""
        return Needs(hessian=True, sample=True, full_outputs=self.clipping == "trained")

    @property
    def plan_terms(self) -> PlanTerms:
        """Column groups, or columns, at the recipe's mean."""
        return PlanTerms(self._plan_size(), Budget("bits", self.bits), own_widths=self.palette)

    def check(self) -> None:
        """Raise ValueError naming the first field that cannot work, before any layer is read."""
        check_palette(self.palette, MIN_BITS)
        check_mean(self.bits, self.palette)
        check_group_size(self.group_size)
        check_damp(self.damp)

    def prepare(self, stats: LayerStats | None) -> Factor:
        """Factor the Hessian once for all layers that read this input."""
        assert stats is not None
        return factorize(stats.hessian / stats.tokens, self.damp)

    def measure(self, layer: Layer, prepared: Factor) -> Cost:
        """The allocator's maps, and uniform bits where the mean is whole, with the swept loss of each.

        Raises ValueError naming the unit whose error is not finite.
        """
        weight = live_weight(layer, prepared)
        columns = weight.shape[1]
        budget = math.floor(self.bits * columns + 1e-9)
        table, units = self._table(layer, weight, prepared, budget)
        widths = [unit.stop - unit.start for unit in units]
        errors = table.tolist()
        plan_of = partial(LayerPlan, group_size=self._plan_size())
        loss_of = cache(lambda plan: self._solved(layer, plan, prepared)[1])
        maps = {"exact": best_bits(errors, self.palette, widths, budget)}
        if self.allocator != "exact":
            features = column_features(weight, _stats(layer), prepared, units)
            graph = adjacency(prepared.upper, units, _NEIGHBOURS)
            maps["graph"] = graph_bits(
                table,
                self.palette,
                widths,
                budget,
                features,
                graph,
                training=GraphTraining(),
                swept=lambda bits: loss_of(plan_of(bits)),
            )
        relaxed = greedy_bits(errors, self.palette, widths, budget)
        if float(self.bits).is_integer() and int(self.bits) in self.palette:
            maps["uniform"] = uniform_plan(columns, int(self.bits), self._plan_size()).bits
        plans = {name: plan_of(bits) for name, bits in maps.items()}
        losses = {name: loss_of(plan) for name, plan in plans.items()}
        compared = {**maps, "lagrangian": relaxed}
        tabulated = {name: table_error(errors, self.palette, bits) for name, bits in compared.items()}
        if self.allocator == "graph":
            del plans["exact"]  # in the report only
        details = {"table_error": tabulated, "swept_loss": losses}
        return Cost(tuple(plans.values()), tuple(losses[name] for name in plans), details)

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """The map of least swept loss; an earlier map wins a tie."""
        return cost.plans[cost.losses.index(min(cost.losses))]

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Factor) -> Solution:
        """Sweep the layer with the plan's bits. Raises ValueError naming the layer if a weight is NaN or Inf."""
        stored, loss = self._solved(layer, plan, prepared)
        scale_dtype = scale_dtype_for(live_weight(layer, prepared))
        return Solution(stored, loss, layer_events(layer, scale_dtype, prepared, self.damp))

    @property
    def training(self) -> Training:
        """Trained clipping on request."""
        return clipping_training(self.clipping)

    def widths(self, out_features: int) -> tuple[int, ...]:
        """The palette."""
        return self.palette

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """The layout in which `quantize` stores a plan. Columns are cut into groups inside each width, widest first."""
        if plan.group_size != _COLUMNS:
            return grouped_layout(out_features, in_features, plan.bits, plan.group_size, symmetric=_SYMMETRIC)
        bits = np.asarray(plan.bits)
        counts = np.bincount(bits)
        segments = tuple(
            (Format(b, self.group_size, symmetric=b in _SYMMETRIC), int(counts[b]))
            for b in np.flatnonzero(counts)[::-1].tolist()
        )
        mixed = bool((np.diff(bits) > 0).any())
        return Layout(out_features, in_features, segments, "map" if mixed else "identity", int(mixed))

    def rounded(self, layer: Layer, prepared: Factor, bits: int) -> Tensor:
        """The weight with every group at `bits`; a column's neighbours stand in for its group."""
        return round_groups(live_weight(layer, prepared), bits, self.group_size, prepared.importance)

    def column_cost(self, layer: Layer, prepared: Factor) -> Tensor:
        """1 / U_jj^2: later columns compensate."""
        return prepared.importance

    def _plan_size(self) -> int:
        return _COLUMNS if self.granularity == "column" else self.group_size

    def _fit(self, columns: Tensor, bits: int, importance: Tensor, scale_dtype: torch.dtype) -> UniformGrid:
        return fit(columns, bits, importance, search=RangeSearch(), scale_dtype=scale_dtype)

    def _errors(self, weight: Tensor, groups: Sequence[slice], importance: Tensor) -> Tensor:
        """Cost of every column at every width when quantized in `groups`, fp64 `[in, |palette|]`."""
        scale_dtype = scale_dtype_for(weight)
        found = torch.empty(weight.shape[1], len(self.palette), dtype=torch.float64, device=weight.device)
        for group in groups:
            part, cost = weight[:, group], importance[group]
            for i, bits in enumerate(self.palette):
                error = part - self._fit(part, bits, cost, scale_dtype).quantize(part)
                found[group, i] = error.double().square().sum(dim=0) * cost.double()
        return found

    def _table(self, layer: Layer, weight: Tensor, factor: Factor, budget: int) -> tuple[Tensor, list[slice]]:
        """e_j(b) fp64 `[units, |palette|]` and the units.

        Columns have neither order nor groups before they have bits, so they take two tables. The first weighs errors
        by 1 / [H^-1]_jj in groups of columns of equal energy, which bits will gather (with neighbours as groups, large
        columns spoil the table of small ones). The second has the order and groups that the first one's map gives.
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
    """Columns `[in]` sorted by falling bits, stable, and the groups cut inside each width with their bits; the last
    group of a width may be narrower."""
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
    """One segment per width with its columns in the sweep's order, which the map of the columns undoes."""
    segments = []
    for width in dict.fromkeys(bits for _, bits in cut):
        members = [k for k, (_, bits) in enumerate(cut) if bits == width]
        columns = slice(cut[members[0]][0].start, cut[members[-1]][0].stop)
        segments.append(UniformGrid.segment([swept.grids[k] for k in members], swept.codes[:, columns], group_size))
    sorted_already = bool((order.diff() > 0).all())
    return QuantizedWeight(tuple(segments), None if sorted_already else Permutation(order, 1))
