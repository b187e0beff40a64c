"""CMPQ-style channel-wise mixed precision (arXiv 2410.13056): any fractional budget, free levels per input channel.

1. bits per channel from activation norms: two adjacent widths meet every mean exactly;
2. O_act, the weights that contribute most to the output, leave the tables for half precision;
3. a table of 2^bits levels by one-dimensional k-means on the rest;
4. O_q, the weights whose rounding costs most at the output, leave too; the tables are fitted again.

Why "-style": the publication's method section was not reachable and there is no public code. Known are the channel
axis' idea, clustering, two kinds of outliers and 0.45 %; our choices are the input axis (the only one an input norm
can rank), the rule of two adjacent widths, the split of the outliers (0.45 % O_q, 0.05 % O_act), the fp16 levels.
Deviations, undone by `CMPQ.published()`: channels of a width share a table, with a gain each, where the publication
gives every channel its own (`codebook="channel"`), which on a layer of few rows costs more than the codes; rows have a
gain too where it pays (`row_gains="off"`); with `bpw`, outliers are left out where the same bytes are worth more as
bits (`outlier_choice="asked"`).
Never reproduced: Lloyd as the default, k-means is exact (`clustering="lloyd"`). Not offered: a codebook per output row,
Fisher weights. Weighting the clustering by the Hessian's diagonal changes nothing in a table of one channel, where it
is a constant; in a shared table it is `weighting`.

Options beyond the publication, off in `cmpq`: `compensation` and `allocation="error_table"`; `cmpq+` has the best of
them. docs/benchmarks.md has the figures.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from bitquilt.allocation.fractional import FULL_PALETTE, check_budget, check_palette
from bitquilt.core.budget import Budget
from bitquilt.core.recipe import Needs, PlanTerms
from bitquilt.core.types import Cost, Event, Layer, LayerPlan, LayerStats, Layout, Solution, check_finite
from bitquilt.layer.codebook_weight import LevelTables, TableScope, round_channels, sweep_channels
from bitquilt.layer.grids.codebook import Clustering
from bitquilt.layer.grids.uniform import scale_dtype_for
from bitquilt.layer.grouped_weight import layer_events, unprotected_event
from bitquilt.layer.hessian import factorize
from bitquilt.layer.layouts import channel_layout
from bitquilt.layer.outliers import ActivationRule, check_share
from bitquilt.layer.target import check_feedback, corrected
from bitquilt.recipes.cmpq.cmpq_budget import ChannelBudget
from bitquilt.recipes.cmpq.input_norms import Activations, Statistic, channel_norms
from bitquilt.recipes.cmpq.trial_losses import Trial, some_rows

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float8": torch.float8_e4m3fn,
}
_FLOAT8_SAFE = (0.125, 448.0)  # largest weight: below, most levels fall under 2^-6, where float8_e4m3 loses digits


@dataclass(frozen=True)
class CMPQ:
    """`bits`: nominal mean, any real number the palette reaches; `bpw`: instead, true bits per weight of every layer
    with everything stored, met from below to one channel, the rest spent on O_q.

    `statistic`: a_j as the L2 norm of the channel's inputs over all tokens, or their mean or largest absolute value
    over a sample of the tokens. `error_outliers`, `act_outliers`: shares of the weights in O_q and O_act; `act_rule`
    "column" protects whole channels; `outlier_choice`: with `bpw`, "measured" = bits instead where that loses less,
    "asked" = these shares. `swap`: share of the channels that gain a bit, and as many lose one (where
    the palette has room on both sides).
    `allocation`: "norm"; "first" = the first channels, whatever their norms (to see what norms are worth);
    "error_table" = least sum of a_j^2 |w_j - Q_b(w_j)|^2 over widths next to the mean; "global" = channels of the whole
    model share one budget, which needs a plan (`bitquilt.quantize` makes it).
    `codebook`: "shared" = one table per width and a float8 gain per channel; "channel" = a table per channel.
    `codebook_dtype`: of the tables, "auto" = float16 unless the weights leave its range; "float8" halves the tables of
    "channel". `row_gains`: a float8 factor per row of shared tables; "auto" = with `bpw` in layers where it saves more
    than its bytes would as bits, else in every layer. `clustering`: "uniform" = equal steps. `iterations`: of Lloyd.
    `weighting`: of the channels in a shared table, by what their errors cost or not at all.
    `compensation`: errors are repaired by later channels as in GPTQ, levels fitted on what is then there;
    `act_order`: in descending norm; `damp` as in GPTQ; `alpha`, `stream_alpha`: the share of earlier layers' error that
    a layer repairs beside its own (`solvers.target`).
    """

    name: ClassVar[str] = "cmpq"
    fractional: ClassVar[bool] = True

    bits: float = 3.0
    bpw: float | None = None
    statistic: Statistic = "l2"
    error_outliers: float = 0.0045
    act_outliers: float = 0.0005
    act_rule: ActivationRule = "weight"
    outlier_choice: Literal["measured", "asked"] = "measured"
    swap: float = 0.0
    palette: tuple[int, ...] = FULL_PALETTE
    allocation: Literal["norm", "first", "error_table", "global"] = "norm"
    codebook: TableScope = "shared"
    codebook_dtype: Literal["auto", "float16", "bfloat16", "float32", "float8"] = "auto"
    row_gains: Literal["auto", "on", "off"] = "auto"
    clustering: Clustering = "exact"
    iterations: int = 50
    weighting: Literal["column", "none"] = "column"
    compensation: bool = False
    act_order: bool = True
    damp: float = 0.01
    alpha: float = 0.0
    stream_alpha: float = 0.0

    @property
    def needs(self) -> Needs:
        """The Hessian and a sample of the tokens, with a full-precision target the drift of the inputs."""
        repairs = bool(self.alpha or self.stream_alpha)
        return Needs(hessian=True, sample=True, drift=repairs, stream_drift=bool(self.stream_alpha))

    @property
    def plan_terms(self) -> PlanTerms:
        """Single channels at the recipe's mean, `bits` or `bpw`."""
        budget = Budget.of(bits=self.bits) if self.bpw is None else Budget.of(bpw=self.bpw)
        return PlanTerms(1, budget, plan_required=self.allocation == "global")

    @classmethod
    def published(cls, bits: float = 3.0) -> Self:
        """What is known of the publication, and our reading of the rest."""
        return cls(bits=bits, codebook="channel", row_gains="off", outlier_choice="asked", allocation="norm",
                   compensation=False)  # fmt: skip

    def check(self) -> None:
        """Raise ValueError naming the first field that cannot work, before any layer is read."""
        check_palette(self.palette)
        if self.bpw is None:
            check_budget(self.bits, self.palette)
        elif not self.bpw > 0:
            raise ValueError(f"bpw is {self.bpw}; wanted true bits per weight above 0, such as 2.5")
        check_share(error_outliers=self.error_outliers, act_outliers=self.act_outliers)
        if not 0 <= self.swap <= 0.5:
            raise ValueError(f"swap is {self.swap}; wanted a share of the channels from 0 to 0.5")
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}; wanted at least 1")
        if self.codebook == "shared" and self.codebook_dtype == "float8":
            raise ValueError("codebook_dtype float8 goes with codebook=channel: a shared table costs next to nothing")
        if self.codebook == "channel" and self.row_gains == "on":
            raise ValueError("row_gains goes with codebook=shared: a channel's own table knows its rows")
        check_feedback(self.alpha, self.stream_alpha)
        if (self.alpha or self.stream_alpha) and not self.compensation:
            raise ValueError("alpha and stream_alpha go with compensation=true: they need the factor of the Hessian")

    def check_layers(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ValueError naming the first layer, `[out, in]` by path, that cannot have `bpw`, and what all can."""
        self.check()
        self._budget().check_layers(shapes)

    def prepare(self, stats: LayerStats | None) -> Activations:
        """Norms of the channels, and with compensation the factor. Raises ValueError without finite statistics."""
        if stats is None:
            raise ValueError("the activation statistics are missing: this recipe needs calibration data")
        norms, events = channel_norms(stats, self.statistic)
        if not self.compensation:
            return Activations(norms, events=events)
        order = stats.hessian.diagonal().argsort(descending=True, stable=True) if self.act_order else None
        return Activations(norms, factorize(stats.hessian / stats.tokens, self.damp, order), events)

    def measure(self, layer: Layer, prepared: Activations) -> Cost:
        """The ways to divide the budget between bits and outliers, most outliers first; losses are sums of
        cost_j |w_j - Q(w_j)|^2. Raises ValueError if the budget is out of the layer's reach."""
        if self.allocation == "global":
            raise ValueError("a global allocation is a plan for the whole model: give this layer's part of it")
        out_features, in_features = layer.weight.shape
        trial = self._trial(prepared)
        asked = self._budget_of(layer, trial)
        asked.check_reach(out_features, in_features)
        candidates = asked.candidates()
        budgets = [b for b in candidates if b.reaches(out_features, in_features)] or candidates[-1:]
        plans = list(dict.fromkeys(LayerPlan(self._bits(layer, prepared, trial, budget), 1) for budget in budgets))
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

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Activations) -> Solution:
        """Cluster, protect, cluster again. Raises ValueError naming the layer if a weight is NaN or Inf."""
        check_finite(layer.name, weight=layer.weight)
        trial = self._trial(prepared)
        budget = self._budget_of(layer, trial)
        widest = budget.widest(len(layer.weight))
        bits = [min(b, widest) for b in plan.bits]
        events = [Event(layer.name, kind, detail) for kind, detail in prepared.events]
        if max(plan.bits) > widest or (self.bpw is None and self.bits > widest):
            asked = max(*plan.bits, self.bits)
            detail = f"{len(layer.weight)} rows need at most {widest} bits per channel; asked: {asked:g}"
            events.append(Event(layer.name, "more levels than rows", detail))
        act, error = budget.outliers(len(layer.weight), bits)
        if unprotected := unprotected_event(layer.name, layer.weight, act, error):
            events += unprotected
            act = error = 0
        if prepared.factor is None:
            protected, loss, aim = trial.protected(layer.weight, bits, budget.tables, (act, error)), None, None
            stored, _ = round_channels(layer.weight, bits, budget.tables, protected, trial.importance)
        else:
            target, notes = corrected(layer, prepared.factor, self.alpha, self.stream_alpha)
            events += notes
            weight = target.weight.masked_fill(prepared.factor.dead, 0.0)
            protected = trial.protected(weight, bits, budget.tables, (act, error))
            stored, loss, aim = sweep_channels(
                weight, bits, budget.tables, protected, trial.importance, prepared.factor
            )
        events += layer_events(layer, budget.tables.dtype, prepared.factor, self.damp)
        return Solution(stored, loss, tuple(events), {} if aim is None else {"aim": aim})

    def widths(self, out_features: int) -> tuple[int, ...]:
        """The palette; with a table per channel without widths of more levels than rows."""
        return self._budget().widths(out_features)

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """What a plan stores, with the asked-for shares of outliers."""
        budget = self._budget()
        return channel_layout(out_features, plan.bits, budget.tables, sum(budget.asked(out_features, in_features)))

    def rounded(self, layer: Layer, prepared: Activations, bits: int) -> Tensor:
        """Every channel at `bits`; weights as many as will be protected as they are. Fitted once: without the error
        outliers the levels would be a little better still, for twice the time."""
        trial = self._trial(prepared)
        budget = self._budget_of(layer, trial)
        plan = [bits] * layer.weight.shape[1]
        chosen, nearest = trial.tried(layer.weight, plan, budget.tables, budget.asked(*layer.weight.shape))
        return torch.where(chosen, layer.weight, nearest)

    def column_cost(self, layer: Layer, prepared: Activations) -> Tensor:
        """1 / U_jj^2 where later channels compensate, else E[x_j^2]."""
        if prepared.factor is not None:
            return prepared.factor.importance
        assert layer.stats is not None
        return layer.stats.hessian.diagonal() / layer.stats.tokens

    def _budget(self, dtype: torch.dtype | None = None, row_gains: bool | None = None) -> ChannelBudget:
        """With tables of `dtype`; without a layer, of the type that is asked for, and gains per row where no weight is
        asked whether they pay."""
        chosen = dtype or _DTYPES.get(self.codebook_dtype, torch.float16)
        if row_gains is None:
            row_gains = self.row_gains == "on" or (self.row_gains == "auto" and self.bpw is None)
        tables = LevelTables(self.codebook, self.clustering, self.iterations, chosen)
        if row_gains and self.codebook == "shared":
            tables = replace(tables, row_gain_dtype=tables.gain_dtype)
        return ChannelBudget(
            self.bits,
            self.bpw,
            tables,
            self.palette,
            self.swap,
            self.act_outliers,
            self.error_outliers,
            self.act_rule,
            self.outlier_choice == "measured",
        )

    def _budget_of(self, layer: Layer, trial: Trial) -> ChannelBudget:
        """The budget with what this layer's weights decide: the type of its tables, and whether its rows have gains."""
        dtype = self._dtype(layer.weight)
        if self.bpw is None or self.row_gains != "auto" or self.codebook == "channel":
            return self._budget(dtype)
        budget = self._budget(dtype, row_gains=True)
        least, most = budget.reach(*layer.weight.shape)
        middle = min(max(int(self.bpw), self.palette[0]), self.palette[-1])
        pays = least <= self.bpw <= most and trial.gain_per_row_pays(layer.weight, middle, budget.tables)
        return budget if pays else self._budget(dtype, row_gains=False)

    def _trial(self, prepared: Activations) -> Trial:
        importance = prepared.cost if self.weighting == "column" else None
        return Trial(prepared.norms, prepared.cost, importance, self.act_rule)

    def _dtype(self, weight: Tensor) -> torch.dtype:
        """Raises ValueError if the levels would not survive float8."""
        largest = float(weight.abs().max())
        if self.codebook_dtype == "float8" and largest and not _FLOAT8_SAFE[0] <= largest <= _FLOAT8_SAFE[1]:
            raise ValueError(
                f"the largest weight is {largest:.3g}; float8 levels need it within {_FLOAT8_SAFE[0]} .. "
                f"{_FLOAT8_SAFE[1]}; use codebook_dtype=float16"
            )
        return scale_dtype_for(weight) if self.codebook_dtype == "auto" else _DTYPES[self.codebook_dtype]

    def _bits(self, layer: Layer, prepared: Activations, trial: Trial, budget: ChannelBudget) -> tuple[int, ...]:
        out_features, in_features = layer.weight.shape
        total = budget.total(out_features, in_features)
        if self.allocation == "error_table":
            check_finite(layer.name, weight=layer.weight)
            middle = total // in_features  # widths from one below to two above the mean
            widths = [b for b in budget.widths(out_features) if middle - 1 <= b <= middle + 2]
            table = trial.table(layer.weight, widths, budget.tables, self.act_outliers)
            return budget.least_error(table, widths, out_features, total, prepared.norms.tolist())
        norms = [0.0] * in_features if self.allocation == "first" else prepared.norms.tolist()
        return budget.spread(norms, out_features, total)
