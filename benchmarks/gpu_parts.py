"""The parts of `benchmarks.gpu`: each `(Setting) -> what it found`, plain values."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.gpu_model import LlamaShape, decode_rate
from benchmarks.gpu_setup import Packed, Setting, codebook, mx, seconds_each, uniform
from benchmarks.gpu_slim import run_slim
from bitquilt.core.types import Layout

BITS = (2, 3, 4)
MX_BITS = (4, 6, 8)


def copy(setting: Setting) -> dict[str, Any]:
    """The two ceilings: bytes read and written by a large copy, and a large bf16 product on random data."""
    n = setting.sizes.matrix
    source = torch.randint(0, 256, (4 * setting.sizes.memory,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() / seconds_each([lambda: target.copy_(source)], setting)
    one, other = (torch.randn(n, n, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    return {"bytes_per_second": moved, "flops": 2 * n**3 / seconds_each([lambda: one @ other], setting)}


def layers(setting: Setting) -> dict[str, Any]:
    """One token, uniform grids."""
    return {"rows": [row for shape in setting.sizes.shapes for row in _against_bf16(
        setting, shape, 1, {(bits, f"{bits} bits"): uniform(*shape, bits) for bits in BITS})]}  # fmt: skip


def codebooks(setting: Setting) -> dict[str, Any]:
    """One token, levels per column, and shared ones with gains."""
    found = []
    for shape in setting.sizes.shapes:
        kinds = {}
        for bits, shared in itertools.product(BITS, (False, True)):
            name = f"{bits}-bit codebook{' shared by all columns' if shared else ' per column'}"
            kinds[bits, name] = codebook(*shape, bits, shared)
        found += _against_bf16(setting, shape, 1, kinds)
    return {"rows": found}


def sixteen(setting: Setting) -> dict[str, Any]:
    """16 tokens against one."""
    found = []
    for shape, bits in itertools.product(setting.sizes.shapes, BITS):
        layout = uniform(*shape, bits)
        one, many = (_seconds(setting, layout, tokens) for tokens in (1, 16))
        found.append({"shape": _name(shape), "kind": f"{bits} bits", "seconds": many, "ratio": many / one})
    return {"rows": found}


def prefill(setting: Setting) -> dict[str, Any]:
    """Many tokens: fused, through the weight written out, and as the body chooses, against bf16 in the same run."""
    from bitquilt.ops.gpu import launch

    found, limit = [], launch.MAX_FUSED
    for shape, tokens in itertools.product(setting.sizes.shapes, (setting.sizes.tokens // 4, setting.sizes.tokens)):
        dense = _dense_seconds(setting, shape, tokens)
        for bits, (path, fused) in itertools.product(BITS, (("fused", 2**30), ("written out", 0), ("chosen", limit))):
            if setting.tiny and path == "fused":
                continue  # minutes under the interpreter
            launch.MAX_FUSED = fused
            try:
                taken = _seconds(setting, uniform(*shape, bits), tokens)
            finally:
                launch.MAX_FUSED = limit
            found.append({"shape": _name(shape), "kind": f"{bits} bits", "tokens": tokens, "path": path,
                          "seconds": taken, "over_bf16": dense / taken})  # fmt: skip
    return {"rows": found}


def decode(setting: Setting) -> dict[str, Any]:
    """A model of LLaMA-7B's shape, all layers: weights in memory, greedy decoding with a static cache in one graph."""
    sizes, device = setting.sizes, setting.device
    found: dict[str, Any] = {}
    for name, make in (("bf16_", _dense_maker(device)), ("", _packed_maker(device))):
        model = LlamaShape(sizes, device, make)
        found[f"{name}bytes"] = model.in_memory()
        found[f"{name}tokens_per_second"] = decode_rate(model, setting)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def slim(setting: Setting) -> dict[str, Any]:
    """SliM-LLM of LLaMA-7B's shape, 128 x 2048 tokens; time per stage."""
    return run_slim(setting)


def tune(setting: Setting) -> dict[str, Any]:
    """From `config.choose`'s cut of each product to better neighbours, until there is none; what it gains. A product's
    tiling goes at once to where products look (`ops.gpu.tuned_tilings`); what is there is not looked for again."""
    return _tuned(setting, "bits", {bits: partial(uniform, bits=bits) for bits in BITS})


def tune_codebooks(setting: Setting) -> dict[str, Any]:
    """The same for levels per column."""
    return _tuned(setting, "codebook", {bits: partial(codebook, bits=bits, shared=False) for bits in BITS})


def tune_mx(setting: Setting) -> dict[str, Any]:
    """The same for MX numbers."""
    return _tuned(setting, "mx", {bits: partial(mx, bits=bits) for bits in MX_BITS})


def _tuned(setting: Setting, kind: str, layouts: dict[int, Callable[[int, int], Layout]]) -> dict[str, Any]:
    from bitquilt.ops.gpu import tuned_tilings as tuned
    from bitquilt.ops.gpu.tiling import Tiling

    found: list[dict[str, Any]] = []
    file = tuned.path(setting.device)
    for shape, (bits, layout), tokens in itertools.product(setting.sizes.shapes, layouts.items(), (1, 16)):
        name = tuned.key(shape[0], shape[1] // 128, bits, tokens, kind)
        if name in tuned.known_tilings(setting.device):
            continue
        timed: dict[Tiling, float] = {}
        first, best = _descent(setting, layout(*shape), tokens, timed, kind == "codebook")
        file = tuned.remember(setting.device, {name: best})
        found.append({"shape": _name(shape), "kind": f"{bits} {kind}", "tokens": tokens, "best": str(best),
                      "seconds": timed[best], "chosen": timed[first], "tried": len(timed)})  # fmt: skip
    return {"rows": found, "file": str(file)}


def _descent(setting: Setting, layout: Layout, tokens: int, timed: dict[Any, float], quads: bool) -> tuple[Any, Any]:
    """The tiling to begin with and the best one; `timed`: seconds of all that were tried."""
    from benchmarks.tilings import neighbours
    from bitquilt.ops.gpu import launch
    from bitquilt.ops.gpu.tiling import Tiling, choose_tiling, for_quads

    works = _works(setting, layout, tokens)

    def measure(tiling: Tiling) -> float:
        if tiling not in timed:
            launch.use_tiling(tiling)
            try:
                timed[tiling] = seconds_each(works, setting)
            except triton.runtime.errors.TritonError:  # more shared memory or registers than there are
                timed[tiling] = float("inf")
            finally:
                launch.use_tiling(None)
        return timed[tiling]

    first = best = choose_tiling(
        layout.out_features, layout.in_features // 128, tokens, launch.processors(setting.device), quads
    )
    measure(first)
    while len(timed) < setting.sizes.cuts:
        near = [for_quads(c) if quads else c for c in neighbours(best)[: setting.sizes.cuts]]
        measured = [c for c in near if measure(c) < timed[best]]
        if not measured:
            break
        best = min(measured, key=measure)
    return first, best


def _against_bf16(
    setting: Setting, shape: tuple[int, int], tokens: int, kinds: dict[tuple[int, str], Layout]
) -> list[dict[str, Any]]:
    dense = _dense_seconds(setting, shape, tokens)
    found = []
    for (bits, kind), layout in kinds.items():
        taken, nbytes = _seconds(setting, layout, tokens), Packed.random(layout, setting.device).nbytes
        found.append({
            "shape": _name(shape), "kind": kind, "bits": bits, "tokens": tokens, "seconds": taken, "bytes": nbytes,
            "share": nbytes / taken / setting.bandwidth, "over_bf16": dense / taken, "bf16_seconds": dense,
        })  # fmt: skip
    return found


def _seconds(setting: Setting, layout: Layout, tokens: int) -> float:
    return seconds_each(_works(setting, layout, tokens), setting)


def _works(setting: Setting, layout: Layout, tokens: int) -> list[Callable[[], Tensor]]:
    """One product of each of as many copies as `memory` holds."""
    first = Packed.random(layout, setting.device)
    count = max(2, min(setting.sizes.memory // first.nbytes, 4096 // tokens + 2))
    copies = [first, *(Packed.random(layout, setting.device, seed) for seed in range(1, count))]
    x = torch.randn(tokens, layout.in_features, device=setting.device, dtype=torch.bfloat16)
    return [_call(c, x) for c in copies]


def _dense_seconds(setting: Setting, shape: tuple[int, int], tokens: int) -> float:
    count = max(2, min(setting.sizes.memory // (2 * shape[0] * shape[1]), 4096 // tokens + 2))
    weights = [torch.randn(shape, device=setting.device, dtype=torch.bfloat16) for _ in range(count)]
    x = torch.randn(tokens, shape[1], device=setting.device, dtype=torch.bfloat16)
    return seconds_each([_call(_linear(w), x) for w in weights], setting)


def _call(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: layer(x)


def _linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.nn.functional.linear(x, weight)


def _dense_maker(device: torch.device) -> Callable[[int, int, int], tuple[Callable[[Tensor], Tensor], int]]:
    def make(rows: int, columns: int, seed: int) -> tuple[Callable[[Tensor], Tensor], int]:
        weight = torch.randn(rows, columns, device=device, dtype=torch.bfloat16).mul_(columns**-0.5)
        return _linear(weight), 2 * weight.numel()

    return make


def _packed_maker(device: torch.device) -> Callable[[int, int, int], tuple[Callable[[Tensor], Tensor], int]]:
    def make(rows: int, columns: int, seed: int) -> tuple[Callable[[Tensor], Tensor], int]:
        packed = Packed.random(uniform(rows, columns, 2), device, seed)
        return packed, packed.nbytes

    return make


def _name(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
