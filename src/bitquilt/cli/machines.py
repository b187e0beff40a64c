"""The machine that a model is measured on: `Host` and `Gpu` wait for work, count memory and measure bandwidth."""

import time
from pathlib import Path

import psutil
import torch

from bitquilt.ops import cpu_kernels, gpu
from bitquilt.stream.devices import free_bytes

_READ = 2**31  # bytes that the bandwidth test reads, more than caches hold
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
        """Description for the table's head."""
        return f"{torch.get_num_threads()} threads, {cpu_kernels.level()}, {cpu_kernels.activations()} activations"

    def done(self) -> None:
        """Return when all work is computed, which on a processor is at once."""

    def peak(self) -> int:
        """Most bytes since the start; where the system counts no peak, the bytes now."""
        return psutil.Process().memory_info().rss if self._start is None else _resident() - self._start

    def bandwidth(self) -> float:
        """Bytes read from memory per second."""
        return cpu_kernels.read_bandwidth(_READ, torch.get_num_threads())


class Gpu:
    """A GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.reset_peak_memory_stats(device)

    @property
    def title(self) -> str:
        """Description for the table's head."""
        return f"{torch.cuda.get_device_name(self.device)}, {'triton' if gpu.in_use() else 'reference'}"

    def done(self) -> None:
        """Wait until all work is computed."""
        torch.cuda.synchronize(self.device)

    def peak(self) -> int:
        """Most bytes of tensors since the start."""
        return int(torch.cuda.max_memory_allocated(self.device))

    def bandwidth(self) -> float:
        """Bytes that a copy reads and writes per second."""
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
