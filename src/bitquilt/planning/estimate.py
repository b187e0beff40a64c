"""What will a plan ask of the machine, and who will take its checkpoint? estimate(...), permits(...): headers alone.

Estimates give the order of magnitude, no more: floating-point operations over a rate measured here, one block in
memory.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitquilt.core.types import Layout
from bitquilt.model.structure import Skeleton
from bitquilt.planning.sensitivities import measured_tokens

_FLOAT = 4
_PYTHON_BYTES = 450 * 2**20  # an interpreter with torch and transformers
_ACTIVATIONS = 14  # hidden states of a batch alive at once in a block's forward pass, in widths of the model
_BATCH_TOKENS = 4096
_MAX_COLUMNS = 2**20
# Share of a matrix product's rate that the solvers' many small steps are taken to reach: an assumption.
_SOLVER_SHARE = 0.15
# Passes over each weight to fit a group's range: one, or 72 candidates.
_SEARCHED = 72


@dataclass(frozen=True)
class Estimate:
    """Wall time on this machine in seconds, and peak memory in bytes; `training_bytes` of it are the training's, on the
    device that blocks are computed on."""

    seconds: float
    peak_memory_bytes: int
    training_bytes: int = 0


def estimate(
    skeleton: Skeleton, shapes: Mapping[str, tuple[int, int]], tokens: int, *, data: bool, search: bool, measures: bool
) -> Estimate:
    """Of quantizing with `tokens` calibration tokens (`data`), a range search, and sensitivities measured first."""
    weights = sum(rows * width for rows, width in shapes.values())
    widest = max((width for _, width in shapes.values()), default=0)
    passed = (2 * tokens if data else 0) + (4 * measured_tokens(tokens, widest) if measures else 0)
    work = 2.0 * weights * passed
    inputs = {(name.rsplit(".", 1)[0], width): width for name, (_, width) in shapes.items()}
    if data or measures:
        work += sum(2.0 * tokens * width**2 + width**3 / _SOLVER_SHARE for width in inputs.values())
        work += sum(rows * width**2 for rows, width in shapes.values()) / _SOLVER_SHARE
    work += 8.0 * weights * ((_SEARCHED if search else 2) + (30 if measures else 0)) / _SOLVER_SHARE
    largest = 0
    for path in skeleton.blocks:
        inside = [shapes[name] for name in shapes if name.startswith(f"{path}.")]
        widest = max((width for _, width in inside), default=0)
        block = sum(rows * width for rows, width in inside)
        statistics = sum({width: width**2 for _, width in inside}.values()) + 2 * widest**2
        largest = max(largest, block + statistics + max((rows * width for rows, width in inside), default=0))
    outer = sum(skeleton.checkpoint.tensors[name].nbytes for name in skeleton.sources[""])
    batch = _ACTIVATIONS * skeleton.config.hidden_size * min(tokens, _BATCH_TOKENS)
    peak = _PYTHON_BYTES + max(_FLOAT * (largest + batch), 2 * outer + _FLOAT * batch)
    return Estimate(work / _rate(), int(peak))


def _rate() -> float:
    """Floating-point operations per second of a matrix product here, from a few milliseconds."""
    a = torch.ones(512, 512)
    a @ a
    started = time.perf_counter()
    for _ in range(4):
        a @ a
    return float(4 * 2 * 512**3 / max(time.perf_counter() - started, 1e-6))


def permits(layouts: Mapping[str, Layout]) -> dict[str, dict[str, Any]]:
    """Kernel or format -> `{"layers": how many it takes, "why_not": reason for the first that it does not}`."""
    checks = {
        "bitquilt reference (any device)": lambda _: None,
        "bitquilt cpu kernels": _cpu_kernel,
        "bitquilt gpu kernels (Triton)": lambda _: None,
        "gptq format, one width per layer": _gptq,
        "compressed-tensors, packed 4 or 8 bits": _compressed,
    }
    found = {}
    for title, check in checks.items():
        reasons = [(name, reason) for name, layout in layouts.items() if (reason := check(layout)) is not None]
        why = f"{reasons[0][0]}: {reasons[0][1]}" if reasons else None
        found[title] = {"layers": len(layouts) - len(reasons), "of": len(layouts), "why_not": why}
    return found


def _cpu_kernel(layout: Layout) -> str | None:
    if any(form.grid in ("mx", "mx_e2m3") for form, _ in layout.segments):
        return "MX numbers, which the reference computes"
    if layout.in_features > _MAX_COLUMNS:
        return f"{layout.in_features} columns, at most {_MAX_COLUMNS}"
    return next(
        (
            f"groups of {form.group_size} columns, wanted a multiple of 8"
            for form, width in layout.segments
            if form.grid == "uniform" and form.group_size % 8 and form.group_size < width
        ),
        None,
    )


def _gptq(layout: Layout) -> str | None:
    if (reason := _plain(layout)) is not None:
        return reason
    bits = layout.segments[0][0].bits
    return None if bits in (2, 3, 4, 8) else f"{bits} bits; wanted 2, 3, 4 or 8"


def _compressed(layout: Layout) -> str | None:
    if (reason := _plain(layout)) is not None:
        return reason
    bits = layout.segments[0][0].bits
    return None if bits in (4, 8) else f"{bits} bits; wanted 4 or 8"


def _plain(layout: Layout) -> str | None:
    if layout.outliers:
        return "outliers beside the codes"
    if len(layout.segments) > 1:
        return f"{len(layout.segments)} widths in one layer"
    if layout.segments[0][0].grid != "uniform":
        return "codebooks" if layout.segments[0][0].grid == "codebook" else "MX numbers"
    return None
