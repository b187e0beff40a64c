"""MG-PTQ's allocator (arXiv 2501.18154): `graph_bits` trains a graph network that gives bits to columns.

The network has two graph convolutions over the column graph and a head with one logit per width. That structure is
published; sizes, loss and loss weights are our choice. The publication quantizes inside the training loop and
approximates the gradient; tabulated errors make it exact: pi_jb (e_jb - sum_c pi_jc e_jc) / t for logit_jb.

This is the only allocator with tensors, because it trains. On the table alone it cannot beat `best_bits`, which is
optimal there. It can only add a preference for maps that agree with neighbours in the graph, which shows after the
sweep.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitquilt.allocation.knapsack import repair
from bitquilt.threads import one_thread


@dataclass(frozen=True)
class GraphTraining:
    """Training settings of the network. `budget_weight`: weight of the squared distance from the mean that the budget
    allows. The softmax temperature t falls from `warm` to `cold`."""

    width: int = 64
    steps: int = 200
    learning_rate: float = 1e-3
    budget_weight: float = 5.0
    warm: float = 1.0
    cold: float = 0.1
    seed: int = 0


@one_thread()
def graph_bits(
    table: Tensor,
    palette: Sequence[int],
    widths: Sequence[int],
    budget: int,
    features: Tensor,
    adjacency: Tensor,
    training: GraphTraining,
) -> tuple[int, ...]:
    """Return bits per unit from a network trained on this layer's error table, fp64 `[n, |palette|]`.

    Single moves bring the map to the budget; exchanges would find the table's optimum and undo the network's choice.
    `features` `[n, f]`; `adjacency` normalised, sparse or dense `[n, n]`; `budget` in bits x columns.
    Raises ValueError if an error is not finite or the budget is below the smallest width everywhere.
    """
    if not bool(torch.isfinite(table).all()):
        unit, choice = torch.nonzero(~torch.isfinite(table))[0].tolist()
        raise ValueError(f"error of unit {unit} at {palette[choice]} bits is {float(table[unit, choice])}")
    table, features, adjacency = table.cpu(), features.cpu(), adjacency.cpu()  # the network is too small for a GPU
    errors = _normalised(table, palette)
    share = torch.tensor(widths, dtype=torch.float32) / sum(widths)
    prices = torch.tensor(palette, dtype=torch.float32)
    target = budget / sum(widths)
    weights = _initial(features.shape[1], training.width, len(palette), training.seed)
    optimizer = torch.optim.Adam(weights, lr=training.learning_rate)
    with torch.enable_grad():
        for step in range(training.steps):
            progress = step / max(1, training.steps - 1)
            t = training.warm * (training.cold / training.warm) ** progress
            chosen = choices(network(features, adjacency, weights), t)
            loss = (chosen * errors).sum()
            loss = loss + training.budget_weight * ((share * (chosen @ prices)).sum() - target).square()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        logits = network(features, adjacency, weights)
    bits = [palette[i] for i in logits.argmax(dim=1).tolist()]
    return repair(bits, table.tolist(), palette, widths, budget, exchange=False)


def network(features: Tensor, adjacency: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return logits `[n, |palette|]`: h <- relu(A h W) twice, then a linear head."""
    first, second, head, shift = weights
    hidden = torch.relu(_propagate(adjacency, features @ first))
    hidden = torch.relu(_propagate(adjacency, hidden @ second))
    return hidden @ head + shift


def choices(logits: Tensor, t: float) -> Tensor:
    """Return the choices `[n, |palette|]`: one-hot forwards, softmax(logits / t) backwards (straight-through)."""
    soft = torch.softmax(logits / t, dim=1)
    one = torch.zeros_like(soft).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
    return one + soft - soft.detach()


def _propagate(adjacency: Tensor, hidden: Tensor) -> Tensor:
    return torch.sparse.mm(adjacency, hidden) if adjacency.is_sparse else adjacency @ hidden


def _normalised(table: Tensor, palette: Sequence[int]) -> Tensor:
    """Divide errors by the layer's total error at two bits, or at the smallest width if the palette lacks 2."""
    reference = palette.index(2) if 2 in palette else 0
    return (table / table[:, reference].sum().clamp_min(1e-300)).float()


def _initial(features: int, width: int, outputs: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: int, columns: int) -> Tensor:
        matrix = torch.randn(rows, columns, generator=generator) * (2 / (rows + columns)) ** 0.5
        return matrix.requires_grad_()

    return [
        drawn(features, width),
        drawn(width, width),
        drawn(width, outputs),
        torch.zeros(outputs, requires_grad=True),
    ]
