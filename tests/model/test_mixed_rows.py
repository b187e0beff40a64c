"""Tables in parts of different widths: lookups, products and index tensors agree with the dequantized table."""

import copy
import pickle

import pytest
import torch

from bitquilt.core.packing import check_indices, layout_from_json, layout_to_json, pack, tensor_specs, unpack
from bitquilt.layer.table import solve_rows
from bitquilt.model.tables.mixed_rows import MixedEmbedding, MixedHead

ROWS, WIDTH = 41, 24


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, WIDTH, generator=generator)
    bits = torch.randint(2, 5, (ROWS,), generator=generator, dtype=torch.uint8)
    solved = solve_rows(weight, bits, None, 16)
    assert set(solved) == {2, 3, 4}
    return {f"rows_{width}": (pack(part), part.layout) for width, part in solved.items()}, weight


def test_lookups_and_products_are_those_of_the_dequantized_table(parts):
    packed, weight = parts
    table, head = MixedEmbedding.of(packed), MixedHead.of(packed)
    dense = table.dequantize()
    assert 0.001 < float((dense - weight).square().mean() / weight.square().mean()) < 0.1
    ids = torch.randint(0, ROWS, (3, 5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(table(ids), dense[ids])
    assert table(torch.zeros(0, dtype=torch.int64)).shape == (0, WIDTH)
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(2))
    for made in (table.project(x), head(x)):
        torch.testing.assert_close(made, x @ dense.t(), rtol=1e-4, atol=1e-4)


def test_a_compiled_lookup_reads_the_same_rows(parts):
    table = MixedEmbedding.of(parts[0])
    ids = torch.arange(ROWS)
    # what a GPU and torch.compile take: shapes do not depend on the tokens
    owner, place, _ = table.places
    homes = [(table.parts[owner[i]], place[i]) for i in ids]
    rows = torch.stack([part(row.clamp(max=part.out_features - 1)) for part, row in homes])
    assert torch.equal(table(ids), rows)
    compiled = torch.compile(table, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids), table(ids))


def test_copies_and_pickles_compute_the_same(parts):
    table = MixedEmbedding.of(parts[0])
    ids = torch.arange(ROWS)
    before = table(ids)
    for other in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert torch.equal(other(ids), before)
    assert table.to(torch.bfloat16)(ids).dtype == torch.bfloat16


def test_parts_that_do_not_make_a_table_are_refused(parts):
    packed, _ = parts
    fewer = {name: layout for name, (_, layout) in packed.items() if name != "rows_3"}
    with pytest.raises(ValueError, match="do not make up one table"):
        MixedEmbedding(fewer)
    names = list(packed)
    tensors, layout = packed[names[0]]
    damaged = {**tensors, "rows": tensors["rows"].roll(1)}
    table = MixedEmbedding.of({**packed, names[0]: (damaged, layout)})
    with pytest.raises(ValueError, match="parts of the table; wanted one"):
        table(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"rows names \d+ rows"):
        check_indices({**tensors, "rows": torch.zeros_like(tensors["rows"])}, layout, "table")


def test_a_part_is_packed_and_described_without_loss(parts):
    for tensors, layout in parts[0].values():
        assert layout_from_json(layout_to_json(layout)) == layout
        again = pack(unpack(tensors, layout))
        assert again.keys() == tensor_specs(layout).keys()
        assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    with pytest.raises(ValueError, match="cannot be part of a table"):
        layout_from_json({**layout_to_json(layout), "of_rows": layout.out_features - 1})
