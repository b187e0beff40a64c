"""Cuts that were measured on this machine's GPU: `python -m benchmarks.gpu --only tune` writes them, products look here
before they ask `config.choose`.

One file per GPU and version of Triton, in BITQUILT_CACHE (default: $XDG_CACHE_HOME/bitquilt, ~/.cache/bitquilt):

    gpu-NVIDIA-H200-triton-3.7.1.json   {"4096x86 2 bits, 1 tokens": [32, 1, 8, 4, 4, 4], ...}

rows x chunks of 128 columns, mean bits of the codes, tokens rounded up to a power of two; the numbers of a `Config`.
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

from bitquilt.ops.gpu.tiling import Config

MAX_TOKENS = 64  # more are compute bound: one cut for all


def key(rows: int, chunks: int, bits: float, tokens: int, kind: str = "bits") -> str:
    """What a cut is remembered under. `kind`: bits (uniform), codebook or mx."""
    return f"{rows}x{chunks} {round(bits)} {kind}, {1 << max(0, tokens - 1).bit_length()} tokens"


def path(device: torch.device) -> Path:
    """The file of this GPU; of a CPU, for tests under Triton's interpreter, a file of its own."""
    import triton

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("BITQUILT_CACHE") or Path(home) / "bitquilt")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreted"
    return folder / f"gpu-{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-triton-{triton.__version__}.json"


@functools.cache
def cuts(device: torch.device) -> dict[str, Config]:
    """What was measured; read once. ValueError: the file is none of ours."""
    file = path(device)
    if not file.is_file():
        return {}
    try:
        return {name: _config(numbers) for name, numbers in json.loads(file.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no cuts of products ({error}); delete it or measure again") from None


def remember(device: torch.device, found: Mapping[str, Config]) -> Path:
    """Add to the file; products of this process use it from now on."""
    file = path(device)
    every = {**cuts(device), **found}
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps({name: astuple(config) for name, config in every.items()}, indent=1))
    beside.replace(file)
    cuts.cache_clear()
    return file


def _config(numbers: Any) -> Config:
    config = Config(*map(int, numbers))
    powers = (config.rows, config.tokens, config.stack, config.warps)
    if min(powers) < 1 or any(n & (n - 1) for n in powers) or config.parts < 1 or config.stages < 1:
        raise ValueError(f"{numbers} is no cut: rows, tokens, stack and warps are powers of two")
    return config
