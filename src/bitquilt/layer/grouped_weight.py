"""A planned layer as column groups: `solve` sweeps it into a stored weight, `protect` chooses its outliers.

What every GPTQ-based recipe shares: dead columns, the scales' storage type, the sweep, coordinate descent and the
events of the report. `codebook_weight` does the same for channels with free levels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bitquilt.core.types import Event, Layer, LayerPlan, Solution, check_finite, group_slices
from bitquilt.layer.assembly import assemble
from bitquilt.layer.descent import descend
from bitquilt.layer.gptq_sweep import Sweep, sweep, sweep_grouped, sweep_ordered
from bitquilt.layer.grids import Grid
from bitquilt.layer.grids.uniform import scale_dtype_for
from bitquilt.layer.hessian import Factor, damped, factorize
from bitquilt.layer.outliers import activation_count, activation_outliers, check_share, error_outliers, sparse_remainder

FitColumns = Callable[[slice, Tensor, int, torch.dtype], Grid]
"""(columns of the group, their weights `[out, n]`, bits, scale dtype) -> grid."""


def solve(
    layer: Layer,
    plan: LayerPlan,
    factor: Factor,
    fit: FitColumns,
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
        return fit(groups[k], columns, plan.bits[k], scale_dtype)

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
    layer: Layer, plan: LayerPlan, factor: Factor, fit: FitColumns, act_share: float, error_share: float
) -> Tensor | None:
    """Choose O_act and O_q, together bool `[out, in]`, from shares of the layer's weights; `fit` as in `solve`.

    None where no share is asked for, or where weights leave the range of float16, in which outliers are stored.
    """
    assert layer.stats is not None
    if not act_share + error_share or scale_dtype_for(layer.weight) != torch.float16:
        return None
    weight, norms = live_weight(layer, factor), layer.stats.hessian.diagonal().clamp(min=0).sqrt()
    act = activation_outliers(weight, norms, act_share)
    rest, rounded = weight.masked_fill(act, 0.0), torch.empty_like(weight)
    for group, bits in zip(group_slices(weight.shape[1], plan.group_size), plan.bits, strict=True):
        rounded[:, group] = fit(group, rest[:, group], bits, torch.float16).quantize(weight[:, group])
    return act | error_outliers(weight, rounded, norms, round(error_share * weight.numel()), act)


def check_protection(passes: int, **shares: float) -> None:
    """Raise ValueError naming a share out of range, or for coordinate descent with protected weights."""
    check_share(**shares)
    if passes and any(shares.values()):
        raise ValueError(f"passes is {passes}; coordinate descent cannot move outliers: set one of them to 0")


def protected_count(shape: tuple[int, int], act_share: float, error_share: float) -> int:
    """The number of weights that `protect` keeps in a layer of `shape` `[out, in]`."""
    act = activation_count(act_share, *shape, "weight") if act_share else 0
    return act + round(error_share * shape[0] * shape[1])


def unprotected_event(name: str, weight: Tensor, *shares: float) -> tuple[Event, ...]:
    """The event of a layer whose outliers were asked for and cannot be stored, or none."""
    if not sum(shares) or scale_dtype_for(weight) == torch.float16:
        return ()
    detail = "the layer's weights leave the range of float16, in which outliers are stored: none are protected"
    return (Event(name, "outliers out of float16 range", detail),)
