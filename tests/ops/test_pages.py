"""Weights in large pages are copies with storages of their own."""

import torch
from safetensors.torch import load_file, save_file

from bitquilt.ops.pages import place, reserve


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


def test_pages_of_a_file_can_be_read_again(tmp_path):
    values = torch.randint(0, 256, (2**20,), dtype=torch.uint8)
    save_file({"x": values}, tmp_path / "x.safetensors")
    mapped = torch.from_file(
        str(tmp_path / "x.safetensors"), size=(tmp_path / "x.safetensors").stat().st_size, dtype=torch.uint8
    )
    (copy,) = place([mapped[-(2**20) :]])
    assert torch.equal(copy, mapped[-(2**20) :])


def test_reserved_memory_can_be_written():
    assert reserve(3 * 2**20).fill_(7).sum() == 7 * 3 * 2**20


def test_copies_made_in_inference_mode_are_ordinary_tensors():
    with torch.inference_mode():
        (copy,) = place([torch.ones(3)])
    assert not copy.is_inference()
