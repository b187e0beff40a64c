"""Arranged codes are the stored ones in another order."""

import pytest
import torch

from bitquilt.ops.bits import pack_bits
from bitquilt.ops.gpu_order import arrange, arrangeable, quad_bytes, restore


def test_planes_as_the_picture_shows_them():
    stored = torch.tensor([[0, 1, 2, 10, 11, 12], [20, 21, 22, 30, 31, 32]], dtype=torch.uint8)
    planes = arrange(stored, 0, 3, 16)
    assert planes.shape == stored.shape
    assert planes.view(-1).tolist() == [0, 1, 10, 11, 20, 21, 30, 31, 2, 12, 22, 32]


def test_quads_as_the_table_says():
    """One code that is not zero, wherever it stands."""
    row, unit = 6, 5
    for bits, column, word, bit in (
        (2, 0, 0, 8), (2, 1, 0, 24), (2, 2, 0, 10), (2, 7, 1, 26), (3, 4, 2, 8), (3, 5, 2, 24), (4, 3, 1, 24)
    ):  # fmt: skip
        codes = torch.zeros(9, 60, dtype=torch.uint8)
        codes[row, 8 * unit + column] = 1
        quads = arrange(pack_bits(codes, bits), 1, bits, 60)
        words = quads[:-64].view(torch.int32).view(bits, 3, 8)
        assert words.nonzero().tolist() == [[word, 1, unit]]
        assert int(words[word, 1, unit]) == 1 << bit
    codes[row, 8 * unit + 3], codes[row, 8 * unit + 6] = 0, 5
    words = arrange(pack_bits(codes, 3), 1, 3, 60)[:-64].view(torch.int32).view(3, 3, 8)
    assert words[:, 1, unit].tolist() == [1 << 11, 0, 1 << 11]


@pytest.mark.parametrize(
    ("grid", "bits", "rows", "width"),
    [(0, 3, 5, 128), (0, 5, 5, 256), (0, 6, 1, 128), (0, 7, 4, 128), (1, 2, 5, 100), (1, 3, 1030, 8), (1, 4, 2051, 33)],
)
def test_there_and_back(grid, bits, rows, width):
    codes = torch.randint(0, 2**bits, (rows, width), dtype=torch.uint8)
    stored = pack_bits(codes, bits)
    arranged = arrange(stored, grid, bits, width)
    assert arranged.numel() == (stored.numel() if grid == 0 else quad_bytes(bits, rows, width))
    assert torch.equal(restore(arranged, grid, bits, rows, width), stored)


def test_where_the_kernel_has_use_for_them():
    for grid, bits, group_size, width in ((0, 3, 128, 256), (0, 7, 4096, 256), (1, 2, 1, 7), (1, 4, 300, 300)):
        assert arrangeable(grid, bits, group_size, width)
    for grid, bits, group_size, width in (
        (0, 4, 128, 256), (0, 3, 64, 256), (0, 3, 128, 200), (0, 3, 128, 0), (1, 5, 1, 256), (1, 1, 1, 8), (1, 3, 1, 0),
        (2, 6, 32, 256),
    ):  # fmt: skip
        assert not arrangeable(grid, bits, group_size, width)
