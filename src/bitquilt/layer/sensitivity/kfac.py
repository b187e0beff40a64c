"""Losses of the whole model by column group and width: `width_losses` tabulates them, `[groups, widths]`.

`corrected` and `tried_at_one_bit` scale a table to measured losses.

The unit is the expected increase of KL(full precision || quantized) in nats per token. To second order that is half
the error's norm in the Fisher matrix, here Kronecker-factored per layer (K-FAC, Martens and Grosse, arXiv 1503.05671):

    1/2 sum_i E[g_i^2] sum_j c_j (w_ij - q_ij)^2

g: the gradient at the layer's output of the summed cross-entropy against labels sampled from the model itself (at the
full-precision point the gradient of the KL is zero, its expected square is not). c_j: what an error in column j costs
at the layer's output, 1 / U_jj^2 where later columns compensate it, E[x_j^2] where nothing does. Losses add up over
groups and layers; at few bits errors interact, and the sum is only a ranking.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitquilt.core.types import group_slices

LossTable = NDArray[np.float32]
_MOST = 32.0  # a larger factor is noise: few tokens, or a loss near zero
# Beyond this width the error falls as the square of the step: within 10 % for normal weights, which a test measures.
MEASURED_WIDTHS = 5


def width_losses(
    weight: Tensor,
    rounded: Callable[[int], Tensor],
    rows: Tensor,
    columns: Tensor,
    widths: Sequence[int],
    group_size: int,
    *,
    inputs: Callable[[int], Tensor] | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Return losses fp32 `[groups, len(widths)]`, `widths` ascending, that never rise with the width.

    `weight` `[out, in]`; `rounded(bits)`: the weight with every group rounded at these bits without compensation;
    `rows` `[out]` E[g_i^2]; `columns` `[in]` c_j. Where inputs are rounded too, `inputs(bits)` is their mean squared
    error `[in]`, which the weights multiply; every width is then measured. `order`: the columns in the groups' order.
    """
    starts = [group.start for group in group_slices(weight.shape[1], group_size)]
    places = torch.arange(weight.shape[1], device=weight.device)
    index = torch.bucketize(places, torch.tensor(starts, device=weight.device), right=True) - 1
    if order is not None:
        index = torch.empty_like(index).index_copy_(0, order, index)
    measured: dict[int, Tensor] = {}

    def at(bits: int) -> Tensor:
        if bits > MEASURED_WIDTHS and inputs is None:
            steps = (2**MEASURED_WIDTHS - 1) / (2**bits - 1)
            return at(MEASURED_WIDTHS) * steps**2
        if bits not in measured:
            error = (weight - rounded(bits)).square_()
            per_column = 0.5 * (rows @ error).double() * columns.double()
            if inputs is not None:
                per_column += 0.5 * (rows @ weight.square()).double() * inputs(bits).double()
            measured[bits] = torch.zeros(len(starts), dtype=torch.float64, device=weight.device).index_add_(
                0, index, per_column
            )
        return measured[bits]

    table = torch.stack([at(bits) for bits in widths], dim=1)
    return torch.cummin(table, dim=1).values.float()


def corrected(table: LossTable, widths: Sequence[int], bits: Sequence[int], made: float) -> LossTable:
    """Scale a layer's table `[groups, widths]` to `made`, the second-order loss of the errors that a plan with `bits`
    `[groups]` really made. The two differ because compensation may fail and the errors of rows may be correlated.

    On babyllama-1m-chars the first up_proj at 2 bits costs 14 times its table, at 3 bits 1.3 times: the factor holds
    up to the plan's width and is replaced by its square root with each further bit.
    """
    column = np.searchsorted(widths, bits)
    told = float(table[np.arange(len(column)), column].sum(dtype=np.float64))
    factor = min(max(made / max(told, 1e-30), 1 / _MOST), _MOST)
    above = np.maximum(np.asarray(widths)[None, :] - np.asarray(bits)[:, None], 0)
    scaled = np.minimum.accumulate(table * factor ** (0.5**above), axis=1)
    return scaled.astype(np.float32)


def tried_at_one_bit(table: LossTable, made: float) -> LossTable:
    """Scale the first column, one bit, of a layer's table `[groups, widths]` to `made`, the second-order loss of the
    layer solved at one bit everywhere. It never falls below the column of the next width.

    Compensation may fail altogether at one bit, and the errors of rows are correlated. On babyllama-1m-chars `made` is
    0.8 to 194 times the column, most in the first two blocks; on demo 1.3 to 48 times; on stories260k 0.65 to 3.4.
    """
    found = table.copy()
    told = float(table[:, 0].sum(dtype=np.float64))
    found[:, 0] = np.maximum(table[:, 0] * (made / max(told, 1e-30)), table[:, 1])
    return found
