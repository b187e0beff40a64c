"""Salience, the cost of setting a weight to zero in units of the layer's loss: `salience` of weights, `group_salience`.

SliM-LLM, Definition 3.1 (arXiv 2405.14917) and the classical OBS forms behind it.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bitquilt.layer.hessian import Factor

SalienceRule = Literal["cholesky", "inverse_diag", "paper_literal"]
GroupStatistic = Literal["mean", "sum"]


def salience(weight: Tensor, factor: Factor, rule: SalienceRule = "cholesky") -> Tensor:
    """Return the salience of `weight`, both `[out, in]`.

    cholesky: w^2 / U_jj^2, right for a left-to-right sweep (few columns compensate a late one), so never reuse its
    ranking for another column order.  inverse_diag: w^2 / [H^-1]_jj, without an order.
    paper_literal: w^2 / [H^-1]_jj^2.
    """
    if rule == "cholesky":
        denominator = factor.pivots.square()
    elif rule == "inverse_diag":
        denominator = factor.inverse_diagonal
    else:
        denominator = factor.inverse_diagonal.square()
    return weight.square() / denominator


def group_salience(values: Tensor, groups: Sequence[slice], dead: Tensor, statistic: GroupStatistic = "mean") -> Tensor:
    """Reduce salience `[out, in]` to one number per column group, fp64 `[K]`; dead columns do not count."""
    per_column = values.double().mean(dim=0).masked_fill(dead, 0.0)
    totals = []
    for group in groups:
        alive = int((~dead[group]).sum())
        total = per_column[group].sum()
        totals.append(total / max(alive, 1) if statistic == "mean" else total)
    return torch.stack(totals)
