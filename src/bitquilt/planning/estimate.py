"""Estimates before a run, from headers alone: `estimate` for time and memory, `permits` for kernels and formats.

Estimates give the order of magnitude: floating-point operations over a rate measured here, and one block in memory.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitquilt.core.recipe import Plannable
from bitquilt.core.settings import Calibration
from bitquilt.core.types import GRID_KINDS, Layout
from bitquilt.data.calibration import tokens_read
from bitquilt.model.structure import Skeleton
from bitquilt.ops.block_types import BLOCK_TYPES
from bitquilt.planning.sensitivities import measured_tokens
from bitquilt.stream.model_training import TrainingMemory

_FLOAT = 4
_PYTHON_BYTES = 450 * 2**20  # an interpreter with torch and transformers
_ALIVE = 14  # hidden states of a batch that are alive at once in a block's forward pass, in widths of the model
_BATCH_TOKENS = 4096
_MAX_COLUMNS = 2**20
_SOLVER_SHARE = 0.15  # assumed share of a matrix product's rate that the many small steps of a solver reach
_SEARCHED = 72  # candidates of a range search per group, each a pass over the weights


@dataclass(frozen=True)
class Estimate:
    """Wall time of a run on this machine in seconds and its peak memory in bytes.

    `training_bytes`: the part of the peak that training takes, on the device that computes the blocks.
    """

    seconds: float
    peak_memory_bytes: int
    training_bytes: int = 0


@dataclass(frozen=True)
class Permit:
    """Layers of a plan that a kernel or format takes: `layers` of `of`. `why_not`: the first reason against one."""

    layers: int
    of: int
    why_not: str | None


def estimate(
    skeleton: Skeleton,
    shapes: Mapping[str, tuple[int, int]],
    recipe: Plannable,
    calibration: Calibration,
    measures: bool,
) -> Estimate:
    """Estimate a quantization of the layers `[out, in]` by path. `measures`: the run measures sensitivities first."""
    tokens = tokens_read(skeleton.checkpoint, calibration)
    batch = _ALIVE * skeleton.config.hidden_size * min(tokens, _BATCH_TOKENS)
    outer = sum(skeleton.checkpoint.tensors[name].nbytes for name in skeleton.sources[""])
    peak = _PYTHON_BYTES + max(_FLOAT * (_largest_block(skeleton, shapes) + batch), 2 * outer + _FLOAT * batch)
    trains = TrainingMemory(recipe, skeleton, shapes, calibration.seq_len).total
    return Estimate(_operations(shapes, recipe, tokens, measures) / _rate(), int(peak) + trains, trains)


def _operations(shapes: Mapping[str, tuple[int, int]], recipe: Plannable, tokens: int, measures: bool) -> float:
    """Floating-point operations: passes over the tokens, Hessians and their factors, solving, fitting of ranges."""
    data, search = recipe.needs.calibration, recipe.plan_terms.searches_ranges
    weights = sum(rows * width for rows, width in shapes.values())
    widest = max((width for _, width in shapes.values()), default=0)
    passed = (2 * tokens if data else 0) + (4 * measured_tokens(tokens, widest) if measures else 0)
    work = 2.0 * weights * passed
    inputs = {(name.rsplit(".", 1)[0], width): width for name, (_, width) in shapes.items()}
    if data or measures:
        work += sum(2.0 * tokens * width**2 + width**3 / _SOLVER_SHARE for width in inputs.values())
        work += sum(rows * width**2 for rows, width in shapes.values()) / _SOLVER_SHARE
    return work + 8.0 * weights * ((_SEARCHED if search else 2) + (30 if measures else 0)) / _SOLVER_SHARE


def _largest_block(skeleton: Skeleton, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Numbers in memory for the largest block: its weights, statistics and a copy of its largest layer."""
    largest = 0
    for path in skeleton.blocks:
        inside = [shapes[name] for name in shapes if name.startswith(f"{path}.")]
        widest = max((width for _, width in inside), default=0)
        block = sum(rows * width for rows, width in inside)
        statistics = sum({width: width**2 for _, width in inside}.values()) + 2 * widest**2
        largest = max(largest, block + statistics + max((rows * width for rows, width in inside), default=0))
    return largest


def _rate() -> float:
    """Floating-point operations per second of a matrix product here, measured in a few milliseconds."""
    a = torch.ones(512, 512)
    a @ a
    started = time.perf_counter()
    for _ in range(4):
        a @ a
    return float(4 * 2 * 512**3 / max(time.perf_counter() - started, 1e-6))


def permits(layouts: Mapping[str, Layout]) -> dict[str, Permit]:
    """Return how many layers each kernel or format takes, by its title."""
    checks = {
        "bitquilt reference (any device)": lambda _: None,
        "bitquilt cpu kernels": _cpu_kernel,
        "bitquilt gpu kernels (Triton)": _blocks,
        "gptq format, one width per layer": lambda layout: _one_width(layout, (2, 3, 4, 8)),
        "compressed-tensors, packed 4 or 8 bits": lambda layout: _one_width(layout, (4, 8)),
    }
    found = {}
    for title, check in checks.items():
        reasons = [(name, reason) for name, layout in layouts.items() if (reason := check(layout)) is not None]
        why = f"{reasons[0][0]}: {reasons[0][1]}" if reasons else None
        found[title] = Permit(len(layouts) - len(reasons), len(layouts), why)
    return found


def _cpu_kernel(layout: Layout) -> str | None:
    """Why the CPU kernels do not take the layer."""
    if any(GRID_KINDS[form.grid].microscaled for form, _ in layout.segments):
        return "MX numbers, which the reference computes"
    if reason := _blocks(layout):
        return reason
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


def _blocks(layout: Layout) -> str | None:
    """Why no kernel takes the layer."""
    blocks = any(form.grid in BLOCK_TYPES for form, _ in layout.segments)
    return "llama.cpp's blocks, which the reference computes" if blocks else None


def _one_width(layout: Layout, widths: tuple[int, ...]) -> str | None:
    """Why a format with one of `widths` bits per layer does not take the layer."""
    form = layout.segments[0][0]
    if layout.outliers:
        return "outliers in addition to the codes"
    if len(layout.segments) > 1:
        return f"{len(layout.segments)} widths in one layer"
    if form.grid != "uniform":
        return "codebooks" if form.grid == "codebook" else "blocks" if _blocks(layout) else "MX numbers"
    if form.bits not in widths:
        return f"{form.bits} bits; wanted {', '.join(map(str, widths[:-1]))} or {widths[-1]}"
    return None
