"""`TableUse` finds how much the rows of embedding and head matter, alongside the passes of `measure_sensitivities`.

Logits: the Fisher information of logit r is p_r (1 - p_r), whatever the label. Lookups: a row's gradients come from the
tokens of the calibration, but few rows occur there. How often a row will be read is taken from the model itself, whose
mean probability of a token is known for all of them; the squared gradient of a rare row is drawn to the mean of all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bitquilt.core.types import check_finite
from bitquilt.errors import UserError
from bitquilt.layer.table import RowUse, row_losses
from bitquilt.model.free_tables import TABLE_GROUP_SIZE, Table
from bitquilt.model.hooks import hooked
from bitquilt.model.linear import linear_weight
from bitquilt.model.structure import Skeleton
from bitquilt.planning.sensitivities import RowLosses

_PRIOR = 4.0  # occurrences that the mean squared gradient of all rows counts for in that of one row


class TableUse:
    """Sums over the calibration tokens for `tables`. Call in order: `watching`, `add_logits`; then `add_lookups`."""

    def __init__(self, skeleton: Skeleton, tables: Sequence[Table]) -> None:
        self.skeleton, self.tables = skeleton, tuple(tables)
        self.head = next((t for t in self.tables if t.kind == "head" or t.tied), None)
        self.embedding = next((t for t in self.tables if t.kind == "embedding"), None)
        self.tokens = 0
        if self.tables:
            rows, width = self.tables[0].rows, self.tables[0].columns
            self._mass, self._made = torch.zeros(rows), torch.zeros(rows)
            self._products, self._gradients = torch.zeros(width, width), torch.zeros(width, width)
            self._squares, self._counts = torch.zeros(rows), torch.zeros(rows)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sum x x^T of the head's inputs while the context is open."""
        head = self.skeleton.model.get_output_embeddings()
        if self.head is None or head is None:
            yield
            return

        def add(x: Tensor) -> None:
            flat = x.detach().reshape(-1, x.shape[-1]).float()
            self._products.addmm_(flat.t(), flat)

        with hooked(before=[(head, add)]):
            yield

    def add_logits(self, probabilities: Tensor) -> None:
        """Add the predicted `probabilities` fp32 `[tokens, vocabulary]` of a batch."""
        if self.tables and probabilities.shape[1] == len(self._mass):
            mass = probabilities.sum(dim=0)
            self._mass += mass
            # in parts: a norm over the rows of the whole matrix took five times as long, its squares as much memory
            self._made += mass - sum(part.square().sum(dim=0) for part in probabilities.split(64))
            self.tokens += len(probabilities)

    def add_lookups(self, ids: Tensor, gradients: Tensor) -> None:
        """Add the loss's `gradients` `[batch, tokens, width]` at the rows looked up for `ids` `[batch, tokens]`."""
        flat, rows = gradients.reshape(-1, gradients.shape[-1]).float(), ids.reshape(-1)
        self._gradients.addmm_(flat.t(), flat)
        self._squares.index_add_(0, rows, flat.square().sum(dim=1))
        self._counts.index_add_(0, rows, torch.ones(len(rows)))

    def losses(self, widths: Sequence[int]) -> dict[str, RowLosses]:
        """Return the losses of all tables, whose weights are in memory, by path. Raises UserError if not finite."""
        found = {}
        for table in self.tables:
            weight = linear_weight(self.skeleton.model.get_submodule(table.path))
            use = self._use(table)
            try:
                check_finite(table.path, weight=weight)
                losses = row_losses(weight, use, widths, TABLE_GROUP_SIZE)
                check_finite(table.path, losses=losses)
            except ValueError as error:
                raise UserError(f"{error}; check the model, or leave it in 16 bits with --keep-embedding") from None
            order = losses[:, 0].argsort(descending=True, stable=True).int()
            found[table.path] = RowLosses(losses.numpy(), tuple(widths), order.numpy(), use)
        return found

    def _use(self, table: Table) -> RowUse:
        none, empty = torch.zeros(table.rows), torch.zeros(table.columns, table.columns)
        made, products, read, gradients = none, empty, none, empty
        tokens = max(self.tokens, 1)
        if table is self.head:
            made, products = self._made / tokens, self._products / tokens
        if table is self.embedding:
            total, counted = self._squares.sum(), self._counts.sum().clamp_min(1.0)
            mass = self._mass if self.tokens else self._counts
            share = mass / mass.sum().clamp_min(1e-30)
            read = share * (self._squares + _PRIOR * total / counted) / (self._counts + _PRIOR)
            gradients = self._gradients / self._gradients.trace().clamp_min(1e-30)
        return RowUse(made, products, read, gradients)
