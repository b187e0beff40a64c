"""A planned layer as column groups: `solve` sweeps it into a stored weight, `protect` chooses its outliers,
`FeedbackSweep` does both as a recipe's options say. `fit_ranges` fits the grids.

What every GPTQ-based recipe shares: dead columns, the scales' storage type, the sweep, coordinate descent and the
events of the report. `codebook_weight` does the same for channels with free levels.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from bitquilt.core.recipe import Needs
from bitquilt.core.types import Event, Layer, LayerPlan, LayerStats, Solution, check_finite, group_slices
from bitquilt.layer.assembly import assemble
from bitquilt.layer.descent import descend
from bitquilt.layer.gptq_sweep import Sweep, sweep, sweep_grouped, sweep_ordered
from bitquilt.layer.grids import Grid
from bitquilt.layer.grids.uniform import OneBitRule, RangeSearch, UniformGrid, fit, scale_dtype_for
from bitquilt.layer.hessian import Factor, check_damp, damped, factorize
from bitquilt.layer.layouts import check_group_size
from bitquilt.layer.outliers import activation_count, activation_outliers, check_share, error_outliers, sparse_remainder
from bitquilt.layer.target import check_repairs, corrected, layer_factor

FitColumns = Callable[[slice, Tensor, int, torch.dtype], Grid]
"""(columns of the group, their weights `[out, n]`, bits, scale dtype) -> grid."""
HessianAt = Literal["input", "attention"]


@dataclass(frozen=True, kw_only=True)
class FeedbackSweep:
    """The sweep of `gptq`, `slim-llm` and `quilt`, on a target that repairs earlier layers; see `GPTQ`."""

    group_size: int
    damp: float
    alpha: float
    stream_alpha: float
    passes: int
    group_order: bool
    act_order: bool = False
    error_outliers: float = 0.0
    act_outliers: float = 0.0
    hessian: HessianAt = "input"

    @classmethod
    def of(cls, options: object, **fixed: Any) -> Self:
        """The sweep that the fields of a recipe with these names ask for; `fixed`: fields that are no options there."""
        named = {f.name: getattr(options, f.name) for f in fields(cls) if hasattr(options, f.name)}
        return cls(**{**named, **fixed})

    @property
    def needs(self) -> Needs:
        """The Hessian, and the drift of the inputs if the target repairs earlier layers."""
        return Needs(
            hessian=True,
            drift=bool(self.alpha or self.stream_alpha),
            stream_drift=bool(self.stream_alpha),
            output_hessian=self.hessian == "attention",
        )

    def check(self) -> None:
        """Raise ValueError naming the option that cannot work."""
        check_damp(self.damp)
        check_group_size(self.group_size)
        check_repairs(self.alpha, self.stream_alpha, self.passes, self.hessian)
        check_share(error_outliers=self.error_outliers, act_outliers=self.act_outliers)
        if self.passes and (self.error_outliers or self.act_outliers):
            raise ValueError(f"passes is {self.passes}; coordinate descent cannot move outliers: set one of them to 0")
        if self.act_order and self.group_order:
            raise ValueError("act_order and group_order are two orders of the columns; wanted one of them")

    def prepare(self, stats: LayerStats | None) -> Factor:
        """Factor the Hessian once for all layers that read one input."""
        assert stats is not None
        return layer_factor(stats, self.damp, self.group_size if self.group_order else None)

    def outlier_count(self, out_features: int, in_features: int) -> int:
        """Weights of a layer that are kept in half precision."""
        act = activation_count(self.act_outliers, out_features, in_features)
        return act + round(self.error_outliers * out_features * in_features)

    def solve(
        self, layer: Layer, plan: LayerPlan, prepared: Factor, fitter: Callable[[Factor], FitColumns]
    ) -> Solution:
        """Solve the layer with the grids of `fitter(factor)`.

        Raises ValueError naming the layer if a weight is NaN or Inf.
        """
        assert layer.stats is not None
        if self.group_order and plan.group_size != self.group_size:  # a plan made with other groups
            prepared = layer_factor(layer.stats, self.damp, plan.group_size)
        layer, events = corrected(layer, prepared, self.alpha, self.stream_alpha)
        fit_columns, shares = fitter(prepared), (self.act_outliers, self.error_outliers)
        protected = protect(layer, plan, prepared, fit_columns, *shares)
        solution = solve(
            layer,
            plan,
            prepared,
            fit_columns,
            damp=self.damp,
            act_order=self.act_order,
            protected=protected,
            passes=self.passes,
        )
        unprotected = unprotected_event(layer.name, layer.weight, *shares)
        return replace(solution, events=(*events, *solution.events, *unprotected))


def solve(
    layer: Layer,
    plan: LayerPlan,
    factor: Factor,
    fit_columns: FitColumns,
    *,
    damp: float,
    act_order: bool = False,
    protected: Tensor | None = None,
    passes: int = 0,
) -> Solution:
    """Sweep the plan's groups; with `act_order` columns go in descending Hessian diagonal, grids fitted first.

    `factor` is the layer's, made with `damp`. Where it has an order, the sweep takes it and fits each grid when its
    group is reached. `protected` bool `[out, in]`: weights kept in fp16, which the grids do not see. `passes` of
    coordinate descent over the codes follow (`layer.descent`; not with protected weights).
    Raises ValueError naming the layer if a weight is NaN or Inf.
    """
    assert layer.stats is not None
    weight = live_weight(layer, factor)
    groups = group_slices(weight.shape[1], plan.group_size)
    scale_dtype = scale_dtype_for(weight)

    def fit_group(k: int, columns: Tensor) -> Grid:
        if protected is not None:
            columns = columns.masked_fill(protected[:, groups[k]], 0.0)
        return fit_columns(groups[k], columns, plan.bits[k], scale_dtype)

    swept: Sweep[Grid]
    if act_order:
        order = torch.argsort(layer.stats.hessian.diagonal(), descending=True, stable=True)
        grids = [fit_group(k, weight[:, group]) for k, group in enumerate(groups)]
        ordered = factorize(layer.stats.hessian[order][:, order] / layer.stats.tokens, damp)
        swept = sweep_ordered(weight, ordered.upper, groups, grids, order, protected)
    elif factor.order is not None:
        swept = sweep_grouped(weight, factor.upper, groups, fit_group, factor.order, protected)
    else:
        swept = sweep(weight, factor.upper, groups, fit_group, protected)
    if passes and protected is None:
        hessian = damped(layer.stats.hessian / layer.stats.tokens, factor)
        swept = descend(weight, hessian, swept, groups, passes)
    outliers = None
    if protected is not None and swept.remainder is not None:
        outliers = sparse_remainder(swept.remainder, protected)
    stored = assemble(swept, plan, outliers)
    return Solution(stored, swept.loss, layer_events(layer, scale_dtype, factor, damp), {"aim": swept.aim})


def fit_ranges(
    importance: Tensor | None, search: RangeSearch, symmetric: Collection[int] = (), one_bit: OneBitRule = "symmetric"
) -> FitColumns:
    """Return the fit of uniform grids, errors weighted by `importance` `[in]`; widths `symmetric` store no zero."""

    def fit_group(columns: slice, weight: Tensor, bits: int, scale_dtype: torch.dtype) -> UniformGrid:
        weights = None if importance is None else importance[columns]
        even = bits in symmetric
        return fit(weight, bits, weights, search=search, one_bit=one_bit, symmetric=even, scale_dtype=scale_dtype)

    return fit_group


def live_weight(layer: Layer, factor: Factor) -> Tensor:
    """The layer's weight with dead columns, which no token ever multiplied, set to zero."""
    check_finite(layer.name, weight=layer.weight)
    return layer.weight.masked_fill(factor.dead, 0.0)


def layer_events(
    layer: Layer, scale_dtype: torch.dtype, factor: Factor | None = None, damp: float = 0.0
) -> tuple[Event, ...]:
    """The events of a solved layer for the report: nothing but zeros, dead channels, another precision, wide scales."""
    events = []
    if not bool(layer.weight.any()):
        events.append(Event(layer.name, "zero weights", "all weights are zero, and so are their levels"))
    if factor is None and layer.stats is not None and not bool(layer.stats.hessian.diagonal().any()):
        count = layer.weight.shape[1]
        events.append(Event(layer.name, "dead channels", f"{count} of {count} input channels saw only zeros"))
    if factor is not None and bool(factor.dead.any()):
        count = int(factor.dead.sum())
        events.append(
            Event(layer.name, "dead channels", f"{count} of {len(factor.dead)} input channels saw only zeros")
        )
    if factor is not None and factor.precision == torch.float64:
        detail = f"float32 failed; factored in float64 with damp {factor.damp:g} (asked: {damp:g})"
        events.append(Event(layer.name, "hessian not positive definite", detail))
    if scale_dtype != torch.float16:
        detail = f"largest weight {float(layer.weight.abs().max()):.3g}; scales are stored as {scale_dtype}"
        events.append(Event(layer.name, "scales out of float16 range", detail))
    return tuple(events)


def protect(
    layer: Layer, plan: LayerPlan, factor: Factor, fit_columns: FitColumns, act_share: float, error_share: float
) -> Tensor | None:
    """Choose O_act and O_q, together bool `[out, in]`, from shares of the layer's weights; `fit_columns` as in `solve`.

    None where no share is asked for, or where weights leave the range of float16, in which outliers are stored.
    """
    assert layer.stats is not None
    if not act_share + error_share or scale_dtype_for(layer.weight) != torch.float16:
        return None
    weight, norms = live_weight(layer, factor), layer.stats.hessian.diagonal().clamp(min=0).sqrt()
    act = activation_outliers(weight, norms, act_share)
    rest, rounded = weight.masked_fill(act, 0.0), torch.empty_like(weight)
    for group, bits in zip(group_slices(weight.shape[1], plan.group_size), plan.bits, strict=True):
        rounded[:, group] = fit_columns(group, rest[:, group], bits, torch.float16).quantize(weight[:, group])
    return act | error_outliers(weight, rounded, norms, round(error_share * weight.numel()), act)


def unprotected_event(name: str, weight: Tensor, *shares: float) -> tuple[Event, ...]:
    """The event of a layer whose outliers were asked for and cannot be stored, or none."""
    if not sum(shares) or scale_dtype_for(weight) == torch.float16:
        return ()
    detail = "the layer's weights leave the range of float16, in which outliers are stored: none are protected"
    return (Event(name, "outliers out of float16 range", detail),)
