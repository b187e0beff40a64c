"""What a run tells the world while it works: plain values, handed to one callable. Printing is the caller's."""

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


Observer = Callable[[Started | Stage | LayerDone | BlockDone], None]


def silent(_: object) -> None:
    """The observer that says nothing."""
