"""One LLaMA-7B-shaped layer, stage by stage: Hessian, factor, search, sweep, packing.

    python -m benchmarks.layer                 # 4096 x 4096 and 4096 x 11008, group size 128, 2 bits
    python -m benchmarks.layer --out-features 1024 --in-features 2048     # quicker

Random weights; inputs of 8 x 2048 tokens with channel scales spread over two orders of magnitude and correlated
channels, as real activations are. Then the search against trying every p with a full matrix product, on the same
tokens and the same quantized copies of the weight: times, their ratio, and whether both choose the same bits.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import OUTPUT, markdown_table, stamp
from bitquilt.allocation.double_pointer import pair_candidates, pairs
from bitquilt.core.packing import pack
from bitquilt.core.types import Layer, LayerStats, group_slices
from bitquilt.layer.grids.uniform import RangeSearch, fit
from bitquilt.layer.hessian import factorize
from bitquilt.layer.sensitivity.output_divergence import pair_losses
from bitquilt.layer.sensitivity.salience import group_salience, salience
from bitquilt.recipes.slim_llm.slim_llm import SlimLLM

SEQUENCES, TOKENS, SAMPLE = 8, 2048, 4096


def realistic_inputs(width: int, count: int, generator: torch.Generator) -> Tensor:
    """`[count, width]`: log-normal channel scales, a low-rank common part, heavy tails."""
    scales = torch.exp(torch.randn(width, generator=generator))
    common = torch.randn(count, 64, generator=generator) @ torch.randn(64, width, generator=generator) / 8
    return (common + torch.randn(count, width, generator=generator)) * scales


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def naive_losses(x: Tensor, weight: Tensor, copies: dict[int, list[Tensor]], maps: list[tuple[int, ...]]) -> Tensor:
    """The objective with one full product per candidate, otherwise computed alike."""
    losses = []
    for bits in maps:
        candidate = torch.cat([copies[b][k] for k, b in enumerate(bits)], dim=1)
        losses.append(pair_losses(x, weight, None, candidate, []))
    return torch.cat(losses)


def search_against_naive(layer: Layer, bits: int, group_size: int) -> dict[str, Any]:
    """Both searches on the same quantized copies."""
    assert layer.stats is not None
    assert layer.stats.sample is not None
    x, weight = layer.stats.sample, layer.weight
    factor = factorize(layer.stats.hessian / layer.stats.tokens, 0.01)
    groups = group_slices(weight.shape[1], group_size)
    ranking = group_salience(salience(weight, factor), groups, factor.dead).tolist()
    copies = {
        b: [fit(weight[:, g], b, factor.importance[g], search=RangeSearch()).quantize(weight[:, g]) for g in groups]
        for b in (bits - 1, bits, bits + 1)
    }
    maps = pair_candidates(ranking, bits)

    def incremental() -> Tensor:
        changes = [
            (groups[k], copies[b][k] - copies[bits][k])
            for low, high in pairs(ranking)
            for k, b in ((low, bits - 1), (high, bits + 1))
        ]
        return pair_losses(x, weight, None, torch.cat(copies[bits], dim=1), changes)

    incremental()  # warm
    fast, fast_seconds = timed(incremental)
    slow, slow_seconds = timed(lambda: naive_losses(x, weight, copies, maps))
    return {
        "candidates": len(maps),
        "search s": fast_seconds,
        "every p by full matmuls s": slow_seconds,
        "ratio": slow_seconds / fast_seconds,
        "same bits": maps[int(fast.argmin())] == maps[int(slow.argmin())],
        "largest relative difference": float(((fast - slow) / slow).abs().max()),
    }


def stages(out_features: int, in_features: int, bits: int, group_size: int) -> dict[str, Any]:
    """Seconds of each stage of slim-llm on one layer."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.02
    # column groups of unequal size, so that the search has something to find
    sizes = torch.exp(0.7 * torch.randn(-(-in_features // group_size), generator=generator))
    weight *= sizes.repeat_interleave(group_size)[:in_features]
    hessian = torch.zeros(in_features, in_features)
    samples, seconds = [], 0.0
    for _ in range(SEQUENCES):
        x = realistic_inputs(in_features, TOKENS, torch.Generator().manual_seed(len(samples)))
        seconds += timed(lambda x=x: hessian.addmm_(x.t(), x))[1]
        samples.append(x[:: SEQUENCES * TOKENS // SAMPLE])
    layer = Layer("layer", weight, None, LayerStats(hessian, SEQUENCES * TOKENS, torch.cat(samples)))
    recipe = SlimLLM(bits=bits, group_size=group_size)
    factor, factor_seconds = timed(lambda: recipe.prepare(layer.stats))
    cost, measure_seconds = timed(lambda: recipe.measure(layer, factor))
    plan = recipe.allocate(cost, in_features)
    solution, sweep_seconds = timed(lambda: recipe.quantize(layer, plan, factor))
    _, pack_seconds = timed(lambda: pack(solution.weight))
    row = {
        "layer": f"{out_features} x {in_features}",
        "hessian s": seconds,
        "factor s": factor_seconds,
        "fit candidates and search s": measure_seconds,
        "sweep with scale search s": sweep_seconds,
        "pack s": pack_seconds,
        "pairs": sum(b > bits for b in plan.bits),
    }
    return row | search_against_naive(layer, bits, group_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out-features", type=int, default=4096)
    parser.add_argument("--in-features", type=int, nargs="+", default=[4096, 11008])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=128)
    arguments = parser.parse_args()
    rows = []
    with torch.no_grad():
        for width in arguments.in_features:
            rows.append(stages(arguments.out_features, width, arguments.bits, arguments.group_size))
            print(json.dumps(rows[-1]), flush=True)
    both = [sum(row[key] for row in rows) for key in ("search s", "every p by full matmuls s")]
    total = {"layer": "all", "search s": both[0], "every p by full matmuls s": both[1], "ratio": both[1] / both[0]}
    table = markdown_table(list(rows[0]), [*rows, total])
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "layer.json").write_text(json.dumps({"stamp": stamp(), "rows": rows}, indent=1))
    (OUTPUT / "layer.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
