"""CMPQ-style channel-wise mixed precision (arXiv 2410.13056): any fractional budget, free levels per input channel.

1. bits per channel from activation norms: two adjacent widths meet every mean exactly;
2. O_act, the weights that contribute most to the output, leave the tables for half precision;
3. a table of 2^bits levels by one-dimensional k-means on the rest;
4. O_q, the weights whose rounding costs most at the output, leave too; the tables are fitted again.

Why "-style": the publication's method section was not reachable and there is no public code. The idea of the channel
axis, clustering, two kinds of outliers and 0.45 % are known. Our choices: the input axis (the only one that an input
norm can rank), two adjacent widths, the split of the outliers (0.45 % O_q, 0.05 % O_act), the fp16 levels.
Deviations, undone by `published=True`: channels of a width share a table, with a gain each, where the publication gives
every channel its own, which on a layer of few rows costs more than the codes; rows have a gain too, with `bpw` in
layers where it pays (30 % less KL on stories260k); with `bpw`, outliers are left out where the same bytes are worth
more as bits (with them all, stories260k has 37 % more KL).
Never reproduced: Lloyd's algorithm; k-means is exact. Not offered: a codebook per output row, Fisher weights.
`cmpq+` adds compensation between channels. Figures: docs/lab/cmpq.md, 3 bits per weight, demo model unless said.

The parts: `input_norms` (1), `cmpq_budget` (sizes of every way to spend a budget), `trial_losses` (2, 4, and losses).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from bitquilt.allocation.fractional import FULL_PALETTE, check_budget
from bitquilt.allocation.fractional import check_palette as check_unbroken_palette
from bitquilt.core.budget import Budget
from bitquilt.core.recipe import Needs, PlanTerms
from bitquilt.core.training import Training
from bitquilt.core.types import Cost, Event, Layer, LayerPlan, LayerStats, Layout, Solution, check_finite
from bitquilt.layer.codebook_weight import LevelTables, round_channels
from bitquilt.layer.grids.uniform import scale_dtype_for
from bitquilt.layer.grouped_weight import layer_events, unprotected_event
from bitquilt.layer.layouts import channel_layout
from bitquilt.layer.outliers import check_share
from bitquilt.recipes.cmpq.cmpq_budget import ChannelBudget
from bitquilt.recipes.cmpq.input_norms import InputNorms, channel_norms
from bitquilt.recipes.cmpq.trial_losses import Trial, some_rows
from bitquilt.recipes.shared.traits import Traits, check_bpw

ChannelAllocation = Literal["norm", "error_table", "global"]


@dataclass(frozen=True, eq=False)
class ChannelPlan:
    """Bits per channel as stored, their tables, the sizes of O_act and O_q, and events so far."""

    bits: list[int]
    tables: LevelTables
    outliers: tuple[int, int]
    events: list[Event]


@dataclass(frozen=True)
class CMPQ:
    """Options of CMPQ.

    `bits`: mean of the codes' widths, any real number that the palette reaches.
    `bpw`: instead, true bits per weight of every layer with everything stored, met from below to one channel, the rest
    spent on O_q.
    `published`: a table per channel, no gains of rows, outliers as asked: KL 0.167 instead of 0.113 at 2.56 bits per
    weight, 1.91 instead of 0.978 on babyllama.
    `error_outliers`, `act_outliers`: shares of the weights in O_q and O_act; 0.5 % together takes 9 % off the KL.
    `palette`: widths a channel may have, ascending without a hole.
    `allocation`: "norm" = by activation norm, 16 to 22 % less KL than without regard to activations; "error_table" =
    least sum of cost_j |w_j - Q_b(w_j)|^2 over widths next to the mean, KL 0.0551 instead of 0.0599; "global" =
    channels of the whole model share one budget, 5 to 36 % less KL in 14 cases of 15, which needs a plan.
    """

    name: ClassVar[str] = "cmpq"
    traits: ClassVar[Traits] = Traits(
        fractional=True,
        own_allocations=get_args(ChannelAllocation),
        why_not_clipped="has free levels, which no range holds together: nothing to clip",
    )

    bits: float = 3.0
    bpw: float | None = None
    published: bool = False
    error_outliers: float = 0.0045
    act_outliers: float = 0.0005
    palette: tuple[int, ...] = FULL_PALETTE
    allocation: ChannelAllocation = "norm"

    @property
    def needs(self) -> Needs:
        """The Hessian, whose diagonal holds the norms."""
        return Needs(hessian=True)

    @property
    def training(self) -> Training:
        """No training."""
        return Training()

    @property
    def plan_terms(self) -> PlanTerms:
        """Single channels at the recipe's mean, `bits` or `bpw`."""
        budget = Budget.of(bits=self.bits) if self.bpw is None else Budget.of(bpw=self.bpw)
        middle, reach = int(self.bits), 1 if self.allocation == "norm" else 2
        near = [b for b in self.palette if middle + 1 - reach <= b <= middle + reach]
        own = tuple(near) if self.bpw is None else self.palette
        return PlanTerms(1, budget, plan_required=self.allocation == "global", own_widths=own, overshoot=1)

    def check(self) -> None:
        """Raise ValueError naming the first option that cannot work, before any layer is read."""
        check_unbroken_palette(self.palette)
        if self.bpw is None:
            check_budget(self.bits, self.palette)
        check_bpw(self.bpw)
        check_share(error_outliers=self.error_outliers, act_outliers=self.act_outliers)

    def check_layers(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ValueError naming the first layer, `[out, in]` by path, that cannot have `bpw`, and what all can."""
        self.check()
        self._budget().check_layers(shapes)

    def prepare(self, stats: LayerStats | None) -> InputNorms:
        """Norms of the channels. Raises ValueError without finite statistics."""
        return InputNorms(channel_norms(stats))

    def measure(self, layer: Layer, prepared: InputNorms) -> Cost:
        """The ways to divide the budget between bits and outliers, most outliers first; losses are sums of
        cost_j |w_j - Q(w_j)|^2. Raises ValueError if the budget is out of the layer's reach."""
        if self.allocation == "global":
            raise ValueError("a global allocation is a plan for the whole model: give this layer's part of it")
        out_features, in_features = layer.weight.shape
        trial = Trial(prepared.norms, prepared.cost)
        asked = self._budget_of(layer, trial)
        asked.check_reach(out_features, in_features)
        candidates = asked.candidates()
        budgets = [b for b in candidates if b.reaches(out_features, in_features)] or candidates[-1:]
        plans = list(dict.fromkeys(LayerPlan(self._bits(layer, trial, budget), 1) for budget in budgets))
        if len(plans) == 1:
            return Cost((plans[0],), (0.0,))
        check_finite(layer.name, weight=layer.weight)
        rows = some_rows(layer.weight)
        share, losses = len(rows) / out_features, []
        for plan in plans:
            act, error = asked.outliers(out_features, plan.bits)
            counts = round(share * act), round(share * error)
            losses.append(trial.loss(rows, plan.bits, asked.tables, counts) / share)
        return Cost(tuple(plans), tuple(losses))

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """The plan of least loss; the first wins a tie."""
        return cost.plans[cost.losses.index(min(cost.losses))]

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: InputNorms) -> Solution:
        """Cluster, protect, cluster again. Raises ValueError naming the layer if a weight is NaN or Inf."""
        trial = Trial(prepared.norms, prepared.cost)
        chosen = self._chosen(layer, plan, trial)
        protected = trial.protected(layer.weight, chosen.bits, chosen.tables, chosen.outliers)
        stored, _ = round_channels(layer.weight, chosen.bits, chosen.tables, protected, trial.cost)
        return Solution(stored, None, (*chosen.events, *layer_events(layer, chosen.tables.dtype)))

    def widths(self, out_features: int) -> tuple[int, ...]:
        """The palette; with a table per channel without widths of more levels than rows."""
        return self._budget().widths(out_features)

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """The layout in which `quantize` stores a plan, with the asked-for shares of outliers."""
        budget = self._budget()
        return channel_layout(out_features, plan.bits, budget.tables, sum(budget.asked(out_features, in_features)))

    def rounded(self, layer: Layer, prepared: InputNorms, bits: int) -> Tensor:
        """The weight with every channel at `bits` and the asked-for shares of outliers exact. Tables are fitted once:
        a second fit without the error outliers improves the levels a little for twice the time."""
        trial = Trial(prepared.norms, prepared.cost)
        budget = self._budget_of(layer, trial)
        plan = [bits] * layer.weight.shape[1]
        chosen, nearest = trial.tried(layer.weight, plan, budget.tables, budget.asked(*layer.weight.shape))
        return torch.where(chosen, layer.weight, nearest)

    def column_cost(self, layer: Layer, prepared: InputNorms) -> Tensor:
        """E[x_j^2]: nothing compensates an error."""
        assert layer.stats is not None
        return layer.stats.hessian.diagonal() / layer.stats.tokens

    def _budget(self, dtype: torch.dtype = torch.float16, row_gains: bool | None = None) -> ChannelBudget:
        """The budget with tables of `dtype`. `row_gains` None: gains for all rows unless a layer's weights decide."""
        tables = LevelTables("channel" if self.published else "shared", dtype=dtype)
        if (self.bpw is None if row_gains is None else row_gains) and not self.published:
            tables = replace(tables, row_gain_dtype=tables.gain_dtype)
        return ChannelBudget(
            self.bits,
            self.bpw,
            tables,
            self.palette,
            act_share=self.act_outliers,
            error_share=self.error_outliers,
            fewer=not self.published,
        )

    def _budget_of(self, layer: Layer, trial: Trial) -> ChannelBudget:
        """The budget with this layer's type of tables, and gains for its rows where they pay."""
        dtype = scale_dtype_for(layer.weight)
        if self.bpw is None or self.published:
            return self._budget(dtype)
        budget = self._budget(dtype, row_gains=True)
        least, most = budget.reach(*layer.weight.shape)
        middle = min(max(int(self.bpw), self.palette[0]), self.palette[-1])
        pays = least <= self.bpw <= most and trial.gain_per_row_pays(layer.weight, middle, budget.tables)
        return budget if pays else self._budget(dtype, row_gains=False)

    def _bits(self, layer: Layer, trial: Trial, budget: ChannelBudget) -> tuple[int, ...]:
        """Bits per channel by the recipe's allocation."""
        out_features, in_features = layer.weight.shape
        total, norms = budget.total(out_features, in_features), trial.norms.tolist()
        if self.allocation == "norm":
            return budget.spread(norms, out_features, total)
        check_finite(layer.name, weight=layer.weight)
        middle = total // in_features  # widths from one below to two above the mean
        widths = [b for b in budget.widths(out_features) if middle - 1 <= b <= middle + 2]
        table = trial.table(layer.weight, widths, budget.tables, self.act_outliers)
        return budget.least_error(table, widths, out_features, total, norms)

    def _chosen(self, layer: Layer, plan: LayerPlan, trial: Trial) -> ChannelPlan:
        """The plan as it is stored. Raises ValueError naming the layer if a weight is NaN or Inf."""
        check_finite(layer.name, weight=layer.weight)
        budget, rows = self._budget_of(layer, trial), len(layer.weight)
        widest = budget.widest(rows)
        bits, events = [min(b, widest) for b in plan.bits], []
        if max(plan.bits) > widest or (self.bpw is None and self.bits > widest):
            asked = max(*plan.bits, self.bits)
            detail = f"{rows} rows need at most {widest} bits per channel; asked: {asked:g}"
            events.append(Event(layer.name, "more levels than rows", detail))
        outliers = budget.outliers(rows, bits)
        if unprotected := unprotected_event(layer.name, layer.weight, *outliers):
            events += unprotected
            outliers = (0, 0)
        return ChannelPlan(bits, budget.tables, outliers, events)
