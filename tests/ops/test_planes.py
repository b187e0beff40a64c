"""Planes are the stored bytes in another order."""

import pytest
import torch

from bitquilt.ops.planes import arrangeable, from_planes, to_planes


def test_three_bits_as_the_picture_shows_them():
    stored = torch.tensor([[0, 1, 2, 10, 11, 12], [20, 21, 22, 30, 31, 32]], dtype=torch.uint8)
    planes = to_planes(stored, 3)
    assert planes.shape == stored.shape
    assert planes.view(-1).tolist() == [0, 1, 10, 11, 20, 21, 30, 31, 2, 12, 22, 32]


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_there_and_back(bits):
    stored = torch.randint(0, 256, (5, 16 * bits), dtype=torch.uint8)
    planes = to_planes(stored, bits)
    assert not torch.equal(planes, stored)
    assert torch.equal(from_planes(planes, bits), stored)


def test_where_the_kernel_has_use_for_them():
    assert arrangeable(0, 3, 128, 256)
    assert arrangeable(0, 7, 4096, 256)
    for grid, bits, group_size, width in (
        (0, 4, 128, 256), (0, 3, 64, 256), (0, 3, 128, 200), (0, 3, 128, 0), (1, 3, 256, 256), (2, 6, 32, 256)
    ):  # fmt: skip
        assert not arrangeable(grid, bits, group_size, width)
