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

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from bitquilt.allocation.double_pointer import cheapest_within, pair_candidates, pairs, within_budget
from bitquilt.allocation.knapsack import least_error
from bitquilt.grids.uniform import MIN_MAX, PUBLISHED_SEARCH, OneBitRule, RangeSearch, UniformGrid, fit, scale_dtype_for
from bitquilt.hessian import Factor, factorize
from bitquilt.sensitivity.divergence import Objective, pair_losses
from bitquilt.sensitivity.salience import GroupStatistic, SalienceRule, group_salience, salience
from bitquilt.solvers.solve import live_weight, solve
from bitquilt.types import Cost, Layer, LayerPlan, LayerStats, Solution, group_slices, uniform_plan

RoundGroup = Callable[[slice, int], Tensor]
"""(columns, bits) -> the group's weights rounded at these bits, without compensation."""


@dataclass(frozen=True)
class SlimLLM:
    """`bits` N is the mean; groups hold N-1, N or N+1. See the module's text for every other field's reason.

    `allocation`: "sba" as published; "dp" = the least sum of tabulated group errors at the same mean (exact);
    "uniform" = N everywhere. `search`: "wide" or "published" tau grid. `hessian`: of the layer's input, or "attention":
    of its errors' effect on the output of its sub-block (see `sensitivity.attention`).
    """

    name: ClassVar[str] = "slim-llm"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "sample"})

    bits: int = 2
    group_size: int = 128
    damp: float = 0.01
    salience: SalienceRule = "cholesky"
    group_statistic: GroupStatistic = "mean"
    allocation: Literal["sba", "dp", "uniform"] = "sba"
    objective: Objective = "kl"
    candidates: Literal["all", "published"] = "all"
    candidate_quantizer: Literal["fitted", "min_max"] = "fitted"
    search: Literal["wide", "published"] = "wide"
    weighting: Literal["column", "none", "mask", "element"] = "column"
    mask_threshold: float = 2.0
    mask_factor: float = 4.0
    one_bit: OneBitRule = "symmetric"
    hessian: Literal["input", "attention"] = "input"

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

    def prepare(self, stats: LayerStats | None) -> Factor:
        """Factor the Hessian once for all layers that read this input."""
        assert stats is not None
        return factorize(stats.hessian / stats.tokens, self.damp)

    def measure(self, layer: Layer, prepared: Factor) -> Cost:
        """The objective of every candidate bit map: SBA's pairings, or the tabulated optimum beside uniform bits.

        One candidate, uniform bits, where there is nothing to search: one column group, a bit width at the end of
        the palette, or a layer whose input calibration never saw.
        """
        in_features = layer.weight.shape[1]
        groups = group_slices(in_features, self.group_size)
        unseen = layer.stats is None or layer.stats.sample is None
        if self.allocation == "uniform" or len(groups) == 1 or not 1 < self.bits < 8 or unseen:
            return Cost((uniform_plan(in_features, self.bits, self.group_size),), (0.0,))
        weight = live_weight(layer, prepared)
        scale_dtype = scale_dtype_for(weight)
        fitter = self._fitter(weight, prepared, MIN_MAX if self.candidate_quantizer == "min_max" else None)

        def rounded(group: slice, bits: int) -> Tensor:
            return fitter(group, weight[:, group], bits, scale_dtype).quantize(weight[:, group])

        if self.allocation == "dp":
            return self._tabulated(weight, groups, prepared, rounded)
        return self._searched(layer, weight, groups, prepared, rounded)

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """The cheapest candidate within N bits per weight; the fewest pairs win a tie."""
        return cheapest_within(cost, in_features, self.bits)

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Factor) -> Solution:
        """Sweep the layer with the plan's bits. Raises ValueError naming the layer if a weight is NaN or Inf."""
        fitter = self._fitter(live_weight(layer, prepared), prepared)
        return solve(layer, plan, prepared, fitter, damp=self.damp)

    def _fitter(self, original: Tensor, factor: Factor, search: RangeSearch | None = None) -> "_Fitter":
        if search is None:
            search = PUBLISHED_SEARCH if self.search == "published" else RangeSearch()
        return _Fitter(self, original, factor, search)

    def _searched(self, layer: Layer, weight: Tensor, groups: list[slice], factor: Factor, rounded: RoundGroup) -> Cost:
        """SBA: every pairing that the salience ranking allows, judged at the layer's output."""
        assert layer.stats is not None
        assert layer.stats.sample is not None
        values = salience(weight, factor, self.salience)
        ranking = group_salience(values, groups, factor.dead, self.group_statistic).tolist()
        base = [rounded(group, self.bits) for group in groups]
        changes = [
            (groups[k], rounded(groups[k], bits) - base[k])
            for low, high in pairs(ranking)
            for k, bits in ((low, self.bits - 1), (high, self.bits + 1))
        ]
        losses = pair_losses(
            layer.stats.sample, weight, layer.bias, torch.cat(base, dim=1), changes, self.objective
        ).tolist()
        plans = [LayerPlan(bits, self.group_size) for bits in pair_candidates(ranking, self.bits)]
        menu = list(zip(plans, losses, strict=True))
        if self.candidates == "published":
            # p = 0 stays where nothing else is left: the public code stops there with an error
            inner = [item for item in menu[1:-1] if within_budget(item[0], weight.shape[1], self.bits)]
            menu = inner or menu[:1]
        return Cost(tuple(plan for plan, _ in menu), tuple(loss for _, loss in menu))

    def _tabulated(self, weight: Tensor, groups: list[slice], factor: Factor, rounded: RoundGroup) -> Cost:
        """e_k(b) = sum over the group of (w - q_b(w))^2 / U_jj^2: what the group adds to the sweep's loss at b bits."""
        palette = (self.bits - 1, self.bits, self.bits + 1)
        table = [
            [float(((weight[:, g] - rounded(g, b)).square() @ factor.importance[g]).sum()) for b in palette]
            for g in groups
        ]
        widths = [group.stop - group.start for group in groups]
        chosen = least_error(table, palette, widths, self.bits * weight.shape[1])
        uniform = (self.bits,) * len(groups)
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
