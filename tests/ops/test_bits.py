import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitquilt.ops.bits import pack_bits, packed_bytes, unpack_bits


@given(bits=st.integers(1, 8), rows=st.integers(1, 5), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_codes_survive_and_take_exactly_their_bits(bits, rows, count, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=generator)
    stream = pack_bits(codes, bits)
    assert stream.shape == (rows, packed_bytes(count, bits))
    assert torch.equal(unpack_bits(stream, bits, count), codes)


def test_the_picture_in_the_docstring():
    """Three bits: codes a..h = 1..7, 0 fill 3 bytes, least significant first."""
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    word = sum(int(code) << (3 * i) for i, code in enumerate(codes[0]))
    assert pack_bits(codes, 3).tolist() == [list(word.to_bytes(3, "little"))]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_eight_codes_fill_exactly_b_bytes_and_groups_of_eight_start_on_a_byte(bits):
    codes = torch.full((1, 8), 2**bits - 1, dtype=torch.uint8)
    assert pack_bits(codes, bits).tolist() == [[255] * bits]
    two = torch.cat([torch.zeros_like(codes), codes], dim=1)
    assert pack_bits(two, bits).tolist() == [[0] * bits + [255] * bits]


def test_the_last_byte_is_padded_with_zeros():
    assert pack_bits(torch.tensor([[1, 1, 1]], dtype=torch.uint8), 1).tolist() == [[7]]
