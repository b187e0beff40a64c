"""`open_blocks` yields a `BlockReader`, which loads one block at a time and reads the next one in the background.

On a CPU blocks are read when their turn comes: a second one in memory would double what a run needs, and the processor
has nothing else to do. On a GPU a thread reads the file into pinned memory, from which the copy takes no time of the
processor's. An error while reading is raised when that block is opened.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from torch import Tensor

from bitquilt.stream.job import Job, LoadedBlock, open_block


class BlockReader:
    """Opens the blocks of a job. `prefetch`: read the next one meanwhile; by default on any device but a CPU."""

    def __init__(self, job: Job, prefetch: bool | None = None) -> None:
        self._job = job
        self._prefetch = job.device.type != "cpu" if prefetch is None else prefetch
        self._thread: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None

    @contextmanager
    def open(self, i: int) -> Iterator[LoadedBlock]:
        """Hold block i as `open_block` does."""
        with open_block(self._job, i, self._prefetched(i)) as block:
            if self._prefetch and i + 1 < len(self._job.skeleton.blocks):
                self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="next-block")
                self._next = (i + 1, self._thread.submit(self._read, i + 1))
            yield block

    def close(self) -> None:
        """Wait for a read in progress and forget its result."""
        self._next = None
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _prefetched(self, i: int) -> dict[str, Tensor] | None:
        """The tensors of block i on the device, or None if another block was read or none."""
        waiting, self._next = self._next, None
        if waiting is None:
            return None
        number, future = waiting
        if number != i:
            future.cancel()
            return None
        return {name: t.to(self._job.device, non_blocking=True) for name, t in future.result().items()}

    def _read(self, i: int) -> dict[str, Tensor]:
        skeleton = self._job.skeleton
        tensors = skeleton.checkpoint.read(skeleton.sources[skeleton.blocks[i]])
        on_gpu = self._job.device.type == "cuda"
        return {name: t.pin_memory() for name, t in tensors.items()} if on_gpu else tensors


@contextmanager
def open_blocks(job: Job) -> Iterator[BlockReader]:
    """Yield a `BlockReader` and close it on exit, also after an error."""
    reader = BlockReader(job)
    try:
        yield reader
    finally:
        reader.close()
