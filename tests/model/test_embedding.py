"""Rows of an embedding are found without keeping the pages around them."""

import sys

import pytest
import torch
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from bitquilt.core.types import QuantizedWeight
from bitquilt.model.replace import lookup
from bitquilt.model.tables.embedding import QuantizedEmbedding, lookup_scale, scaled
from tests.ops.test_large_pages import resident
from tests.weights import uniform_segment


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows whose pages they are")
def test_a_lookup_keeps_no_pages_of_a_file(tmp_path):
    """Each of 64 rows, 128 KiB apart, would keep at least 16 pages around it."""
    path, shape = tmp_path / "table", (1024, 2048)
    path.write_bytes(torch.randn(shape).numpy().tobytes())
    table = torch.nn.Embedding(*shape, _weight=torch.from_file(str(path), size=1024 * 2048).view(shape))
    ids = torch.arange(0, 1024, 16)
    lookup(table, ids[:1])
    before = resident()
    found = lookup(table, ids)
    assert resident() - before < 2**20
    assert torch.equal(found, table(ids))
    assert torch.equal(lookup(table, torch.tensor([1023])), table.weight[1023:])


def test_a_lookup_in_few_bits():
    table = QuantizedEmbedding.from_weight(QuantizedWeight((uniform_segment(4, 32, 16, symmetric=True, rows=40),)))
    ids = torch.tensor([3, 39, 0, 3, 7, 8, 9, 10, 11, 12])
    assert torch.equal(lookup(table, ids), table(ids))


class Shifted(torch.nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2 + 1


def test_the_scale_of_an_embedding_is_found_without_its_weights():
    with torch.device("meta"):
        gemma, bart = Gemma3TextScaledWordEmbedding(50, 16, 0, 4.0), BartScaledWordEmbedding(50, 16, 1, 0.5)
        assert [lookup_scale(table) for table in (torch.nn.Embedding(50, 16), gemma, bart)] == [1.0, 4.0, 0.5]
        assert gemma.weight.is_meta
        assert gemma.padding_idx == 0
        assert lookup_scale(Shifted(50, 16)) is None
        assert lookup_scale(torch.nn.Embedding(50, 16, max_norm=1.0)) is None
    assert lookup_scale(torch.nn.Linear(4, 4)) is None
    assert torch.equal(scaled(torch.ones(2, dtype=torch.bfloat16), 640**0.5), torch.full((2,), 25.25).bfloat16())
