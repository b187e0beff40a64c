"""SliM-LLM: salience-driven mixed precision (arXiv 2405.14917, ICML 2025), the training-free method.

1. salience of each column group from the weights and the Hessian;
2. SBA: the p least salient groups get N-1 bits, the p most salient N+1; p minimises KL(P, Q) at the layer's output;
3. SQC: scale and zero of each group fitted with salience as the weight of the errors;
4. a GPTQ sweep over the mixed groups.

Deviations from the publication, each undone by `SlimLLM.published()`:
- the calibration really is weighted by salience (1 / U_jj^2 per column): the published loss is the plain error;
- tau in 0.4 .. 1.1 instead of 1 +- 0.1, exponent 2 instead of 2.4;
- p = 0 (uniform bits) is a candidate, and p = K/2; layers with fewer than four groups work;
- candidates are judged with the fitted quantizer, not with min-max; KL(P, Q) in fp32 with the bias on both sides;
- group salience is the mean over live columns, so a narrower last group is not ranked low for its width;
- one-bit groups hold the best pair of levels around zero and store no offset, so that a layer with one- and
  three-bit groups takes no more bytes than two bits everywhere; `one_bit="two_level"` stores the offset too.
Never reproduced: the public code's faults (a quantizer left in a symmetric state, a Hessian altered in place, half
precision statistics, an unstable sort).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from bitquilt.allocation.double_pointer import cheapest_within, raised_map, spread_evenly, within_budget
from bitquilt.allocation.knapsack import least_error
from bitquilt.core.budget import Budget
from bitquilt.core.packing import bits_per_weight
from bitquilt.core.recipe import Needs, PlanTerms
from bitquilt.core.types import Cost, Layer, LayerPlan, Layout, Solution, group_slices
from bitquilt.layer.grids.uniform import (
    MIN_MAX,
    PUBLISHED_SEARCH,
    OneBitRule,
    RangeSearch,
    UniformGrid,
    fit,
    scale_dtype_for,
    symmetric_widths,
)
from bitquilt.layer.grouped_weight import check_protection, live_weight, protected_count
from bitquilt.layer.hessian import Factor
from bitquilt.layer.layouts import GROUP_WIDTHS, WIDTHS_FROM_ONE, grouped_layout
from bitquilt.layer.nearest import COARSE
from bitquilt.layer.sensitivity.output_divergence import Objective
from bitquilt.layer.sensitivity.salience import GroupStatistic, SalienceRule, group_salience, salience
from bitquilt.layer.target import corrected
from bitquilt.recipes.shared.clipping import TrainedClipping
from bitquilt.recipes.shared.feedback import Feedback
from bitquilt.recipes.shared.pairing import RoundGroup, paired_menu


@dataclass(frozen=True)
class SlimLLM(TrainedClipping, Feedback):
    """`bits` N is the mean; groups hold N-1, N or N+1. See the module's text for every other field's reason.

    `bpw`: instead of `bits`, true bits per weight of every layer with everything stored, met from below to one group
    [ours, for budgets the publication does not reach]: N everywhere, N+1 for as many of the most salient groups as fit,
    the pairing on top.
    `allocation`: "sba" as published; "dp" = the least sum of tabulated group errors at the same mean (exact);
    "uniform" = N everywhere; "global" = groups of the whole model share one budget, which needs a plan made before the
    first layer is solved (`bitquilt.quantize` makes it). `search`: "wide" or "published" tau grid. `group_order`,
    `symmetric`, `alpha`, `stream_alpha` and `passes` as in GPTQ: with an alpha, salience and search see the corrected
    weight. `error_outliers`, `act_outliers`: shares of the weights kept in half precision beside the codes.
    `hessian`: of the layer's input, or "attention": of its errors' effect on the output of its sub-block (see
    `sensitivity.attention`), not with an alpha. `clipping` and the rest of its training: `recipes.clipping`.
    """

    name: ClassVar[str] = "slim-llm"

    bits: int = 2
    bpw: float | None = None
    group_size: int = 128
    salience: SalienceRule = "cholesky"
    group_statistic: GroupStatistic = "mean"
    allocation: Literal["sba", "dp", "uniform", "global"] = "sba"
    objective: Objective = "kl"
    candidates: Literal["all", "published"] = "all"
    candidate_quantizer: Literal["fitted", "min_max"] = "fitted"
    search: Literal["wide", "published"] = "wide"
    weighting: Literal["column", "none", "mask", "element"] = "column"
    mask_threshold: float = 2.0
    mask_factor: float = 4.0
    one_bit: OneBitRule = "symmetric"
    symmetric: bool = False
    error_outliers: float = 0.0
    act_outliers: float = 0.0
    hessian: Literal["input", "attention"] = "input"

    @property
    def needs(self) -> Needs:
        """What the sweep reads, tokens for the objective, and the block's outputs to train clipping."""
        return replace(
            super().needs,
            sample=True,
            full_outputs=bool(self.train_batch),
            output_hessian=self.hessian == "attention",
        )

    @property
    def plan_terms(self) -> PlanTerms:
        """Column groups at the recipe's mean, `bits` or `bpw`."""
        return PlanTerms(
            self.group_size,
            Budget.of(bits=self.bits) if self.bpw is None else Budget.of(bpw=self.bpw),
            plan_required=self.allocation == "global",
            searches_ranges=self.search == "wide",
        )

    def check(self) -> None:
        """Raise ValueError naming the field that cannot work."""
        super().check()
        self.check_sweep(self.hessian)
        check_protection(self.passes, error_outliers=self.error_outliers, act_outliers=self.act_outliers)

    @classmethod
    def published(cls, bits: int = 2, group_size: int = 128) -> Self:
        """What the public implementation computes, without its faults."""
        return cls(
            bits=bits,
            group_size=group_size,
            group_statistic="sum",
            objective="kl_reverse",
            candidates="published",
            candidate_quantizer="min_max",
            search="published",
            weighting="none",
            one_bit="code",
        )

    def measure(self, layer: Layer, prepared: Factor) -> Cost:
        """The objective of every candidate bit map: SBA's pairings, or the tabulated optimum beside uniform bits.

        One candidate, uniform bits, where there is nothing to search: one column group, a bit width at the end of
        the palette, or a layer whose input calibration never saw.
        """
        if self.allocation == "global":
            raise ValueError("a global allocation is a plan for the whole model: give this layer's part of it")
        in_features = layer.weight.shape[1]
        groups = group_slices(in_features, self.group_size)
        unseen = layer.stats is None or layer.stats.sample is None
        bits, raised = self._mean(*layer.weight.shape)
        if self.allocation == "uniform" or len(groups) == 1 or not 1 < bits < 8 or unseen:
            plan = LayerPlan(spread_evenly(len(groups), bits, raised), self.group_size)
            return Cost((plan,), (0.0,))
        layer, _ = corrected(layer, prepared, self.alpha, self.stream_alpha)
        weight = live_weight(layer, prepared)
        scale_dtype = scale_dtype_for(weight)
        fitter = self._fitter(weight, prepared, MIN_MAX if self.candidate_quantizer == "min_max" else None)

        def rounded(group: slice, bits: int) -> Tensor:
            return fitter(group, weight[:, group], bits, scale_dtype).quantize(weight[:, group])

        if self.allocation == "dp":
            return self._tabulated(weight, groups, prepared, rounded, bits, raised)
        return self._searched(layer, weight, groups, prepared, rounded, bits, raised)

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """The cheapest candidate within N bits per weight, or within the bits of the first, which has no pair; the
        fewest pairs win a tie."""
        if self.bpw is None:
            return cheapest_within(cost, in_features, self.bits)
        first = cost.plans[0]
        spent = sum(width * b for width, b in zip(first.widths(in_features), first.bits, strict=True))
        return cheapest_within(cost, in_features, spent / in_features)

    def check_layers(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ValueError naming the first layer, `[out, in]` by path, that cannot have `bpw`."""
        for name, shape in shapes.items():
            try:
                self._mean(*shape)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def _mean(self, out_features: int, in_features: int) -> tuple[int, int]:
        """N, and how many groups get N + 1: the most that are within `bpw`. Raises ValueError out of reach."""
        if self.bpw is None:
            return self.bits, 0
        count = len(group_slices(in_features, self.group_size))
        ends = []
        for total in range(8 * count, 2 * count - 1, -1):
            bits, raised = divmod(total, count)
            # the raised ones in front: a map and two widths, as whichever groups are raised will need
            plan = LayerPlan(tuple(bits + (k < raised) for k in range(count)), self.group_size)
            ends.append(bits_per_weight(self.layout(out_features, in_features, plan)))
            if ends[-1] <= self.bpw:
                return bits, raised
        raise ValueError(
            f"bpw is {self.bpw}; this {out_features} x {in_features} layer reaches {min(ends):.3f} and more"
        )

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Factor) -> Solution:
        """Sweep the layer with the plan's bits. Raises ValueError naming the layer if a weight is NaN or Inf."""
        outliers = (self.act_outliers, self.error_outliers)
        return self.swept(layer, plan, prepared, self._fitter, outliers=outliers)

    def widths(self, out_features: int) -> tuple[int, ...]:
        """1 to 8 bits."""
        return WIDTHS_FROM_ONE

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """What a plan stores."""
        symmetric = symmetric_widths(self.one_bit)
        if self.symmetric:
            symmetric |= set(GROUP_WIDTHS)
        count = protected_count((out_features, in_features), self.act_outliers, self.error_outliers)
        return grouped_layout(
            out_features, in_features, plan.bits, plan.group_size, symmetric=symmetric, outliers=count
        )

    def rounded(self, layer: Layer, prepared: Factor, bits: int) -> Tensor:
        """Every group at `bits`, fitted as SQC does with fewer candidates for the range."""
        weight = live_weight(layer, prepared)
        fitter = self._fitter(weight, prepared, MIN_MAX if self.search == "published" else COARSE)
        scale_dtype = scale_dtype_for(weight)
        groups = group_slices(weight.shape[1], self.group_size)
        parts = [fitter(g, weight[:, g], bits, scale_dtype).quantize(weight[:, g]) for g in groups]
        return torch.cat(parts, dim=1)

    def _fitter(self, original: Tensor, factor: Factor, search: RangeSearch | None = None) -> "_Fitter":
        if search is None:
            search = PUBLISHED_SEARCH if self.search == "published" else RangeSearch()
        return _Fitter(self, original, factor, search)

    def _searched(
        self,
        layer: Layer,
        weight: Tensor,
        groups: list[slice],
        factor: Factor,
        rounded: RoundGroup,
        bits: int,
        raised: int,
    ) -> Cost:
        """SBA: every pairing that the salience ranking allows, judged at the layer's output."""
        values = salience(weight, factor, self.salience)
        ranking = group_salience(values, groups, factor.dead, self.group_statistic).tolist()
        start = raised_map(ranking, bits, raised)
        menu = paired_menu(layer, weight, groups, ranking, rounded, bits, start, self.group_size, self.objective)
        if self.candidates == "published":
            # p = 0 stays where nothing else is left: the public code stops there with an error
            total = sum((g.stop - g.start) * b for g, b in zip(groups, start, strict=True))
            inner = [item for item in menu[1:-1] if within_budget(item[0], weight.shape[1], total / weight.shape[1])]
            menu = inner or menu[:1]
        return Cost(tuple(plan for plan, _ in menu), tuple(loss for _, loss in menu))

    def _tabulated(
        self, weight: Tensor, groups: list[slice], factor: Factor, rounded: RoundGroup, bits: int, raised: int
    ) -> Cost:
        """e_k(b) = sum over the group of (w - q_b(w))^2 / U_jj^2: what the group adds to the sweep's loss at b bits."""
        palette = tuple(b for b in range(bits - 1, bits + 2 + (raised > 0)) if b <= 8)
        table = [
            [float(((weight[:, g] - rounded(g, b)).square() @ factor.importance[g]).sum()) for b in palette]
            for g in groups
        ]
        widths = [group.stop - group.start for group in groups]
        uniform = spread_evenly(len(groups), bits, raised)
        budget = sum(width * b for width, b in zip(widths, uniform, strict=True))
        chosen = least_error(table, palette, widths, budget)
        plans = (LayerPlan(uniform, self.group_size), LayerPlan(chosen, self.group_size))
        return Cost(plans, tuple(_table_loss(table, palette, plan.bits) for plan in plans))


def _table_loss(table: list[list[float]], palette: tuple[int, ...], bits: tuple[int, ...]) -> float:
    return sum(row[palette.index(b)] for row, b in zip(table, bits, strict=True))


@dataclass(frozen=True, eq=False)
class _Fitter:
    """SQC: the grid of one group as a pure function of its weights, its bits and the salience of its columns."""

    recipe: SlimLLM
    original: Tensor
    factor: Factor
    search: RangeSearch

    def __call__(self, columns: slice, weight: Tensor, bits: int, scale_dtype: torch.dtype) -> UniformGrid:
        return fit(
            weight,
            bits,
            self._importance(columns),
            search=self.search,
            one_bit=self.recipe.one_bit,
            symmetric=self.recipe.symmetric,
            scale_dtype=scale_dtype,
        )

    def _importance(self, columns: slice) -> Tensor | None:
        kind = self.recipe.weighting
        if kind == "none":
            return None
        if kind == "column":
            return self.factor.importance[columns]
        values = salience(self.original, self.factor, self.recipe.salience)[:, columns]
        if kind == "element":
            return values
        limit = values.mean() + self.recipe.mask_threshold * values.std()
        return torch.where(values >= limit, self.recipe.mask_factor, 1.0)
