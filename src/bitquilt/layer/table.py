"""Tables whose rows are not used alike, embeddings and heads: `row_losses` says what widths cost, `solve_rows` stores.

Row r of a tied table makes a logit and is looked up. An error e in it moves the logit by N(0, s), s = e H e^T, which
costs p (exp(s / 2) - 1) nats per token where the token has probability p: to second order p s / 2, as in
`sensitivity.kfac`, but the logits of rare tokens have errors of more than a nat at 2 bits. (SmolLM2 with rows of 2 to 6
bits: the second-order loss is 0.12, the measured KL 2.2.) As a row looked up, e costs l e G e^T / 2. p and l follow
the frequency of the token, which differs by orders of magnitude; H and G are the same for all rows. The solver is the
GPTQ sweep (arXiv 2210.17323) for the mixture of H and G that the rows of a part see.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitquilt.core.types import QuantizedWeight, Segment, group_slices
from bitquilt.layer.gptq_sweep import sweep
from bitquilt.layer.grids.uniform import RangeSearch, UniformGrid, fit_range, scale_dtype_for
from bitquilt.layer.hessian import Factor, factorize
from bitquilt.layer.nearest import round_groups, round_symmetric
from bitquilt.layer.sensitivity.kfac import MEASURED_WIDTHS

DAMP = 0.01
# Ranges tried for the grid of a row and group; for groups of 32 the best is between 0.6 (2 bits) and 1 (8 bits).
_SEARCH = RangeSearch(tuple(round(1.0 - 0.04 * i, 2) for i in range(12)))
_COARSE = RangeSearch((1.0, 0.7, 0.8, 0.9))
_FLOOR = 0.01  # least weight of a row, as a share of the mean
_LARGEST = 30.0  # exponent, beyond which fp32 ends
_ROWS = 16384  # rows at once: they are independent, and a large vocabulary would not fit in fp32


@dataclass(frozen=True, eq=False)
class RowUse:
    """How much the rows of a table matter. `products` fp32 `[width, width]`: mean x x^T of the head's inputs, `made`
    `[rows]`: mean p (1 - p) of each logit, its Fisher information; both zero for a table that makes no logits.
    `gradients` `[width, width]`: mean g g^T at the rows looked up, with trace 1, `read` `[rows]`: expected |g|^2 of a
    row per token; zero for one that is not looked up."""

    made: Tensor
    products: Tensor
    read: Tensor
    gradients: Tensor

    def factor(self, rows: Tensor | slice = slice(None)) -> Factor:
        """The factor of the mixture of Hessians that `rows` see; of the identity where no token reached any."""
        mixture = self.made[rows].sum() * self.products + self.read[rows].sum() * self.gradients
        return factorize(mixture if float(mixture.trace()) > 0 else torch.eye(len(mixture)), DAMP)


def row_losses(weight: Tensor, use: RowUse, widths: Sequence[int], group_size: int) -> Tensor:
    """Return what each width costs every row, fp32 `[rows, len(widths)]` in nats per token; `widths` ascending.

    `weight` `[rows, width]`. Beyond 5 bits the error falls as the square of the step.
    """
    importance = use.factor().importance
    head, lookup = (float(w.sum() * m.trace()) for w, m in ((use.made, use.products), (use.read, use.gradients)))
    of_head = head / max(head + lookup, 1e-30)
    made, read = (_at_least(w) for w in (use.made, use.read))
    parts = []
    for start in range(0, len(weight), _ROWS):
        part = slice(start, start + _ROWS)
        rows = weight[part].float()
        errors: dict[int, Tensor] = {}
        for bits in widths:
            if bits > MEASURED_WIDTHS and errors:
                errors[bits] = errors[max(errors)] * ((2 ** max(errors) - 1) / (2**bits - 1)) ** 2
            else:
                rounded = round_groups(rows, bits, group_size, importance, _COARSE, symmetric=True)
                errors[bits] = (rows - rounded).square_() @ importance
        error = torch.stack([errors[bits] for bits in widths], dim=1)
        moved = error * (of_head / use.made.sum().clamp_min(1e-30))
        logits = made[part, None] * torch.expm1((moved / 2).clamp(max=_LARGEST))
        lookups = read[part, None] * error * (0.5 * (1 - of_head) / use.read.sum().clamp_min(1e-30))
        parts.append(torch.cummin(logits + lookups, dim=1).values)
    return torch.cat(parts)


def _at_least(weights: Tensor) -> Tensor:
    """Weights of rows `[rows]` with a floor: text of another kind may use a row that calibration did not."""
    return weights.clamp_min(_FLOOR * float(weights.mean()))


def solve_rows(weight: Tensor, bits: Tensor, use: RowUse | None, group_size: int) -> dict[int, QuantizedWeight]:
    """Store a table `[rows, width]` with `bits` uint8 `[rows]` per code: a part for each width, by width.

    Symmetric grids, one scale per row and group. Without `use` every weight is rounded to nearest.
    """
    found = {}
    for width in sorted(set(bits.tolist())):
        mine = bits == width
        part = weight[mine]
        if use is None:
            segment = round_symmetric(part, width, group_size).segments[0]
        else:
            segment = _swept(part, width, use.factor(mine), group_size)
        found[width] = QuantizedWeight((segment,), rows=mine)
    return found


def _swept(weight: Tensor, bits: int, factor: Factor, group_size: int) -> Segment:
    groups = group_slices(weight.shape[1], group_size)
    dtype, importance = scale_dtype_for(weight), factor.importance

    def fit_group(k: int, columns: Tensor) -> UniformGrid:
        return fit_range(columns, bits, importance[groups[k]], search=_SEARCH, symmetric=True, scale_dtype=dtype)

    parts = []
    for rows in weight.split(_ROWS):
        swept = sweep(rows.float(), factor.upper, groups, fit_group)
        parts.append(UniformGrid.segment(swept.grids, swept.codes, group_size))
    codes, scale = (torch.cat(tensors) for tensors in zip(*((p.codes, p.scale) for p in parts), strict=True))
    return Segment(parts[0].format, codes, scale)
