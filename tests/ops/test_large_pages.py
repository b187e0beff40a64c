"""Weights in large pages are copies with storages of their own."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitquilt.ops.large_pages import place, reserve


def test_copies_keep_shape_type_and_contents(tmp_path):
    tensors = [torch.arange(7, dtype=torch.uint8), torch.randn(3, 5).half(), torch.empty(0), torch.randn(600, 700)]
    copies = place(tensors)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)
        if tensor.numel():
            assert copy.data_ptr() % 64 == 0
            assert copy.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    copies[1].zero_()
    assert tensors[1].any()
    save_file({"a": copies[0], "b": copies[3]}, tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["b"], tensors[3])


def test_more_than_a_chunk_and_what_outlives_it():
    large = torch.zeros(40 * 2**20, dtype=torch.uint8)
    first, second = place([large, torch.ones(5)])
    assert first.shape == large.shape
    del first
    assert second.tolist() == [1.0] * 5


def resident():
    """Bytes of the process's memory that are a file's."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile"))


@pytest.mark.parametrize("written", [False, True])
def test_pages_of_a_file_are_given_back_and_can_be_read_again(tmp_path, written):
    """But for those that were written to: they are nowhere else."""
    path, size = tmp_path / "x", 2**24
    path.write_bytes(torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes())
    mapped = torch.from_file(str(path), size=size, dtype=torch.uint8)
    if written:
        mapped.data[size // 2] += 1
    expected = mapped.clone()
    before = resident()
    (copy,) = place([mapped])
    given_back = before - resident()
    assert given_back < size / 2 if written else given_back > size / 2
    assert torch.equal(copy, expected)
    assert torch.equal(mapped, expected)


def test_reserved_memory_can_be_written():
    assert reserve(3 * 2**20).fill_(7).sum() == 7 * 3 * 2**20


def test_copies_made_in_inference_mode_are_ordinary_tensors():
    with torch.inference_mode():
        (copy,) = place([torch.ones(3)])
    assert not copy.is_inference()
