"""Progress of a run as plain values: a run hands each `RunEvent` to one `Observer`, which may print it.

`StageClock` adds up the time and memory of each stage on the way.
"""

import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Untouched:
    """Tensors that a run copies unchanged for one `reason`."""

    reason: str
    tensors: int
    nbytes: int
    example: str


@dataclass(frozen=True)
class Started:
    """The run starts: nothing expensive has happened yet. `done` of `blocks` are there from an earlier process."""

    model: str
    blocks: int
    done: int
    layers: int
    total_bytes: int
    untouched: tuple[Untouched, ...]


@dataclass(frozen=True)
class Stage:
    """A phase that is not counted in blocks: reading or sampling calibration text, making inputs, verifying."""

    text: str


@dataclass(frozen=True)
class LayerDone:
    """A layer is solved. `output_error`: squared error over squared output; None without calibration data."""

    block: int
    layer: str
    bpw: float
    output_error: float | None
    seconds: float


@dataclass(frozen=True)
class BlockDone:
    """A block is committed and will not be computed again. `error`: mean output error of its layers."""

    block: int
    blocks: int
    error: float | None
    seconds: float


@dataclass(frozen=True)
class Epoch:
    """One training epoch of `where`, a block or the model: `done` of `of` are finished.

    The loss fell from `start` to `loss`, both in `unit`; `left` seconds remain. `done == of` is the last one."""

    where: str
    done: int
    of: int
    start: float
    loss: float
    left: float
    unit: str = "error"


RunEvent = Started | Stage | LayerDone | BlockDone | Epoch
Observer = Callable[[RunEvent], None]


def silent(_: object) -> None:
    """Ignore an event: the observer that prints nothing."""


@dataclass
class _Spent:
    seconds: float = 0.0
    peak: int = 0


class StageClock:
    """Time and memory of each stage. Passes every event on to an observer and adds up the seconds in between.

    Stages that differ only in numbers ("0 of 64 sequences", "32 of 64 sequences") are one; paths are left out.
    """

    BLOCKS = "quantizing the blocks"
    _BEFORE = "preparing"

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._spent: dict[str, _Spent] = {}
        self._name, self._since = self._BEFORE, time.perf_counter()
        self.continued_after = 0

    def observe(self, event: RunEvent) -> None:
        """Book the time, then pass the event on."""
        match event:
            case Started():
                self.continued_after = event.done
            case Stage():
                self._book(self._name)
                self._name = _kind(event.text)
            case BlockDone():  # time not spent on the block belongs to the stage before it
                self._book(self._name, but=event.seconds)
                self._spent.setdefault(self.BLOCKS, _Spent()).seconds += event.seconds
                self._name = self.BLOCKS
                self._book(self._name)
        self._observer(event)

    def stages(self) -> list[dict[str, str | float | int]]:
        """Name, seconds and the process's peak resident memory by the stage's end, in the order of first use."""
        self._book(self._name)
        return [
            {"name": name, "seconds": round(spent.seconds, 3), "peak_memory_bytes": spent.peak}
            for name, spent in self._spent.items()
        ]

    def _book(self, name: str, but: float = 0.0) -> None:
        now = time.perf_counter()
        spent = self._spent.setdefault(name, _Spent())
        spent.seconds += max(0.0, now - self._since - but)
        spent.peak = peak_memory_bytes()
        self._since = now


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far. Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _kind(text: str) -> str:
    """Drop counts and paths: "the model writes text: 0 of 64" -> "the model writes text"."""
    head, colon, tail = text.partition(": ")
    counted = colon and re.search(r"\d", tail)
    return (head if counted else text).partition(" from /")[0]
