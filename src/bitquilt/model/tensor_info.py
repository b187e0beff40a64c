"""`TensorInfo` is what a safetensors header says about a tensor."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's file, shape, type and size, from the file's header alone."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
