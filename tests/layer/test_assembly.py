"""The assembly into segments, and the way back: what a stored weight was made of."""

import pytest
import torch

from bitquilt.core.types import LayerPlan, group_slices
from bitquilt.layer.assembly import assemble, disassemble
from bitquilt.layer.grids.uniform import RangeSearch, fit
from bitquilt.layer.nearest import round_to_nearest


@pytest.mark.parametrize("bits", [(2, 2, 2), (3, 2, 4), (1, 3, 1), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_stored_weight_comes_apart_into_what_it_was_made_of(bits: tuple[int, ...], symmetric: bool) -> None:
    """Mixed widths in any order, a ragged last group, one-bit groups with and without an offset."""
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    groups, plan = group_slices(40, 16), LayerPlan(bits, 16)
    one_bit = "symmetric" if symmetric else "code"
    swept = round_to_nearest(
        weight,
        groups,
        lambda k, c: fit(c, bits[k], search=RangeSearch(), symmetric=symmetric, one_bit=one_bit),
    )
    back = disassemble(assemble(swept, plan), plan, weight)
    assert torch.equal(back.codes, swept.codes)
    torch.testing.assert_close(back.weight, swept.weight)
    for one, other in zip(back.grids, swept.grids, strict=True):
        assert one.bits == other.bits
        assert torch.equal(one.scale, other.scale)
        assert (one.zero is None) == (other.zero is None)
        assert one.zero is None or torch.equal(one.zero, other.zero)
    assert back.compensated is weight
