"""SliM-LLM: salience-driven mixed precision (arXiv 2405.14917, ICML 2025), the training-free method.

1. salience of each column group from the weights and the Hessian;
2. SBA: the p least salient groups get N-1 bits, the p most salient N+1; p minimises KL(P, Q) at the layer's output;
3. SQC: scale and zero of each group fitted with salience as the weight of the errors;
4. a GPTQ sweep over the mixed groups.

Deviations from the publication, undone by `published=True` (`PUBLISHED` below against `OURS`):
- the calibration really is weighted by salience (1 / U_jj^2 per column): the published loss is the plain error;
- tau in 0.4 .. 1.1 instead of 1 +- 0.1, exponent 2 instead of 2.4;
- p = 0 (uniform bits) is a candidate, and p = K/2; layers with fewer than four groups work;
- candidates are judged with the fitted quantizer, not with min-max; KL(P, Q) in fp32 with the bias on both sides;
- group salience is the mean over live columns, so a narrower last group is not ranked low for its width;
- one-bit groups hold the best pair of levels around zero and store no offset, so that a layer with one- and
  three-bit groups takes no more bytes than two bits everywhere.
Never reproduced: the public code's faults (a quantizer left in a symmetric state, a Hessian altered in place, half
precision statistics, an unstable sort).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from torch import Tensor

from bitquilt.allocation.double_pointer import cheapest_within, spread_evenly
from bitquilt.core.budget import Budget
from bitquilt.core.recipe import Needs, PlanTerms
from bitquilt.core.training import Training
from bitquilt.core.types import (
    MAX_BITS,
    Cost,
    Layer,
    LayerPlan,
    LayerStats,
    Layout,
    Solution,
    group_slices,
)
from bitquilt.layer.grids.uniform import (
    MIN_MAX,
    PUBLISHED_SEARCH,
    OneBitRule,
    RangeSearch,
    scale_dtype_for,
)
from bitquilt.layer.grouped_weight import FeedbackSweep, FitColumns, HessianAt, fit_ranges, live_weight
from bitquilt.layer.hessian import Factor
from bitquilt.layer.layouts import GROUP_WIDTHS, WIDTHS_FROM_ONE, grouped_layout
from bitquilt.layer.nearest import COARSE, round_groups
from bitquilt.layer.sensitivity.output_divergence import Objective
from bitquilt.layer.sensitivity.salience import GroupStatistic, group_salience, salience
from bitquilt.layer.target import corrected
from bitquilt.recipes.shared.clipping import ClippingMode, clipping_training
from bitquilt.recipes.shared.traits import Traits, check_bpw, check_whole_bits
from bitquilt.recipes.slim_llm.bit_maps import MapSearch, mean_within

SlimAllocation = Literal["sba", "dp", "uniform", "global"]


@dataclass(frozen=True)
class SlimRules:
    """Choices inside the four steps, ours or the publication's.

    `weighs_errors`: SQC weighs errors by salience. `search`, `candidate_search`, `coarse_search`: ranges tried for the
    final grids, for the candidates of step 2 and for tables of loss. `needs_pair`: as in `MapSearch.paired`.
    `objective`: loss of a candidate. `group_statistic`: salience of a group. `one_bit`: levels of one-bit groups.
    """

    weighs_errors: bool
    search: RangeSearch
    candidate_search: RangeSearch
    coarse_search: RangeSearch
    needs_pair: bool
    objective: Objective
    group_statistic: GroupStatistic
    one_bit: OneBitRule


OURS = SlimRules(
    weighs_errors=True,
    search=RangeSearch(),
    candidate_search=RangeSearch(),
    coarse_search=COARSE,
    needs_pair=False,
    objective="kl",
    group_statistic="mean",
    one_bit="symmetric",
)
PUBLISHED = SlimRules(
    weighs_errors=False,
    search=PUBLISHED_SEARCH,
    candidate_search=MIN_MAX,
    coarse_search=MIN_MAX,
    needs_pair=True,
    objective="kl_reverse",
    group_statistic="sum",
    one_bit="code",
)


@dataclass(frozen=True)
class SlimLLM:
    """Options of SliM-LLM. KL figures: 2 bits, groups of 32, stories260k and babyllama unless said (docs/results.md).

    `bits`: the mean N of the groups' widths, 2 to 8; groups hold N-1, N or N+1 bits.
    `bpw`: instead, true bits per weight of every layer with everything stored, met from below to one group [ours, for
    budgets the publication does not reach]: N bits, N+1 for as many of the most salient groups as fit, then pairs.
    `published`: compute as the public implementation does, without its faults. Geometric mean of the KL over three
    models at 2 and 3 bits: 0.210 instead of 0.187.
    `group_size`: input columns that share a scale and a zero.
    `damp`: added to the Hessian's diagonal, as a share of its mean; 0.01 as published.
    `allocation`: "sba" as published, geometric mean 0.187; "dp" = the least sum of tabulated group errors at the same
    mean, exact, 0.180; "uniform" = N everywhere, 0.187; "global" = the groups of the whole model share one budget,
    which needs a plan made before the first layer is solved.
    `group_order`, `alpha`, `stream_alpha`, `passes`: as in GPTQ; salience and search see the corrected weight. All
    together (0.75, 0.75, 3 passes): KL 2.059 to 1.128 and 0.514 to 0.216.
    `symmetric`: store no zeros; 0.06 bits per weight fewer at 2 bits, 10 % more KL at 3 bits (measured in `quilt`).
    `error_outliers`, `act_outliers`: shares of the weights kept in half precision in addition to the codes, by
    rounding error and by contribution to the output. In `cmpq` on the demo model 0.5 % takes 9 % off the KL.
    `hessian`: "input", or "attention" as in GPTQ: KL 0.513 to 0.465 on babyllama.
    `clipping`: "trained" trains the ranges of each block after the sweep; codes and bytes stay: KL 2.059 to 1.521 and
    0.513 to 0.329.
    """

    name: ClassVar[str] = "slim-llm"
    traits: ClassVar[Traits] = Traits(own_allocations=get_args(SlimAllocation))

    bits: int = 2
    bpw: float | None = None
    published: bool = False
    group_size: int = 128
    damp: float = 0.01
    allocation: SlimAllocation = "sba"
    group_order: bool = False
    alpha: float = 0.0
    stream_alpha: float = 0.0
    passes: int = 0
    symmetric: bool = False
    error_outliers: float = 0.0
    act_outliers: float = 0.0
    hessian: HessianAt = "input"
    clipping: ClippingMode = "solved"

    @property
    def rules(self) -> SlimRules:
        """The choices that `published` stands for."""
        return PUBLISHED if self.published else OURS

    @property
    def sweep(self) -> FeedbackSweep:
        """The sweep that the options ask for."""
        return FeedbackSweep.of(self)

    @property
    def needs(self) -> Needs:
        """The sweep's needs, tokens for the objective, and the block's outputs if clipping is trained."""
        return replace(self.sweep.needs, sample=True, full_outputs=self.training.block is not None)

    @property
    def plan_terms(self) -> PlanTerms:
        """Column groups at the recipe's mean, `bits` or `bpw`."""
        return PlanTerms(
            self.group_size,
            Budget.of(bits=self.bits) if self.bpw is None else Budget.of(bpw=self.bpw),
            plan_required=self.allocation == "global",
            searches_ranges=not self.published,
            own_widths=self._own_widths,
        )

    @property
    def _own_widths(self) -> tuple[int, ...]:
        """Widths that the maps of single layers can have; none where all groups have N bits."""
        if self.bpw is not None:
            return WIDTHS_FROM_ONE
        paired = self.allocation != "uniform" and 1 < self.bits < MAX_BITS
        return (self.bits - 1, self.bits, self.bits + 1) if paired else ()

    def check(self) -> None:
        """Raise ValueError naming the option that cannot work."""
        check_whole_bits(self.bits)
        check_bpw(self.bpw)
        self.sweep.check()

    def check_layers(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ValueError naming the first layer, `[out, in]` by path, that cannot have `bpw`."""
        for name, shape in shapes.items():
            try:
                self._mean(shape)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def prepare(self, stats: LayerStats | None) -> Factor:
        """Factor the Hessian once for all layers that read this input."""
        return self.sweep.prepare(stats)

    def measure(self, layer: Layer, prepared: Factor) -> Cost:
        """Candidate bit maps with their losses: SBA's pairings, or uniform bits and the tabulated optimum.

        Uniform bits alone where there is nothing to search: one column group, a width at the end of the palette, or
        a layer whose input calibration never saw.
        """
        if self.allocation == "global":
            raise ValueError("a global allocation is a plan for the whole model: give this layer's part of it")
        groups = group_slices(layer.weight.shape[1], self.group_size)
        unseen = layer.stats is None or layer.stats.sample is None
        bits, raised = self._mean((layer.weight.shape[0], layer.weight.shape[1]))
        if self.allocation == "uniform" or len(groups) == 1 or not 1 < bits < 8 or unseen:
            plan = LayerPlan(spread_evenly(len(groups), bits, raised), self.group_size)
            return Cost((plan,), (0.0,))
        layer, _ = corrected(layer, prepared, self.alpha, self.stream_alpha)
        weight, rules = live_weight(layer, prepared), self.rules
        scale_dtype = scale_dtype_for(weight)
        fit_group = self._fit_columns(prepared, rules.candidate_search)

        def rounded(group: slice, bits: int) -> Tensor:
            return fit_group(group, weight[:, group], bits, scale_dtype).quantize(weight[:, group])

        search = MapSearch(layer, weight, self.group_size, bits, raised, rounded)
        if self.allocation == "dp":
            return search.tabulated(prepared.importance)
        values = salience(weight, prepared)
        ranking = group_salience(values, groups, prepared.dead, rules.group_statistic).tolist()
        return search.paired(ranking, rules.objective, needs_pair=rules.needs_pair)

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """The cheapest candidate within N bits per weight, or with `bpw` within the bits of the first, which has no
        pair; the fewest pairs win a tie."""
        if self.bpw is None:
            return cheapest_within(cost, in_features, self.bits)
        first = cost.plans[0]
        spent = sum(width * b for width, b in zip(first.widths(in_features), first.bits, strict=True))
        return cheapest_within(cost, in_features, spent / in_features)

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Factor) -> Solution:
        """Sweep the layer with the plan's bits. Raises ValueError naming the layer if a weight is NaN or Inf."""
        return self.sweep.solve(layer, plan, prepared, lambda factor: self._fit_columns(factor, self.rules.search))

    @property
    def training(self) -> Training:
        """Trained clipping on request."""
        return clipping_training(self.clipping)

    def widths(self, out_features: int) -> tuple[int, ...]:
        """1 to 8 bits."""
        return WIDTHS_FROM_ONE

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """The layout in which `quantize` stores a plan."""
        one_bit = () if self.published else (1,)
        symmetric = (*one_bit, *(GROUP_WIDTHS if self.symmetric else ()))
        count = self.sweep.outlier_count(out_features, in_features)
        return grouped_layout(
            out_features, in_features, plan.bits, plan.group_size, symmetric=symmetric, outliers=count
        )

    def rounded(self, layer: Layer, prepared: Factor, bits: int) -> Tensor:
        """The weight with every group at `bits`, fitted as in SQC with fewer candidates for the range."""
        weight, rules = live_weight(layer, prepared), self.rules
        importance = prepared.importance if rules.weighs_errors else None
        return round_groups(
            weight, bits, self.group_size, importance, rules.coarse_search, self.symmetric, rules.one_bit
        )

    def column_cost(self, layer: Layer, prepared: Factor) -> Tensor:
        """1 / U_jj^2: later columns compensate."""
        return prepared.importance

    def _mean(self, shape: tuple[int, int]) -> tuple[int, int]:
        """N, and how many groups of a layer `[out, in]` get N + 1. Raises ValueError if `bpw` is out of reach."""
        return (self.bits, 0) if self.bpw is None else mean_within(self.bpw, shape, self.group_size, self.layout)

    def _fit_columns(self, factor: Factor, search: RangeSearch) -> FitColumns:
        """SQC: the grid of a group from its weights, its bits and the salience of its columns."""
        importance = factor.importance if self.rules.weighs_errors else None
        return fit_ranges(importance, search, GROUP_WIDTHS if self.symmetric else (), self.rules.one_bit)
