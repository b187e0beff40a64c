"""Rows of a table: what their widths cost, and the parts that are stored."""

import pytest
import torch

from bitquilt.layer.table import RowUse, row_losses, solve_rows

ROWS, WIDTH = 48, 32


def use_of(made: torch.Tensor, read: torch.Tensor) -> RowUse:
    generator = torch.Generator().manual_seed(3)
    x, g = torch.randn(2, 256, WIDTH, generator=generator)
    x = x * torch.linspace(0.1, 2, WIDTH)
    gradients = g.t() @ g
    return RowUse(made, x.t() @ x / 256, read, gradients / gradients.trace())


@pytest.fixture
def weight():
    return 0.1 * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def test_losses_fall_with_bits_and_follow_the_use_of_a_row(weight):
    made = torch.logspace(-4, -1, ROWS)
    losses = row_losses(weight, use_of(made, torch.zeros(ROWS)), (2, 3, 4, 5, 6, 8), 16)
    assert bool((losses.diff(dim=1) <= 0).all())
    assert bool((losses[:, 0] > 0).all())
    assert losses[-8:].mean() > 50 * losses[:8].mean()
    # beyond five bits by the step
    torch.testing.assert_close(losses[:, 4] / losses[:, 3], torch.full((ROWS,), (31 / 63) ** 2), rtol=0.05, atol=0)


def test_small_errors_cost_half_their_square(weight):
    """At 8 bits the loss of a head is that of the quadratic form, to rounding."""
    use = use_of(torch.full((ROWS,), 0.02), torch.zeros(ROWS))
    losses = row_losses(weight, use, (8,), 16)
    errors = weight - dequantized(solve_rows(weight, torch.full((ROWS,), 8, dtype=torch.uint8), use, 16))
    exact = 0.5 * 0.02 * torch.einsum("ri,ij,rj->r", errors, use.products, errors)
    assert 0.3 < float(losses.sum() / exact.sum()) < 3


def test_large_errors_of_logits_cost_more_than_their_square(weight):
    use = use_of(torch.full((ROWS,), 0.02), torch.zeros(ROWS))
    once, scaled = row_losses(weight, use, (2,), 16), row_losses(weight * 5, use, (2,), 16)
    assert float(scaled.sum() / once.sum()) > 1.5 * 25


def test_solved_rows_are_better_than_rounded_ones_where_inputs_are_correlated(weight):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, 6, generator=generator) @ torch.randn(6, WIDTH, generator=generator)
    use = RowUse(torch.full((ROWS,), 0.01), x.t() @ x / 400, torch.zeros(ROWS), torch.zeros(WIDTH, WIDTH))
    bits = torch.full((ROWS,), 3, dtype=torch.uint8)

    def error(solved) -> float:
        difference = weight - dequantized(solved)
        return float(torch.einsum("ri,ij,rj->", difference, use.products, difference))

    assert error(solve_rows(weight, bits, use, 16)) < 0.5 * error(solve_rows(weight, bits, None, 16))


def test_every_row_is_in_the_part_of_its_width(weight):
    bits = torch.tensor([2, 5, 8] * (ROWS // 3), dtype=torch.uint8)
    solved = solve_rows(weight, bits, None, 16)
    for width, part in solved.items():
        assert part.rows is not None
        assert torch.equal(part.rows, bits == width)
        assert part.layout.segments[0][0].bits == width
        assert part.layout.of_rows == ROWS


def test_a_table_that_no_token_used_is_still_solved(weight):
    none = RowUse(torch.zeros(ROWS), torch.zeros(WIDTH, WIDTH), torch.zeros(ROWS), torch.zeros(WIDTH, WIDTH))
    losses = row_losses(weight, none, (2, 4), 16)
    assert bool(torch.isfinite(losses).all())
    assert len(solve_rows(weight, torch.full((ROWS,), 4, dtype=torch.uint8), none, 16)) == 1


def dequantized(solved) -> torch.Tensor:
    found = torch.zeros(ROWS, WIDTH)
    for part in solved.values():
        (segment,) = part.segments
        scale = segment.scale.float().repeat_interleave(segment.format.group_size, dim=1)[:, :WIDTH]
        found[part.rows] = scale * (segment.codes.float() - (2**segment.format.bits - 1) / 2)
    return found
