"""What does an error in one column cost once later columns may compensate it? factorize(hessian) -> Factor.

`hessian` is the sum of x x^T over calibration tokens; only its shape matters, never its scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_DAMP_GROWTH = 10.0
_MAX_DAMP = 10.0  # ten times the mean diagonal: beyond that the "inverse" is a diagonal and something is broken


@dataclass(frozen=True, eq=False)
class Factor:
    """`upper` fp32 `[in, in]`: U with (H + damp mean(diag H) I)^-1 = U^T U.  `dead` bool `[in]`: channels no token
    used.  `damp`: what was used in the end.  `precision`: the dtype in which the factorization succeeded."""

    upper: Tensor
    dead: Tensor
    damp: float
    precision: torch.dtype

    @property
    def importance(self) -> Tensor:
        """`[in]`, 1 / U_jj^2: the cost of a unit error in column j when only later columns compensate (OBS)."""
        return self.upper.diagonal().square().reciprocal()

    @property
    def inverse_diagonal(self) -> Tensor:
        """`[in]`, diagonal of the inverse Hessian: column sums of U^2."""
        return self.upper.square().sum(dim=0)


def factorize(hessian: Tensor, damp: float) -> Factor:
    """Factor a Hessian `[in, in]`; tries fp32, then float64, then ten times the damp, step by step.

    Dead channels (diagonal 0) get the mean diagonal, which cannot touch the others and keeps the result
    independent of the Hessian's scale. Raises ValueError if it is not finite or never becomes positive definite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian holds NaN or Inf: an activation overflowed; calibrate in a wider dtype")
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    if bool(dead.all()):
        mean = 1.0
    else:
        mean = float(diagonal[~dead].double().mean())
    for precision, step in _attempts(damp):
        matrix = hessian.to(precision, copy=True) / mean
        matrix.diagonal()[dead] = 1.0
        matrix.diagonal().add_(step)
        upper = _inverse_upper(matrix)
        if upper is not None:
            # the mean was divided out: put the scale back so that 1 / U_jj^2 is in units of the Hessian
            return Factor((upper / mean**0.5).float(), dead, step, precision)
    raise ValueError(f"the Hessian is not positive definite even with damp {_MAX_DAMP}: check the calibration data")


def _attempts(damp: float) -> list[tuple[torch.dtype, float]]:
    steps = [(torch.float32, damp), (torch.float64, damp)]
    raised = max(damp, 1e-4) * _DAMP_GROWTH
    while raised <= _MAX_DAMP * 1.001:
        steps.append((torch.float64, raised))
        raised *= _DAMP_GROWTH
    return steps


def _inverse_upper(matrix: Tensor) -> Tensor | None:
    """U = R^-1 with matrix = R R^T, R upper triangular: one Cholesky of the reversed matrix and one triangular
    inverse, two thirds of the work of invert-then-factor and no explicit inverse to lose digits in."""
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(info) != 0:
        return None
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    upper = inverse.flip(0, 1).contiguous()
    return upper if bool(torch.isfinite(upper).all()) else None
