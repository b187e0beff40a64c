"""Memory in large pages for weights in use: `place` copies tensors there, `let_go` frees pages mapped from a file.

A processor translates addresses page by page. Read in sequence, 4 KiB pages gave 8 GB/s on one thread where 2 MiB
pages gave 14 (Sapphire Rapids in a virtual machine; `benchmarks.kernels --small-pages` repeats it). Linux hands large
pages out on request only, and never to files mapped into memory.
"""

import ctypes
import functools
import math
import mmap
import os
import threading
from collections.abc import Sequence
from io import FileIO
from typing import Any

import torch
from torch import Tensor

_LARGE = 2**21
_CHUNK = 2**25  # mapped at a time, in one piece or more; what is not written to takes no memory
_LINE = 64
_lock = threading.Lock()
_current: "_Chunk | None" = None  # guarded by the lock


class _Chunk:
    """Memory in large pages, handed out from its start."""

    def __init__(self, size: int) -> None:
        self.size = math.ceil(size / _LARGE) * _LARGE
        self.memory = mmap.mmap(-1, self.size + _LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.start = -torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr() % _LARGE
        self.used = 0

    def take(self, count: int) -> Tensor:
        """Return uint8 `[count]` with a storage of its own, so that saving it saves the tensor, not the chunk."""
        offset = self.start + self.used
        self.used += -(-count // _LINE) * _LINE
        return torch.frombuffer(self.memory, dtype=torch.uint8, offset=offset, count=count)


def place(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to large pages, each at a cache line. A chunk lives as long as any tensor in it."""
    global _current
    sizes = [t.numel() * t.itemsize for t in tensors]
    with _lock, torch.inference_mode(False):
        total = sum(-(-size // _LINE) * _LINE for size in sizes)
        if _current is None or _current.size - _current.used < total:
            _current = _Chunk(max(_CHUNK, total))
        places = [_current.take(size) if size else None for size in sizes]
        copies = [
            tensor if own is None else own.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
            for tensor, own in zip(tensors, places, strict=True)
        ]
    let_go(tensors)
    return copies


def let_go(tensors: Sequence[Tensor]) -> None:
    """Free pages mapped from a file (a checkpoint as transformers loads it).

    The file still has them, and they would be held twice as long as any of its tensors lives. Reading them again gives
    the same bytes. A page that was written to would be lost, so then the tensor stays. MADV_PAGEOUT, which writes pages
    back instead, loses nothing either, but took 1.4 s per GB, and the next reader waits for the disk.
    """
    try:
        advise = _madvise()
        with open("/proc/self/pagemap", "rb", buffering=0) as pages:
            for tensor in tensors:
                start, size = tensor.data_ptr(), tensor.numel() * tensor.itemsize
                first, last = -(-start // mmap.PAGESIZE), (start + size) // mmap.PAGESIZE
                if tensor.device.type == "cpu" and first < last and _of_files(pages, first, last):
                    length = (last - first) * mmap.PAGESIZE
                    advise(ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
    except (OSError, AttributeError):
        return  # not Linux, or a system that does not show the pages


@functools.cache
def _madvise() -> Any:
    """The system's madvise. AttributeError where it has none."""
    return ctypes.CDLL(None).madvise


def _of_files(pages: FileIO, first: int, last: int) -> bool:
    """Whether all pages from `first` to `last` that are in memory belong to a file.

    Bit 63 of an entry says that the page is in memory, 62 that it was swapped out, 61 that a file has it (Linux,
    Documentation/admin-guide/mm/pagemap.rst).
    """
    import numpy as np  # late: PyTorch and the GPU's kernels work without it

    found = np.frombuffer(os.pread(pages.fileno(), 8 * (last - first), 8 * first), np.uint64)
    return len(found) == last - first and not ((found >> 62 != 0) & (found >> 61 & 1 == 0)).any()


def reserve(size: int) -> Tensor:
    """Return uint8 `[size]` in large pages, contents undefined."""
    return _Chunk(size).take(size)
