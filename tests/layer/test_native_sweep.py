"""The native sweep against the Python sweep, which is its definition."""

import pytest
import torch

from bitquilt.core.types import group_slices
from bitquilt.layer.codebook_weight import LevelTables, sweep_channels
from bitquilt.layer.gptq_sweep import sweep
from bitquilt.layer.grids.shared_levels import fit_table
from bitquilt.layer.grids.uniform import fit
from bitquilt.layer.hessian import factorize
from bitquilt.ops import cpu_kernels, sweep_kernels
from bitquilt.ops.sweep_kernels import SweepBlock, fit_gains, sweep_shared, sweep_uniform

pytestmark = pytest.mark.skipif(not cpu_kernels.built(), reason="the kernels are not built")


def problem(rows, columns=72, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * columns, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    weight = torch.randn(rows, columns, generator=g) * torch.rand(columns, generator=g)
    return weight, x.t() @ x / len(x), torch.rand(rows, columns, generator=g) < 0.02


@pytest.fixture
def both(monkeypatch):
    """Call something without the kernels, then with them on one thread and on three."""

    def call(work):
        monkeypatch.setattr("bitquilt.layer.gptq_sweep._BLOCK", 24)
        with monkeypatch.context() as patched:
            patched.setattr(sweep_kernels, "usable", lambda _weight: False)
            wanted = work()
        before, found = torch.get_num_threads(), []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(work())
        torch.set_num_threads(before)
        return wanted, found

    return call


KINDS = {
    "zero": {},
    "two levels": {"bits": 1, "one_bit": "code"},
    "one bit": {"bits": 1},
    "symmetric": {"symmetric": True},
}


@pytest.mark.parametrize("rows", [7, 96, 150])
@pytest.mark.parametrize("protects", [False, True], ids=["plain", "protected"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_uniform_sweep_is_that_of_python(kind, protects, rows, both):
    weight, hessian, mask = problem(rows)
    upper, groups = factorize(hessian, 0.01).upper, group_slices(72, 16)
    options = {"bits": 3} | KINDS[kind]
    bits = options.pop("bits")

    def run():
        return sweep(weight, upper, groups, lambda _k, w: fit(w, bits, **options), mask if protects else None)

    wanted, several = both(run)
    for found in several:
        for name in ("codes", "weight", "compensated", "remainder"):
            one, other = getattr(found, name), getattr(wanted, name)
            assert (one is None and other is None) or torch.equal(one, other), name
        assert found.loss == wanted.loss


def stored_parts(weight):
    parts = [part for segment in weight.segments for part in (segment.codes, segment.scale, segment.zero)]
    return [part.view(torch.uint8) for part in parts]


@pytest.mark.parametrize("rows", [75])
@pytest.mark.parametrize("row_gains", [None, torch.float8_e4m3fn], ids=["plain", "row gains"])
@pytest.mark.parametrize("protects", [False, True], ids=["plain", "protected"])
def test_sweep_of_shared_tables_is_that_of_python(protects, row_gains, rows, both):
    """Codes, gains and values bit for bit, widths from 1 to 5 bits mixed."""
    weight, hessian, mask = problem(rows)
    weight[:, 5] = 0.0
    factor = factorize(hessian, 0.01, hessian.diagonal().argsort(descending=True))
    tables, bits = LevelTables(row_gain_dtype=row_gains), [(1, 2, 3, 5)[j % 4] for j in range(72)]
    wanted, several = both(lambda: sweep_channels(weight, bits, tables, mask & protects, factor.importance, factor))
    for found in several:
        assert all(map(torch.equal, stored_parts(found[0]), stored_parts(wanted[0])))
        assert found[1] == wanted[1]
        assert torch.equal(found[2], wanted[2])


def test_gains_of_many_columns_are_those_of_python(both):
    weight, _, mask = problem(130)
    weight[:, 3] = 0.0
    table, mass = fit_table(weight, 3), (~mask).float()
    for weighs in (mass, None):
        wanted, several = both(lambda weighs=weighs: table.fit(weight, weighs).gains)
        assert all(torch.equal(found.float(), wanted.float()) for found in several)


def test_rounding_to_free_levels_is_that_of_python(both):
    """The lower level wins a tie, levels may be equal, and columns of gain 0 hold one level."""
    weight, _, _ = problem(130)
    weight[:, 3] = 0.0
    grid = fit_table(weight, 3).fit(weight)
    middles = (grid.levels[:, 1:] + grid.levels[:, :-1]) / 2
    weight[:7] = middles.t()
    wanted, several = both(lambda: grid.encode(weight))
    assert all(torch.equal(found, wanted) for found in several)
    levels = grid.tables[0].float()
    places = torch.bucketize(weight, (levels[1:] + levels[:-1]) / 2)
    assert torch.equal(sweep_kernels.nearest(weight, levels), levels[places])


def block_of(width=4, rows=8):
    columns = torch.ones(width, rows)
    codes = torch.zeros(width, rows, dtype=torch.uint8)
    return SweepBlock(columns, columns.clone(), codes, columns.clone(), torch.eye(width))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": torch.ones(4, 8, dtype=torch.float64)}, r"columns is torch.float64 \[4, 8\]"),
        ({"codes": torch.zeros(8, 4, dtype=torch.uint8).t()}, r"codes is torch.uint8 \[4, 8\], strides \[1, 4\]"),
        ({"errors": torch.ones(3, 8)}, r"errors is torch.float32 \[3, 8\].*takes contiguous torch.float32 \[4, 8\]"),
        ({"upper": torch.eye(5)}, r"upper is torch.float32 \[5, 5\]; wanted rows of fp32 \[4, 4\]"),
        ({"kept": torch.zeros(4, 8, dtype=torch.bool)}, "without a remainder"),
    ],
)
def test_kernel_refuses_tensors_it_would_misread(change, message):
    block = SweepBlock(**(vars(block_of()) | change))
    with pytest.raises(ValueError, match=message):
        sweep_uniform(block, slice(0, 4), torch.ones(8, 1), None, 3)


def test_kernel_refuses_impossible_sizes():
    block, counted = block_of(), torch.ones(4, 8)
    with pytest.raises(ValueError, match="columns 2 to 5 of a block of 4 columns"):
        sweep_uniform(block, slice(2, 5), torch.ones(8, 1), None, 3)
    with pytest.raises(ValueError, match="codes of 9 bits; wanted 1 to 8"):
        sweep_uniform(block, slice(0, 4), torch.ones(8, 1), None, 9)
    with pytest.raises(ValueError, match="scale is"):
        sweep_uniform(block, slice(0, 4), torch.ones(7, 1), None, 3)
    with pytest.raises(ValueError, match="column 1 has table 1 of 1"):
        sweep_shared(block, [(torch.ones(4), 1.0)], [0, 1, 0, 0], counted)
    with pytest.raises(ValueError, match="a table of 1 levels; wanted 2 to 256"):
        sweep_shared(block, [(torch.ones(1), 1.0)], [0, 0, 0, 0], counted)
    with pytest.raises(ValueError, match="counted is"):
        fit_gains(torch.ones(4, 8), counted[:3], torch.ones(4), 1.0)
