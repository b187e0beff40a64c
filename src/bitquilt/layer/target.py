"""The weight a solver aims at after earlier layers have erred: `corrected` replaces W by W*.

A layer that aims at its own full-precision weight W passes earlier errors on. A layer that aims at
    W* = W + a W (X_fp - X)^T X (H + damp)^-1 + r (R_fp - R)^T X (H + damp)^-1
repairs them as far as its input X allows: a = 1 is the least-squares weight whose output on X is that of the
full-precision model on X_fp (arXiv 2504.02692), r = 1 adds the error of the residual stream R that the output is added
to. Less than 1 trusts calibration less.
"""

from dataclasses import replace

from bitquilt.core.types import Event, Layer, LayerStats, group_slices
from bitquilt.layer.hessian import Factor, factorize, group_order


def check_repairs(alpha: float, stream_alpha: float, passes: int = 0, hessian: str = "input") -> None:
    """Raise ValueError unless both alphas are shares, `passes` is a count and an alpha has the input's Hessian."""
    for name, value in (("alpha", alpha), ("stream_alpha", stream_alpha)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; wanted a share of the earlier layers' error from 0 to 1")
    if passes < 0:
        raise ValueError(f"passes is {passes}; wanted 0 or more passes over the codes")
    if hessian != "input" and (alpha or stream_alpha):
        raise ValueError(
            f"hessian is {hessian!r}; alpha and stream_alpha repair errors measured at the layer's input: use "
            "hessian='input', or set both alphas to 0"
        )


def layer_factor(stats: LayerStats, damp: float, group_size: int | None = None) -> Factor:
    """Factor a layer's mean Hessian; with `group_size`, in the group-aware order of its columns."""
    hessian = stats.hessian / stats.tokens
    order = None
    if group_size is not None:
        diagonal = hessian.diagonal()
        order = group_order(diagonal, group_slices(len(diagonal), group_size))
    return factorize(hessian, damp, order)


def corrected(layer: Layer, factor: Factor, alpha: float, stream_alpha: float) -> tuple[Layer, tuple[Event, ...]]:
    """Return the layer with W* in place of its weight, and an event where drift could not be measured."""
    stats = layer.stats
    if stats is None or not (alpha or stream_alpha):
        return layer, ()
    if stats.drift is None:
        detail = "its tokens have no counterpart in the full-precision model: it aims at its own weight"
        return layer, (Event(layer.name, "no full-precision inputs", detail),)
    error = alpha * (layer.weight @ stats.drift)
    if stream_alpha and stats.stream_drift is not None:
        error = error + stream_alpha * stats.stream_drift
    return replace(layer, weight=layer.weight + factor.solve(error / stats.tokens)), ()
