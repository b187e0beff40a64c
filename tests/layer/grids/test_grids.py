"""The protocol of grids: whatever `GRID_CLASSES` holds is swept, stored, taken apart again and packed."""

import pytest
import torch

from bitquilt.core.packing import pack, unpack
from bitquilt.core.types import GRID_KINDS, LayerPlan, group_slices
from bitquilt.layer.assembly import assemble, disassemble
from bitquilt.layer.gptq_sweep import sweep
from bitquilt.layer.grids import GRID_CLASSES
from bitquilt.layer.grids.blocks import UnitFit
from bitquilt.layer.grids.codebook import fit_codebook
from bitquilt.layer.grids.mx import element_for, fit_mx
from bitquilt.layer.grids.shared_levels import fit_table
from bitquilt.layer.grids.uniform import fit
from bitquilt.layer.hessian import factorize
from bitquilt.ops.block_types import BLOCK_TYPES

WEIGHT = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
SHARED = {bits: fit_table(WEIGHT, bits) for bits in (2, 3)}
CASES = {
    "uniform": (32, lambda columns, bits: fit(columns, bits), (3, 2, 3)),
    "codebook": (1, lambda columns, bits: fit_codebook(columns, bits), (3, 2, 2) * 32),
    "codebook, shared": (1, lambda columns, bits: SHARED[bits].fit(columns), (3, 2, 2) * 32),
    "mx": (32, lambda columns, bits: fit_mx(columns, element_for(bits)), (6, 4, 8)),
    "mx_e2m3": (32, lambda columns, bits: fit_mx(columns, element_for(bits, "e2m3")), (6, 6, 6)),
}


def test_every_grid_has_a_class_and_a_case_here():
    assert {name.split(",")[0] for name in CASES} | set(BLOCK_TYPES) == set(GRID_CLASSES) == set(GRID_KINDS)


@pytest.mark.parametrize("name", CASES)
def test_a_grid_is_swept_stored_and_taken_apart(name):
    group_size, fit_grid, bits = CASES[name]
    inputs = torch.randn(300, 96, generator=torch.Generator().manual_seed(1))
    factor = factorize(inputs.t() @ inputs / 300, 0.01)
    groups = group_slices(96, group_size)
    swept = sweep(WEIGHT, factor.upper, groups, lambda k, columns: fit_grid(columns, bits[k]))
    for group, grid in zip(groups, swept.grids, strict=True):
        assert torch.equal(grid.decode(swept.codes[:, group].float()), swept.weight[:, group])
        assert torch.equal(grid.quantize(swept.weight[:, group]), swept.weight[:, group])
    plan = LayerPlan(bits, group_size)
    stored = assemble(swept, plan)
    assert {segment.format.grid for segment in stored.segments} == {name.split(",")[0]}
    assert [segment.format.bits for segment in stored.segments] == sorted(set(bits))
    back = disassemble(unpack(pack(stored), stored.layout), plan, WEIGHT)
    assert torch.equal(back.codes, swept.codes)
    assert torch.equal(back.weight, swept.weight)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_runs_of_blocks_are_swept_stored_and_taken_apart(name):
    kind, random = BLOCK_TYPES[name], torch.Generator().manual_seed(2)
    weight, inputs = torch.randn(8, 256, generator=random), torch.randn(600, 256, generator=random)
    factor = factorize(inputs.t() @ inputs / 600, 0.01)
    groups, fit_run = group_slices(256, kind.run), UnitFit(weight, kind, factor.importance)
    swept = sweep(weight, factor.upper, groups, lambda k, c: fit_run(groups[k], c, kind.bits, torch.float16))
    plan = LayerPlan((kind.bits,) * len(groups), kind.run)
    stored = assemble(swept, plan)
    back = disassemble(unpack(pack(stored), stored.layout), plan, weight)
    assert torch.equal(back.codes, swept.codes)
    assert torch.equal(back.weight, swept.weight)
