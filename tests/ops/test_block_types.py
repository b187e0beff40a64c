"""Block types against `gguf`'s own dequantization: every bit of heads and codes is used."""

import pytest
import torch

from bitquilt.ops.block_types import BLOCK_TYPES, decode_blocks, file_bytes, read_heads, write_heads
from bitquilt.ops.reference import dequantize


def random_blocks(name):
    """Codes `[3, 4 blocks]` and heads of random bytes, with finite units."""
    kind, rows, blocks = BLOCK_TYPES[name], 3, 4
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**kind.bits, (rows, blocks * kind.columns), generator=random, dtype=torch.uint8)
    heads = torch.randint(0, 256, (rows, blocks * kind.head), generator=random, dtype=torch.uint8)
    scales = read_heads(heads, kind)
    units = {"d": torch.randn(scales.d.shape, generator=random).half()}
    if scales.dmin is not None:
        units["dmin"] = torch.randn(scales.d.shape, generator=random).half()
    return codes, write_heads(type(scales)(**{**vars(scales), **units}), kind), kind


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_gguf_reads_what_we_compute(name):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    codes, heads, kind = random_blocks(name)
    assert gguf.GGMLQuantizationType[name.upper()] == kind.ggml
    assert gguf.GGML_QUANT_SIZES[kind.ggml] == (kind.columns, kind.block_bytes)
    theirs = gguf.dequantize(file_bytes(codes, heads, kind).numpy(), gguf.GGMLQuantizationType(kind.ggml))
    assert torch.equal(decode_blocks(codes, heads, kind), torch.from_numpy(theirs))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_heads_come_back_byte_for_byte(name):
    _, heads, kind = random_blocks(name)
    assert torch.equal(write_heads(read_heads(heads, kind), kind), heads)


def test_the_operator_knows_the_grid():
    from bitquilt.ops.bits import pack_bits

    codes, heads, kind = random_blocks("q3_k")
    layout = [kind.grid, kind.bits, kind.columns, codes.shape[1]]
    nothing = (None, 0, None, None, None)
    found = dequantize([pack_bits(codes, kind.bits)], [heads], [heads[:0]], layout, *nothing, len(codes))
    assert torch.equal(found, decode_blocks(codes, heads, kind))
