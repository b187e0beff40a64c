"""Salience, the cost of setting a weight to zero in units of the layer's loss: `salience` of weights, `group_salience`.

SliM-LLM, Definition 3.1 (arXiv 2405.14917) and the classical OBS forms behind it.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bitquilt.layer.hessian import Factor

GroupStatistic = Literal["mean", "sum"]


def salience(weight: Tensor, factor: Factor) -> Tensor:
    """Return the salience w^2 / U_jj^2 of `weight`, both `[out, in]`.

    It is right for a sweep in the order of `factor`, in which few columns compensate a late one, and for no other.
    """
    return weight.square() / factor.pivots.square()


def group_salience(values: Tensor, groups: Sequence[slice], dead: Tensor, statistic: GroupStatistic = "mean") -> Tensor:
    """Reduce salience `[out, in]` to one number per column group, fp64 `[K]`; dead columns do not count."""
    per_column = values.double().mean(dim=0).masked_fill(dead, 0.0)
    totals = []
    for group in groups:
        alive = int((~dead[group]).sum())
        total = per_column[group].sum()
        totals.append(total / max(alive, 1) if statistic == "mean" else total)
    return torch.stack(totals)
