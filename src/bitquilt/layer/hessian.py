"""The cost of an error in one column once later columns may compensate it: `factorize` a Hessian into a `Factor`.

`hessian` is the sum of x x^T over calibration tokens; scaling it changes no result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DAMP_GROWTH = 10.0
_MAX_DAMP = 10.0  # ten times the mean diagonal: beyond that the "inverse" is a diagonal and something is broken


def check_damp(damp: float) -> None:
    """Raise ValueError unless `damp` is a share."""
    if not 0 < damp <= 1:
        raise ValueError(f"damp is {damp}; wanted a share of the Hessian's mean diagonal above 0, at most 1")


@dataclass(frozen=True, eq=False)
class Factor:
    """`upper` fp32 `[in, in]`: U with (H + damp mean(diag H) I)^-1 = U^T U.  `dead` bool `[in]`: channels no token
    used.  `damp`, `precision`: with which the factorization succeeded.  `order` int64 `[in]`: `upper` belongs to
    H[order][:, order]; None = the original order. All but `upper` is by channel."""

    upper: Tensor
    dead: Tensor
    damp: float
    precision: torch.dtype
    order: Tensor | None = None

    @property
    def pivots(self) -> Tensor:
        """U_jj, `[in]`."""
        return self._by_channel(self.upper.diagonal())

    @property
    def importance(self) -> Tensor:
        """1 / U_jj^2, `[in]`: the cost of a unit error in column j when only later columns compensate (OBS)."""
        return self.pivots.square().reciprocal()

    @property
    def inverse_diagonal(self) -> Tensor:
        """The diagonal of the inverse Hessian, `[in]`: column sums of U^2."""
        return self._by_channel(self.upper.square().sum(dim=0))

    def solve(self, rows: Tensor) -> Tensor:
        """Multiply `rows` `[n, in]` by the inverse of the damped Hessian."""
        if self.order is None:
            return (rows @ self.upper.t()) @ self.upper
        solved = (rows[:, self.order] @ self.upper.t()) @ self.upper
        return torch.empty_like(rows).index_copy_(1, self.order, solved)

    def _by_channel(self, values: Tensor) -> Tensor:
        return values if self.order is None else torch.empty_like(values).index_copy_(0, self.order, values)


def damped(hessian: Tensor, factor: Factor) -> Tensor:
    """The damped matrix behind `factor` `[in, in]`, in the original order: a sweep's loss is measured in it."""
    live = hessian.diagonal()[~factor.dead]
    mean = float(live.double().mean()) if len(live) else 1.0
    matrix = hessian.clone()
    matrix.diagonal()[factor.dead] = mean
    matrix.diagonal().add_(factor.damp * mean)
    return matrix


def group_order(diagonal: Tensor, groups: Sequence[slice]) -> Tensor:
    """Order channels `[in]` by falling Hessian diagonal, whole groups first: groups by their mean, then the channels
    inside each. Groups keep their columns, so no order is stored (group-aware reordering)."""
    means = torch.stack([diagonal[group].mean() for group in groups])
    by_mean = means.argsort(descending=True, stable=True).tolist()
    inside = [diagonal[groups[k]].argsort(descending=True, stable=True) + groups[k].start for k in by_mean]
    return torch.cat(inside)


def factorize(hessian: Tensor, damp: float, order: Tensor | None = None) -> Factor:
    """Factor a Hessian `[in, in]`: try fp32, then float64, then float64 with ten times the damp, repeatedly.

    Dead channels (diagonal 0) get the mean diagonal, which does not affect the others and keeps the result
    independent of the Hessian's scale. `order` `[in]`: the channels in the order of the sweep.
    Raises ValueError if the Hessian is not finite or never becomes positive definite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian holds NaN or Inf: an activation overflowed; calibrate in a wider dtype")
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = 1.0 if bool(dead.all()) else float(diagonal[~dead].double().mean())
    ordered, dead_there = (hessian, dead) if order is None else (hessian[order][:, order], dead[order])
    for precision, step in _attempts(damp):
        matrix = ordered.to(precision, copy=True) / mean
        matrix.diagonal()[dead_there] = 1.0
        matrix.diagonal().add_(step)
        upper = _inverse_upper(matrix)
        if upper is not None:
            # the mean was divided out: put the scale back so that 1 / U_jj^2 is in units of the Hessian
            return Factor((upper / mean**0.5).float(), dead, step, precision, order)
    raise ValueError(f"the Hessian is not positive definite even with damp {_MAX_DAMP}: check the calibration data")


def _attempts(damp: float) -> list[tuple[torch.dtype, float]]:
    steps = [(torch.float32, damp), (torch.float64, damp)]
    raised = max(damp, 1e-4) * _DAMP_GROWTH
    while raised <= _MAX_DAMP * 1.001:
        steps.append((torch.float64, raised))
        raised *= _DAMP_GROWTH
    return steps


def _inverse_upper(matrix: Tensor) -> Tensor | None:
    """U = R^-1 with matrix = R R^T, R upper triangular; None if the matrix is not positive definite.

    One Cholesky of the reversed matrix and one triangular inverse take two thirds of the work of invert-then-factor and
    lose no digits in an explicit inverse."""
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(info) != 0:
        return None
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    upper = inverse.flip(0, 1).contiguous()
    return upper if bool(torch.isfinite(upper).all()) else None
