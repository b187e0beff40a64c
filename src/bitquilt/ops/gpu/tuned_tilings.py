"""Tilings measured on this machine's GPU: `known_tilings` reads them, `remember` saves them.

`python -m benchmarks.gpu --only tune` writes them; every product looks here before it calls `choose_tiling`. There is
one file per GPU and version of Triton, in BITQUILT_CACHE (default: $XDG_CACHE_HOME/bitquilt, ~/.cache/bitquilt):

    gpu-NVIDIA-H200-triton-3.7.1.json   {"4096x86 2 bits, 1 tokens": [32, 1, 8, 4, 4, 4], ...}

A key holds rows x chunks of 128 columns, mean bits of the codes and tokens rounded up to a power of two; the value is
the numbers of a `Tiling`.
"""

import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from bitquilt.ops.gpu.tiling import Tiling

MAX_TOKENS = 64  # more are compute bound: one tiling serves all


def key(rows: int, chunks: int, bits: float, tokens: int, kind: str = "bits") -> str:
    """Return the key of a tiling. `kind`: bits (uniform), codebook or mx."""
    return f"{rows}x{chunks} {round(bits)} {kind}, {1 << max(0, tokens - 1).bit_length()} tokens"


def path(device: torch.device) -> Path:
    """The file of this GPU, or of a CPU for tests under Triton's interpreter."""
    import triton

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("BITQUILT_CACHE") or Path(home) / "bitquilt")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreted"
    return folder / f"gpu-{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-triton-{triton.__version__}.json"


@functools.cache
def known_tilings(device: torch.device) -> dict[str, Tiling]:
    """Read the measured tilings by key, once. ValueError: the file holds something else."""
    file = path(device)
    if not file.is_file():
        return {}
    try:
        return {name: _tiling(numbers) for name, numbers in json.loads(file.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no tilings ({error}); delete it or measure again") from None


def remember(device: torch.device, found: Mapping[str, Tiling]) -> Path:
    """Add tilings to the file; later products of this process use them."""
    file = path(device)
    every = {**known_tilings(device), **found}
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps({name: astuple(tiling) for name, tiling in every.items()}, indent=1))
    new.replace(file)
    known_tilings.cache_clear()
    return file


def _tiling(numbers: Any) -> Tiling:
    tiling = Tiling(*map(int, numbers))
    powers = (tiling.rows, tiling.tokens, tiling.stack, tiling.warps)
    if min(powers) < 1 or any(n & (n - 1) for n in powers) or tiling.parts < 1 or tiling.stages < 1:
        raise ValueError(f"{numbers} is not a tiling: rows, tokens, stack and warps are powers of two")
    return tiling
