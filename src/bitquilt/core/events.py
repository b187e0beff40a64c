"""What a run tells the world while it works: plain values, handed to one callable. Printing is the caller's."""

import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Untouched:
    """Tensors that stay as they are, one entry per reason."""

    reason: str
    tensors: int
    nbytes: int
    example: str


@dataclass(frozen=True)
class Started:
    """The run is about to work: nothing expensive has happened yet."""

    model: str
    blocks: int
    done: int
    layers: int
    total_bytes: int
    untouched: tuple[Untouched, ...]


@dataclass(frozen=True)
class Stage:
    """A phase without a count of its own: reading calibration text, sampling it, making inputs, verifying."""

    text: str


@dataclass(frozen=True)
class LayerDone:
    """A layer is solved. `output_error`: squared error of its output over its squared output, None without data."""

    block: int
    layer: str
    bpw: float
    output_error: float | None
    seconds: float


@dataclass(frozen=True)
class BlockDone:
    """A block is committed: it will not be computed again. `error`: mean of its layers' output errors."""

    block: int
    blocks: int
    error: float | None
    seconds: float


@dataclass(frozen=True)
class Epoch:
    """`where`, a block or the model, was trained once more over its samples: `done` of `of` times, from a loss of
    `start` to `loss`; `left`: seconds until it is done. `unit` of the losses. At `done == of` no more follow."""

    where: str
    done: int
    of: int
    start: float
    loss: float
    left: float
    unit: str = "error"


Event = Started | Stage | LayerDone | BlockDone | Epoch
Observer = Callable[[Event], None]


def silent(_: object) -> None:
    """The observer that says nothing."""


@dataclass
class _Spent:
    seconds: float = 0.0
    peak: int = 0


class StageClock:
    """Where do a run's time and memory go? Stands between the run and its observer and adds up what passes by.

    Stages that differ in numbers only ("0 of 64 sequences", "32 of 64 sequences") are one; paths are left out.
    """

    BLOCKS = "quantizing the blocks"
    _BEFORE = "preparing"

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._spent: dict[str, _Spent] = {}
        self._name, self._since = self._BEFORE, time.perf_counter()
        self.continued_after = 0

    def observe(self, event: Event) -> None:
        """Note the time, then hand the event on."""
        match event:
            case Started():
                self.continued_after = event.done
            case Stage():
                self._book(self._name)
                self._name = _kind(event.text)
            case BlockDone():  # what was not spent on the block belongs to the stage before it
                self._book(self._name, but=event.seconds)
                self._spent.setdefault(self.BLOCKS, _Spent()).seconds += event.seconds
                self._name = self.BLOCKS
                self._book(self._name)
        self._observer(event)

    def stages(self) -> list[dict[str, str | float | int]]:
        """Name, seconds and the process's highest resident memory up to the stage's end, in the order of first use."""
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
    """The highest resident memory of this process so far; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _kind(text: str) -> str:
    """ "the model writes text: 0 of 64" -> "the model writes text"; "reading text from /a/b" -> "reading text"."""
    head, colon, tail = text.partition(": ")
    counted = colon and re.search(r"\d", tail)
    return (head if counted else text).partition(" from /")[0]
