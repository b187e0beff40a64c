"""How does a planned layer become a stored weight? solve(layer, plan, factor, fit) -> Solution.

What every GPTQ-based recipe shares: dead columns, the scales' storage type, the sweep, the assembly. Groups of
equal bits are stored side by side: as many segments as distinct widths, and one map of the groups.
`solvers.codebooks` does the same for channels with tables of levels.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bitquilt.core.types import (
    Event,
    Format,
    Layer,
    LayerPlan,
    Permutation,
    QuantizedWeight,
    Segment,
    Solution,
    check_finite,
    group_slices,
)
from bitquilt.layer.descent import descend
from bitquilt.layer.gptq_sweep import Sweep, sweep, sweep_grouped, sweep_ordered
from bitquilt.layer.grids.uniform import UniformGrid, scale_dtype_for
from bitquilt.layer.hessian import Factor, damped, factorize
from bitquilt.layer.outliers import activation_count, activation_outliers, check_share, error_outliers, sparse_remainder

FitColumns = Callable[[slice, Tensor, int, torch.dtype], UniformGrid]
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
    """GPTQ sweep over the plan's groups; with `act_order` columns go in descending Hessian diagonal, grids first.

    `factor` is the layer's, made with `damp`; where it has an order, that is the sweep's, grids fitted when their
    group is reached. `protected` bool `[out, in]`: weights kept in fp16 beside the codes, which the grids do not see.
    `passes`: of coordinate descent over the codes afterwards (`solvers.descent`; not beside protected weights).
    Raises ValueError naming the layer if a weight is NaN or Inf.
    """
    assert layer.stats is not None
    weight = live_weight(layer, factor)
    groups = group_slices(weight.shape[1], plan.group_size)
    scale_dtype = scale_dtype_for(weight)

    def fit_group(k: int, columns: Tensor) -> UniformGrid:
        if protected is not None:
            columns = columns.masked_fill(protected[:, groups[k]], 0.0)
        return fit(groups[k], columns, plan.bits[k], scale_dtype)

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
    stored = assemble(swept, plan, scale_dtype)
    if protected is not None and swept.remainder is not None:
        stored = replace(stored, outliers=sparse_remainder(swept.remainder, torch.zeros(()), protected))
    return Solution(stored, swept.loss, layer_events(layer, scale_dtype, factor, damp), {"aim": swept.aim})


def live_weight(layer: Layer, factor: Factor) -> Tensor:
    """The layer's weight with dead columns set to zero: no token ever multiplied them."""
    check_finite(layer.name, weight=layer.weight)
    return layer.weight.masked_fill(factor.dead, 0.0)


def layer_events(
    layer: Layer, scale_dtype: torch.dtype, factor: Factor | None = None, damp: float = 0.0
) -> tuple[Event, ...]:
    """What the report must say about a solved layer."""
    events = []
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


def disassemble(weight: QuantizedWeight, plan: LayerPlan, compensated: Tensor) -> Sweep[UniformGrid]:
    """What `assemble` was handed: codes, grids and weight of groups in their own order; the loss is NaN."""
    in_features = sum(segment.codes.shape[1] for segment in weight.segments)
    slices = group_slices(in_features, plan.group_size)
    first = weight.segments[0].codes
    codes = torch.empty(len(first), in_features, dtype=torch.uint8, device=first.device)
    grids: dict[int, UniformGrid] = {}
    for segment in weight.segments:
        bits, start = segment.format.bits, 0
        for i, k in enumerate(k for k, width in enumerate(plan.bits) if width == bits):
            stop = start + slices[k].stop - slices[k].start
            codes[:, slices[k]] = segment.codes[:, start:stop]
            zero = None if segment.zero is None else segment.zero[:, i : i + 1]
            grids[k] = UniformGrid(bits, segment.scale[:, i : i + 1], zero)
            start = stop
    ordered = tuple(grids[k] for k in range(len(slices)))
    values = [grid.decode(codes[:, group].float()) for grid, group in zip(ordered, slices, strict=True)]
    return Sweep(codes, torch.cat(values, dim=1), ordered, float("nan"), None, compensated)


def assemble(swept: Sweep[UniformGrid], plan: LayerPlan, scale_dtype: torch.dtype = torch.float16) -> QuantizedWeight:
    """Sort the column groups by bits (stable, a narrower last group stays last in its segment) and cut segments."""
    slices = group_slices(swept.codes.shape[1], plan.group_size)
    members: dict[int, list[int]] = defaultdict(list)
    for k, bits in enumerate(plan.bits):
        members[bits].append(k)
    segments, order = [], []
    for bits in sorted(members):
        groups = members[bits]
        order += groups
        codes = torch.cat([swept.codes[:, slices[k]] for k in groups], dim=1)
        scale = torch.cat([swept.grids[k].scale for k in groups], dim=1)
        zeros = [zero for k in groups if (zero := swept.grids[k].zero) is not None]
        zero = torch.cat(zeros, dim=1) if zeros else None
        form = Format(bits, plan.group_size, "uniform", scale_dtype, symmetric=zero is None)
        segments.append(Segment(form, codes, scale, zero))
    permutation = None
    if order != sorted(order):
        # the narrow last group may stand inside the stored order: `expand_permutation` knows its width by its index
        permutation = Permutation(torch.tensor(order), plan.group_size)
    return QuantizedWeight(tuple(segments), permutation)


def protect(
    layer: Layer, plan: LayerPlan, factor: Factor, fit: FitColumns, act_share: float, error_share: float
) -> Tensor | None:
    """O_act and O_q together, bool `[out, in]`, shares of the layer's weights, for grids by `fit` as in `solve`.

    None where nothing is asked for, or where weights leave the range of float16, in which outliers are stored.
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
    """Raise ValueError naming the share that is none, or for coordinate descent beside protected weights."""
    check_share(**shares)
    if passes and any(shares.values()):
        raise ValueError(f"passes is {passes}; coordinate descent does not go with outliers: wanted one of them")


def protected_count(shape: tuple[int, int], act_share: float, error_share: float) -> int:
    """How many weights of a layer `[out, in]` `protect` keeps."""
    act = activation_count(act_share, *shape, "weight") if act_share else 0
    return act + round(error_share * shape[0] * shape[1])


def unprotected_event(name: str, weight: Tensor, *shares: float) -> tuple[Event, ...]:
    """What the report must say where outliers were asked for and cannot be stored."""
    if not sum(shares) or scale_dtype_for(weight) == torch.float16:
        return ()
    detail = "the sparse part is float16, which the layer's weights leave: none are protected"
    return (Event(name, "outliers out of float16 range", detail),)
