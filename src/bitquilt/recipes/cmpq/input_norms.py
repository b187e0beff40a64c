"""`channel_norms` measures how large each input channel is; `InputNorms` is what layers of one input share."""

from dataclasses import dataclass

from torch import Tensor

from bitquilt.core.types import LayerStats, check_finite
from bitquilt.layer.hessian import Factor


@dataclass(frozen=True, eq=False)
class InputNorms:
    """`norms`: a_j fp32 `[in]`; `factor`: of the Hessian, where later channels compensate errors."""

    norms: Tensor
    factor: Factor | None = None

    @property
    def cost(self) -> Tensor:
        """Cost of a unit error in each channel at the output `[in]`, after compensation where there is any."""
        return self.norms.square() if self.factor is None else self.factor.importance


def channel_norms(stats: LayerStats | None) -> Tensor:
    """a_j fp32 `[in]`: the L2 norm of each channel over all tokens. Raises ValueError unless all are finite."""
    if stats is None:
        raise ValueError("the activation statistics are missing: this recipe needs calibration data")
    norms = stats.hessian.diagonal().clamp(min=0).sqrt()
    check_finite("the layer's input", norms=norms)
    return norms
