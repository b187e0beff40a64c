"""The next block's weights, read while the present one is computed. Blocks(skeleton, device).load(i) -> the block.

On a CPU blocks are read when their turn comes: a second one in memory would double what a run needs, and the processor
has nothing else to do. On a GPU a thread reads the file into pinned memory, from which the copy takes no time of the
processor's. An error while reading is raised by the `load` that asks for that block.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bitquilt.model.structure import Skeleton


class Blocks:
    """See the module. `ahead`: read one block ahead; None: as the device wants it."""

    def __init__(self, skeleton: Skeleton, device: torch.device, ahead: bool | None = None) -> None:
        self.skeleton, self.device = skeleton, device
        self._ahead = device.type != "cpu" if ahead is None else ahead
        self._reader: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None

    def load(self, i: int) -> nn.Module:
        """Block i with its weights, on the device. Raises UserError for a damaged or incomplete checkpoint."""
        path = self.skeleton.blocks[i]
        tensors = None
        waiting, self._next = self._next, None
        if waiting is not None:
            number, future = waiting
            if number == i:
                tensors = future.result()
            else:
                future.cancel()
        if tensors is not None and self.device.type != "cpu":
            tensors = {name: t.to(self.device, non_blocking=True) for name, t in tensors.items()}
        block = self.skeleton.load(path, tensors).to(self.device)
        if self._ahead and i + 1 < len(self.skeleton.blocks):
            self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="next-block")
            self._next = (i + 1, self._reader.submit(self._read, self.skeleton.blocks[i + 1]))
        return block

    def close(self) -> None:
        """Wait for a read that is under way, forget what it read."""
        self._next = None
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)

    def _read(self, path: str) -> dict[str, Tensor]:
        tensors = self.skeleton.checkpoint.read(self.skeleton.sources[path])
        return {name: t.pin_memory() for name, t in tensors.items()} if self.device.type == "cuda" else tensors


@contextmanager
def open_blocks(skeleton: Skeleton, device: torch.device) -> Iterator[Blocks]:
    """`Blocks`, closed whatever happens."""
    blocks = Blocks(skeleton, device)
    try:
        yield blocks
    finally:
        blocks.close()
