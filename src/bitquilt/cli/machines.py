"""What is a model measured on? Host(), Gpu(device): when work is done, how much memory it took, how fast memory is."""

import time
from pathlib import Path

import psutil
import torch

from bitquilt.ops import cpu_kernels, gpu
from bitquilt.stream.devices import free_bytes

_READ = 2**31  # memory of the read loop: more than caches hold
_ROUNDS = 20


class Host:
    """The processor."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            self._start: int | None = _resident()
        except OSError:
            self._start = None

    @property
    def title(self) -> str:
        """For the table's head."""
        return f"{torch.get_num_threads()} threads, {cpu_kernels.level()}, {cpu_kernels.activations()} activations"

    def done(self) -> None:
        """Wait until what was asked for is computed."""

    def peak(self) -> int:
        """Bytes at most since the start; where the system counts no peak, bytes now."""
        return psutil.Process().memory_info().rss if self._start is None else _resident() - self._start

    def bandwidth(self) -> float:
        """Bytes per second that are read from memory."""
        return cpu_kernels.read_bandwidth(_READ, torch.get_num_threads())


class Gpu:
    """A GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.reset_peak_memory_stats(device)

    @property
    def title(self) -> str:
        """For the table's head."""
        return f"{torch.cuda.get_device_name(self.device)}, {'triton' if gpu.in_use() else 'reference'}"

    def done(self) -> None:
        """Wait until what was asked for is computed."""
        torch.cuda.synchronize(self.device)

    def peak(self) -> int:
        """Bytes of tensors at most since the start."""
        return int(torch.cuda.max_memory_allocated(self.device))

    def bandwidth(self) -> float:
        """Bytes per second that a copy reads and writes."""
        size = min(_READ, free_bytes(self.device) // 4)
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        self.done()
        started = time.perf_counter()
        for _ in range(_ROUNDS):
            target.copy_(source)
        self.done()
        return 2 * size * _ROUNDS / (time.perf_counter() - started)


def _resident() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
