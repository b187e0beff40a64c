"""The graph network: what it learns, the budget, determinism, and the allocator that it cannot beat on a table."""

from itertools import pairwise

import pytest
import torch

from bitquilt.allocation.graph_network import GraphTraining, graph_bits, network
from bitquilt.allocation.knapsack import best_bits, table_error

PALETTE = (1, 2, 3, 4)
TABLE = torch.tensor([[8, 3, 1, 0.3], [4, 2.5, 2, 1.8], [10, 2, 1.5, 1.2], [3, 1, 0.5, 0.2]], dtype=torch.float64)


def by_table(table):
    """The table's own error as the loss after the sweep."""
    return lambda bits: table_error(table.tolist(), PALETTE, bits)


def test_a_convolution_mixes_neighbours_only():
    features = torch.eye(3)
    weights = [torch.eye(3), torch.eye(3), torch.eye(3), torch.zeros(3)]
    chain = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1.0]])
    expected = chain @ chain
    torch.testing.assert_close(network(features, chain, weights), expected)
    torch.testing.assert_close(network(features, chain.to_sparse_coo(), weights), expected)


@pytest.mark.parametrize("budget", [4, 6, 8, 9, 12, 16])
def test_on_a_table_it_never_beats_the_exact_map_and_keeps_the_budget(budget):
    training = GraphTraining(steps=100)
    bits = graph_bits(TABLE, PALETTE, [1] * 4, budget, torch.eye(4), torch.eye(4), training, by_table(TABLE))
    assert sum(bits) <= budget
    optimum = best_bits(TABLE.tolist(), PALETTE, [1] * 4, budget)
    assert table_error(TABLE.tolist(), PALETTE, bits) >= table_error(TABLE.tolist(), PALETTE, optimum) - 1e-9


@pytest.mark.parametrize("budget", [256, 320])
def test_without_sweeps_the_network_learns_the_exact_map(budget):
    """From noisy features of 128 units whose errors differ by a factor of a thousand."""
    g = torch.Generator().manual_seed(budget)
    size = torch.randn(128, 1, generator=g, dtype=torch.float64)
    spread = (0.2 * torch.randn(128, 4, generator=g, dtype=torch.float64)).exp()
    table = ((1.5 * size).exp() * torch.tensor([1, 0.3, 0.08, 0.02]) * spread).sort(dim=1, descending=True).values
    features = torch.cat([size, torch.randn(128, 7, generator=g, dtype=torch.float64)], dim=1).float()
    given = table, PALETTE, [1] * 128, budget, features, torch.eye(128), GraphTraining(rounds=0), by_table(table)
    assert graph_bits(*given) == best_bits(table.tolist(), PALETTE, [1] * 128, budget)


def test_the_loss_after_the_sweep_decides_and_a_rule_ends_the_sweeps():
    """By the table every other unit wants three bits; after the sweep neighbours that differ cost more."""
    table = torch.tensor([[4, 2, 0.5, 0.4], [0.1, 0.09, 0.08, 0.07]] * 3, dtype=torch.float64)
    seen = []

    def swept(bits):
        seen.append(bits)
        return 1.0 + sum(abs(a - b) for a, b in pairwise(bits))

    given = table, PALETTE, [1] * 6, 12, torch.eye(6), torch.eye(6)
    table_only = graph_bits(*given, GraphTraining(rounds=0), swept)
    assert swept(table_only) > 4
    seen.clear()
    bits = graph_bits(*given, GraphTraining(patience=10), swept)
    assert swept(bits) == min(map(swept, list(seen))) < 0.7 * swept(table_only)
    constant = []
    graph_bits(*given, GraphTraining(patience=3), lambda bits: constant.append(bits) or 1.0)
    assert len(constant) <= 1 + 3 * GraphTraining.samples


def test_a_seed_decides_and_the_global_random_state_is_left_alone():
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    before = torch.random.get_rng_state()
    one, other = (
        graph_bits(
            TABLE, PALETTE, [8] * 4, 72, features, torch.eye(4), GraphTraining(seed=3, steps=20), by_table(TABLE)
        )
        for _ in range(2)
    )
    assert one == other
    assert torch.equal(before, torch.random.get_rng_state())


def test_zero_errors_and_bad_ones():
    zero = torch.zeros(2, 4, dtype=torch.float64)
    given = zero, PALETTE, [8, 4], 24, torch.zeros(2, 8), torch.eye(2), GraphTraining(steps=3), lambda bits: 0.0
    bits = graph_bits(*given)
    assert 8 * bits[0] + 4 * bits[1] <= 24
    zero[1, 2] = float("inf")
    with pytest.raises(ValueError, match="error of unit 1 at 3 bits is inf"):
        graph_bits(*given)
