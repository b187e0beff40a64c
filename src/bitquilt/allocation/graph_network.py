"""MG-PTQ's allocator (arXiv 2501.18154): `graph_bits` trains a graph network that gives bits to columns.

The network has two graph convolutions over the column graph and a head with one logit per width. That structure is
published; sizes and losses are our choice. Training has two parts:

1. it learns the exact map of a table of errors, by cross-entropy. (Lowering the tabulated error of the network's own
   choices, with a penalty for a mean off the budget, ended 1.4 to 2.0 times above the exact map on 128 units whose
   errors differ as those of layers do: few units have nearly all the error, and the penalty stopped the others.)
2. in the quantization loop, as published: plans are sampled from the network and the layer is swept with each. The
   gradient of the expected swept loss is sum_k (L_k - mean of the other L) grad log p(plan_k) (score function).

Both end by a stopping rule. The result is the plan of least swept loss that was seen. No plan beats `best_bits` on the
table; what the network wins shows after the sweep.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitquilt.allocation.knapsack import best_bits, repair
from bitquilt.threads import one_thread

Bits = tuple[int, ...]
_GAIN = 1e-3  # the smallest fall of a loss that counts as one
_CHANGED = 4.0  # units that leave their likeliest width in a sample, before the budget takes half of it back


@dataclass(frozen=True)
class GraphTraining:
    """Training settings of the network.

    `steps`: the most on the table, ended by the exact map or by ten times `patience` steps without a gain of a
    thousandth. `rounds`: the most in the loop, each of `samples` plans, ended by `patience` rounds without such a gain.
    """

    width: int = 64
    steps: int = 1000
    learning_rate: float = 1e-2
    seed: int = 0
    samples: int = 4
    rounds: int = 50
    patience: int = 8


@dataclass(frozen=True, eq=False)
class _Allocator:
    """The network of one layer: its inputs, its weights, and the budget of its choices."""

    table: Tensor
    palette: Sequence[int]
    widths: Sequence[int]
    budget: int
    features: Tensor
    adjacency: Tensor
    weights: list[Tensor]
    optimizer: torch.optim.Optimizer

    def logits(self) -> Tensor:
        return network(self.features, self.adjacency, self.weights)

    def within_budget(self, choices: Tensor) -> Bits:
        """Bits of choices `[n]`, brought to the budget by single moves; exchanges would undo the network's choice."""
        bits = [self.palette[i] for i in choices.tolist()]
        return repair(bits, self.table.tolist(), self.palette, self.widths, self.budget, exchange=False)

    def sampled(self, scores: Tensor, generator: torch.Generator) -> Bits:
        """The likeliest map within the budget after Gumbel noise on the `scores` (perturb and MAP). A sample that is
        brought to the budget afterwards would lose its changes again, one by one."""
        noise = torch.rand(scores.shape, generator=generator, dtype=torch.float64).clamp_min(1e-12)
        errors = -(scores.double() - (-noise.log()).log())
        bits = best_bits(errors.tolist(), self.palette, self.widths, self.budget)
        return repair(bits, self.table.tolist(), self.palette, self.widths, self.budget, exchange=False)

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def graph_bits(
    table: Tensor,
    palette: Sequence[int],
    widths: Sequence[int],
    budget: int,
    features: Tensor,
    adjacency: Tensor,
    training: GraphTraining,
    swept: Callable[[Bits], float],
) -> Bits:
    """Return bits per unit from a network trained on this layer's error table, fp64 `[n, |palette|]`, and its sweeps.

    `features` `[n, f]`; `adjacency` normalised, sparse or dense `[n, n]`; `budget` in bits x columns; `swept(bits)`:
    the loss of the layer swept with these bits.
    Raises ValueError if an error is not finite or the budget is below the smallest width everywhere.
    """
    table, features, adjacency = table.cpu(), features.cpu(), adjacency.cpu()  # the network is too small for a GPU
    weights = _initial(features.shape[1], training.width, len(palette), training.seed)
    optimizer = torch.optim.Adam(weights, lr=training.learning_rate)
    allocator = _Allocator(table, palette, widths, budget, features, adjacency, weights, optimizer=optimizer)
    _learn_map(allocator, best_bits(table.tolist(), palette, widths, budget), training)
    return _train_on_sweeps(allocator, training, swept)


@one_thread()
def _learn_map(allocator: _Allocator, plan: Bits, training: GraphTraining) -> None:
    """Make the `plan` the network's likeliest."""
    wanted = torch.tensor([allocator.palette.index(bits) for bits in plan])
    best, waited = float("inf"), 0
    with torch.enable_grad():
        for _ in range(training.steps):
            logits = allocator.logits()
            loss = torch.nn.functional.cross_entropy(logits, wanted)
            waited = 0 if float(loss.detach()) < best * (1 - _GAIN) else waited + 1
            best = min(best, float(loss.detach()))
            if waited >= 10 * training.patience or torch.equal(logits.argmax(dim=1), wanted):
                break
            allocator.step(loss)


def _train_on_sweeps(allocator: _Allocator, training: GraphTraining, swept: Callable[[Bits], float]) -> Bits:
    """Lower the expected swept loss of sampled plans; return the best one seen, or the network's first choice."""
    generator = torch.Generator().manual_seed(training.seed)
    with torch.no_grad():
        best = allocator.within_budget(allocator.logits().argmax(dim=1))
    seen = {best: swept(best)}
    waited = 0
    for _ in range(training.rounds):
        with torch.no_grad():
            logits = allocator.logits()
        t = _exploring(logits)
        plans = [allocator.sampled(logits / t, generator) for _ in range(training.samples)]
        for plan in plans:
            if plan not in seen:
                seen[plan] = swept(plan)
        _learn(allocator, plans, [seen[plan] for plan in plans], t)
        found = min(plans, key=lambda plan: seen[plan])
        waited = 0 if seen[found] < seen[best] * (1 - _GAIN) else waited + 1
        best = min(best, found, key=lambda plan: seen[plan])
        if waited >= training.patience:
            break
    return best


def _exploring(logits: Tensor) -> float:
    """The temperature at which `_CHANGED` units on average leave their likeliest width; half of what is possible in
    small layers."""
    units, widths = logits.shape
    target = min(_CHANGED, 0.5 * units * (1 - 1 / widths))
    low, high = -20.0, 20.0  # of log t
    for _ in range(40):
        middle = (low + high) / 2
        changed = units - float(torch.softmax(logits.double() / 2.0**middle, dim=1).amax(dim=1).sum())
        low, high = (middle, high) if changed < target else (low, middle)
    return float(2.0**low)


@one_thread()
def _learn(allocator: _Allocator, plans: Sequence[Bits], losses: Sequence[float], t: float) -> None:
    """Make plans that lost less than the others of their round likelier."""
    values = torch.tensor(losses, dtype=torch.float64)
    if len(plans) < 2 or not float(values.std()) > 0:
        return
    others = (values.sum() - values) / (len(plans) - 1)
    gains = ((values - others) / values.std()).float()
    places = torch.tensor([[allocator.palette.index(bits) for bits in plan] for plan in plans])
    with torch.enable_grad():
        logs = torch.log_softmax(allocator.logits() / t, dim=1)
        likelihood = logs.unsqueeze(0).expand(len(plans), -1, -1).gather(2, places.unsqueeze(2)).sum(dim=(1, 2))
        allocator.step((gains * likelihood).mean() / places.shape[1])


def network(features: Tensor, adjacency: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return logits `[n, |palette|]`: h <- relu(A h W) twice, then a linear head."""
    first, second, head, shift = weights
    hidden = torch.relu(_propagate(adjacency, features @ first))
    hidden = torch.relu(_propagate(adjacency, hidden @ second))
    return hidden @ head + shift


def _propagate(adjacency: Tensor, hidden: Tensor) -> Tensor:
    return torch.sparse.mm(adjacency, hidden) if adjacency.is_sparse else adjacency @ hidden


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
