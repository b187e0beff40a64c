"""Which weights of a layer on uniform grids stand beside the codes? protect(layer, plan, factor, fit, shares) -> mask.

What `gptq` and `slim-llm` share with `cmpq`: both rules of `outliers`, ranked by plain rounding to grids that do not
see what is protected already.
"""

import torch
from torch import Tensor

from bitquilt.grids.uniform import scale_dtype_for
from bitquilt.hessian import Factor
from bitquilt.outliers import activation_count, activation_outliers, check_share, error_outliers
from bitquilt.solvers.solve import FitColumns, live_weight
from bitquilt.types import Event, Layer, LayerPlan, group_slices


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
