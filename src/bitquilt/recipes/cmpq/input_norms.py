"""What CMPQ asks of a layer's inputs: `channel_norms(stats, statistic)` and `Activations`."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bitquilt.core.types import LayerStats, check_finite
from bitquilt.layer.hessian import Factor

Statistic = Literal["l2", "mean_abs", "max_abs"]


@dataclass(frozen=True, eq=False)
class Activations:
    """What layers of one input share: `norms` a_j fp32 `[in]`; with compensation the factor of the Hessian."""

    norms: Tensor
    factor: Factor | None = None
    events: tuple[tuple[str, str], ...] = ()

    @property
    def cost(self) -> Tensor:
        """What a unit error in each channel costs the output `[in]`, compensated if the sweep is."""
        return self.norms.square() if self.factor is None else self.factor.importance


def channel_norms(stats: LayerStats, statistic: Statistic) -> tuple[Tensor, tuple[tuple[str, str], ...]]:
    """a_j fp32 `[in]`, and what happened: without a sample of the tokens it is the L2 norm. ValueError: not finite."""
    events: tuple[tuple[str, str], ...] = ()
    if statistic == "l2" or stats.sample is None:
        norms = stats.hessian.diagonal().clamp(min=0).sqrt()
        if statistic != "l2":
            events = (("no token sample", f"statistic {statistic} needs one; the L2 norm is used"),)
    else:
        size = stats.sample.abs()
        norms = size.mean(dim=0) if statistic == "mean_abs" else size.amax(dim=0)
    check_finite("the layer's input", norms=norms)
    return norms, events
