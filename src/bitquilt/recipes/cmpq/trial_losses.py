"""`Trial` rounds a layer's weights to free levels on trial: to rank outliers and to compare ways to spend bits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitquilt.layer.codebook_weight import LevelTables, round_channels
from bitquilt.layer.outliers import activation_outliers, error_outliers

_ROWS = 512  # rows of a layer that a trial rounds: enough to rank by


def some_rows(weight: Tensor) -> Tensor:
    """An even choice of the rows of `[out, in]`."""
    return weight[:: -(-len(weight) // _ROWS)].contiguous()


@dataclass(frozen=True, eq=False)
class Trial:
    """`norms`: a_j; `cost`: of a unit error in each channel at the output, by which shared tables are fitted too; both
    fp32 `[in]`. Counts of outliers are those of O_act and O_q."""

    norms: Tensor
    cost: Tensor

    def protected(self, weight: Tensor, bits: Sequence[int], tables: LevelTables, counts: tuple[int, int]) -> Tensor:
        """O_act and O_q of these sizes together, bool `[out, in]`: O_q is ranked by tables fitted without O_act."""
        if counts[1]:
            return self.tried(weight, bits, tables, counts)[0]
        return self._contributing(weight, counts[0])

    def tried(
        self, weight: Tensor, bits: Sequence[int], tables: LevelTables, counts: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The protected weights, and the weight rounded by tables fitted without O_act, both `[out, in]`."""
        chosen = self._contributing(weight, counts[0])
        rounded = round_channels(weight, bits, tables, chosen, self.cost)[1]
        if counts[1]:
            chosen = chosen | error_outliers(weight, rounded, self.norms, counts[1], chosen)
        return chosen, rounded

    def loss(self, weight: Tensor, bits: Sequence[int], tables: LevelTables, counts: tuple[int, int] = (0, 0)) -> float:
        """Sum of cost_j (w - Q(w))^2 over all weights but the outliers."""
        protected = self.protected(weight, bits, tables, counts)
        rounded = round_channels(weight, bits, tables, protected, self.cost)[1]
        difference = (weight - rounded).masked_fill(protected, 0.0).double().square()
        return float(difference.sum(dim=0) @ self.cost.double())

    def gain_per_row_pays(self, weight: Tensor, bits: int, tables: LevelTables) -> bool:
        """Return whether a gain per row, all channels at `bits`, saves more than its bytes would as bits of the codes.

        It costs 8 / in bits per weight, and one bit more for every code quarters the squared error.
        """
        size = 8 * tables.gain_dtype.itemsize / weight.shape[1]
        rows, plan = some_rows(weight), [bits] * weight.shape[1]
        with_gains = self.loss(rows, plan, replace(tables, row_gain_dtype=tables.gain_dtype))
        return with_gains * 4.0**size < self.loss(rows, plan, replace(tables, row_gain_dtype=None))

    def table(self, weight: Tensor, widths: Sequence[int], tables: LevelTables, act_share: float) -> list[list[float]]:
        """Loss of each channel at each of `widths`, without O_act."""
        rows = some_rows(weight)
        mass = (~activation_outliers(rows, self.norms, act_share)).float()
        seen, counted, _ = tables.over_row_gains(rows, mass)
        columns = []
        for bits in widths:
            fit = tables.fitter(seen, bits, counted, self.cost)
            error = (seen - fit(seen, counted).quantize(seen)).double().square() * counted
            columns.append(self.cost.double() * error.sum(dim=0))
        found: list[list[float]] = torch.stack(columns, dim=1).tolist()
        return found

    def _contributing(self, weight: Tensor, count: int) -> Tensor:
        """O_act of this size."""
        if not count:
            return torch.zeros_like(weight, dtype=torch.bool)
        return activation_outliers(weight, self.norms, count / weight.numel())
