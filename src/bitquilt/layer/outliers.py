"""Weights kept in half precision: `activation_outliers`, `error_outliers` choose them, `sparse_remainder` stores them.

Two rules of CMPQ (arXiv 2410.13056): O_act by a weight's contribution to the output, O_q by the cost
of its rounding there. Neither knows the quantizer: any recipe can protect weights. A protected weight keeps a dense
code, and the sparse part holds the difference, so that a product needs no mask.
"""

import torch
from torch import Tensor

from bitquilt.core.types import Outliers

# An outlier takes 32 bits (value and index): at half of the weights the sparse part alone costs 16 bits per weight.
MAX_SHARE = 0.25
_FP16_MAX = 65504.0


def check_share(**shares: float) -> None:
    """Raise ValueError naming the first share out of range, or all of them if their sum is."""
    for label, share in shares.items():
        if not 0 <= share <= MAX_SHARE:
            raise ValueError(f"{label} is {share}; wanted a share of the weights from 0 to {MAX_SHARE}, such as 0.005")
    if sum(shares.values()) > MAX_SHARE:
        raise ValueError(f"{' + '.join(shares)} is {sum(shares.values())}; wanted at most {MAX_SHARE} together")


def activation_count(share: float, out_features: int, in_features: int) -> int:
    """The number of weights that `activation_outliers` protects."""
    return round(share * out_features * in_features)


def activation_outliers(weight: Tensor, norms: Tensor, share: float) -> Tensor:
    """Choose O_act, bool `[out, in]`: the share of weights with the largest a_j |w_ij|, `norms` a_j `[in]`.

    The earlier index wins a tie.
    """
    return largest(norms * weight.abs(), activation_count(share, *weight.shape))


def error_outliers(weight: Tensor, quantized: Tensor, norms: Tensor, count: int, taken: Tensor) -> Tensor:
    """Choose O_q, bool `[out, in]`: the `count` weights outside `taken` with the largest a_j^2 (w_ij - q_ij)^2.

    Growing `count` only adds weights: the sets are nested.
    """
    score = (norms * (weight - quantized)).square().masked_fill(taken, -1.0)
    return largest(score, min(count, int((~taken).sum())))


def largest(score: Tensor, count: int) -> Tensor:
    """Mark the `count` largest entries of `score`, bool of its shape; the earlier index wins a tie."""
    chosen = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    if count <= 0:
        return chosen.view(score.shape)
    flat = score.flatten()
    limit = flat.topk(count).values[-1]
    chosen |= flat > limit
    ties = torch.nonzero(flat == limit).flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.view(score.shape)


def fits_half(values: Tensor) -> bool:
    """Whether every value can be stored in float16."""
    return values.numel() == 0 or float(values.abs().max()) <= _FP16_MAX


def sparse_remainder(remainder: Tensor, mask: Tensor) -> Outliers | None:
    """Compressed rows of `remainder` `[out, in]` at `mask`, in float16; None where the mask is empty.

    Raises ValueError if a value leaves the range of float16: see `fits_half`.
    """
    if not bool(mask.any()):
        return None
    rows, columns = mask.nonzero(as_tuple=True)
    values = remainder[rows, columns]
    if not fits_half(values):
        raise ValueError(f"an outlier is {float(values.abs().max()):.3g} from its code, beyond float16")
    pointers = torch.nn.functional.pad(mask.sum(dim=1).cumsum(0), (1, 0))
    return Outliers(values.half(), columns, pointers.to(torch.int32))
