"""Where stored weights lie while they are used: memory in large pages, `place(tensors) -> tensors`.

A processor translates addresses page by page. Read in sequence, 4 KiB pages gave 8 GB/s on one thread where 2 MiB
pages gave 14 (Sapphire Rapids in a virtual machine; `benchmarks.kernels --small-pages` repeats it). Linux hands large
pages out on request only, and never to files mapped into memory.
"""

import ctypes
import math
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE = 2**21
_CHUNK = 2**25  # mapped at a time, in one piece or more; what is not written to takes no memory
_LINE = 64
_PAGEOUT = 21  # of Linux 5.4; mmap has no name for it
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
        """uint8 `[count]`, a storage of its own: what is saved of it is the tensor, not the chunk."""
        offset = self.start + self.used
        self.used += -(-count // _LINE) * _LINE
        return torch.frombuffer(self.memory, dtype=torch.uint8, offset=offset, count=count)


def place(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in large pages, side by side, each at a cache line. A chunk lives as long as any tensor in it."""
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
    _let_go(tensors)
    return copies


def _let_go(tensors: Sequence[Tensor]) -> None:
    """Give back the memory of pages mapped from a file (a checkpoint as transformers loads it): the file still has
    them, and as long as any of its tensors lives they would be held twice. Nothing is lost if they are read again."""
    try:
        with open("/proc/self/maps") as maps:
            fields = [line.split(maxsplit=5) for line in maps]
        files = [[int(n, 16) for n in f[0].split("-")] for f in fields if len(f) == 6 and f[5].startswith("/")]
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    for tensor in tensors:
        start, size = tensor.data_ptr(), tensor.numel() * tensor.itemsize
        if any(first <= start and start + size <= last for first, last in files):
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
            if length > 0:
                advise(ctypes.c_void_p(first), ctypes.c_size_t(length), _PAGEOUT)


def reserve(size: int) -> Tensor:
    """uint8 `[size]` in large pages, contents undefined."""
    return _Chunk(size).take(size)
