"""The graph over a layer's columns: `column_features` of its nodes `[n, 8]`, `adjacency` of its edges `[n, n]`.

The graph of MG-PTQ (arXiv 2501.18154): nodes are columns or column groups, edges come from the factor U of the inverse
Hessian (H^-1 = U^T U), which says how much of a column's error the sweep hands to a later one. Second-order edges are
published; features, normalisation and top-k are ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitquilt.core.types import LayerStats
from bitquilt.layer.hessian import Factor

_TINY = 1e-12  # as a share of the largest value: keeps the logarithm of a dead column near the others'


def column_features(weight: Tensor, stats: LayerStats, factor: Factor, groups: Sequence[slice]) -> Tensor:
    """Return standardised features fp32 `[len(groups), 8]` of `weight` `[out, in]`, means over each group.

    log norm, log max abs, standard deviation, kurtosis, log H_jj, log 1 / U_jj^2, mean abs x_j (root mean square where
    no token sample is kept), place. A feature without variance is 0. A factor on H or on the weights changes nothing.
    """
    values = weight.double()
    size = values.abs().mean().clamp_min(1e-300)
    values = values / size
    spread = values - values.mean(dim=0)
    variance = spread.square().mean(dim=0)
    kurtosis = spread.square().square().mean(dim=0) / variance.square().clamp_min(1e-24)
    diagonal = stats.hessian.diagonal().double()
    inputs = diagonal.clamp(min=0).sqrt() if stats.sample is None else stats.sample.double().abs().mean(dim=0)
    columns = torch.stack(
        [
            _log(values.norm(dim=0)),
            _log(values.abs().amax(dim=0)),
            variance.sqrt(),
            kurtosis,
            _log(diagonal),
            _log(factor.importance.double()),
            inputs / inputs.mean().clamp_min(1e-300),
            torch.arange(weight.shape[1], dtype=torch.float64, device=weight.device) / weight.shape[1],
        ],
        dim=1,
    )
    return _standardised(torch.stack([columns[group].mean(dim=0) for group in groups])).float()


def adjacency(upper: Tensor, groups: Sequence[slice] | None = None, top: int = 16) -> Tensor:
    """Return the normalised adjacency D^-1/2 A D^-1/2, sparse fp32 `[n, n]` on the host, of `upper` `[in, in]`.

    A_ij = abs(U_ij) / sqrt(U_ii U_jj) for i < j (between groups: the mean over their pairs of columns), the `top`
    strongest per node kept, symmetrised by maximum, self-loops of 1, so that an isolated node has degree 1.
    """
    root = upper.diagonal().sqrt()
    strength = upper.abs().triu(diagonal=1) / root.unsqueeze(1) / root.unsqueeze(0)
    if groups is not None and any(group.stop - group.start > 1 for group in groups):
        strength = torch.stack([strength[:, group].mean(dim=1) for group in groups], dim=1)
        strength = torch.stack([strength[group].mean(dim=0) for group in groups]).triu(diagonal=1)
    strength = strength + strength.t()  # one entry of each pair is zero, so the sum is the maximum
    count = min(top, len(strength))
    values, places = strength.topk(count, dim=1)
    kept = torch.zeros_like(strength).scatter_(1, places, values)
    kept = torch.maximum(kept, kept.t())
    kept.fill_diagonal_(1.0)
    root = kept.sum(dim=1).rsqrt()
    return (kept * torch.outer(root, root)).cpu().to_sparse_coo().coalesce()


def _log(values: Tensor) -> Tensor:
    largest = values.max().clamp_min(1e-300)
    return (values / largest).clamp_min(_TINY).log()


def _standardised(features: Tensor) -> Tensor:
    centred = features - features.mean(dim=0)
    spread = centred.square().mean(dim=0).sqrt()
    flat = spread <= 1e-9 * features.abs().amax(dim=0).clamp_min(1e-300)
    return torch.where(flat, torch.zeros_like(centred), centred / torch.where(flat, 1.0, spread))
