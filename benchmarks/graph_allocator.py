"""What the graph of `mg-ptq` brings: swept losses of its maps against the exact map of the table, layer by layer.

    python -m benchmarks.graph_allocator [--models demo stories260k] [--bits 2 3] [--group-size 32] [--blocks 2]

Rows per model and width, geometric means over layers of (swept loss / swept loss of the exact map):
`greedy`: Lagrange multiplier and repair on the table; `table only`: the network without sweeps in the loop; `graph`:
the network as `mg-ptq` trains it; `no edges`: the same with a graph of self-loops alone, the ablation; `sweeps`: how
many plans `graph` and `no edges` swept on average.
"""

import argparse
import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bitquilt
from benchmarks.common import OUTPUT, SHARED, markdown_table, stamp
from bitquilt.allocation.graph_network import GraphTraining, graph_bits
from bitquilt.allocation.knapsack import best_bits, greedy_bits
from bitquilt.core.types import Layer, LayerPlan, LayerStats
from bitquilt.layer.sensitivity.column_graph import adjacency, column_features
from bitquilt.recipes.mg_ptq import MGPTQ

COLUMNS = ("model", "bits", "layers", "greedy", "table only", "graph", "no edges", "sweeps", "sweeps, no edges")


def layers_of(folder: Path, blocks: int) -> list[Layer]:
    """The linear layers of the first and the last blocks, with the Hessian of a text that the model writes."""
    model = bitquilt.load(folder) if (folder / "plan.json").is_file() else _plain(folder)
    ids = torch.randint(3, model.config.vocab_size, (32, 1), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    ids = model.generate(ids, do_sample=True, max_new_tokens=96, min_new_tokens=96, pad_token_id=0)
    stack = model.get_decoder().layers
    chosen = [stack[i] for i in sorted({*range(blocks // 2), *range(len(stack) - (blocks + 1) // 2, len(stack))})]
    seen: dict[nn.Module, Tensor] = {}
    linears = [(f"{i}.{n}", m) for i, b in enumerate(chosen) for n, m in b.named_modules() if isinstance(m, nn.Linear)]
    handles = [
        m.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0].flatten(0, 1))) for _, m in linears
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return [
        Layer(name, m.weight.detach().float(), None, LayerStats(x.t() @ x, len(x), x[:512]))
        for name, m in linears
        for x in [seen[m].float()]
    ]


def _plain(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def compared(layer: Layer, recipe: MGPTQ) -> dict[str, float]:
    """Swept losses relative to the exact map's, and numbers of sweeps."""
    prepared = recipe.prepare(layer.stats)
    assert layer.stats is not None
    columns = layer.weight.shape[1]
    budget = math.floor(recipe.bits * columns + 1e-9)
    table, units = recipe._table(layer, layer.weight, prepared, budget)
    widths, errors = [unit.stop - unit.start for unit in units], table.tolist()

    @cache
    def swept(bits: tuple[int, ...]) -> float:
        return recipe._solved(layer, LayerPlan(bits, recipe._plan_size()), prepared)[1]

    features = column_features(layer.weight, layer.stats, prepared, units)
    graph, loops = adjacency(prepared.upper, units, 16), torch.eye(len(units)).to_sparse()
    plan = partial(graph_bits, table, recipe.palette, widths, budget, features)
    counted: list[tuple[int, ...]] = []

    def counting(bits: tuple[int, ...]) -> float:
        counted.append(bits)
        return swept(bits)

    exact = swept(best_bits(errors, recipe.palette, widths, budget))
    found = {
        "greedy": swept(greedy_bits(errors, recipe.palette, widths, budget)),
        "table only": swept(plan(graph, GraphTraining(rounds=0), swept)),
        "graph": swept(plan(graph, GraphTraining(), counting)),
    }
    sweeps = len(counted)
    found["no edges"] = swept(plan(loops, GraphTraining(), counting))
    return {name: loss / exact for name, loss in found.items()} | {
        "sweeps": sweeps,
        "sweeps, no edges": len(counted) - sweeps,
    }


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["demo", "stories260k"])
    parser.add_argument("--bits", nargs="+", type=float, default=[2, 3])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=2)
    asked = parser.parse_args()
    rows = []
    for model in asked.models:
        layers = layers_of(SHARED / "models" / model, asked.blocks)
        for bits in asked.bits:
            found = [compared(layer, MGPTQ(bits=bits, group_size=asked.group_size)) for layer in layers]
            row: dict[str, Any] = {"model": model, "bits": bits, "layers": len(layers)}
            for name in COLUMNS[3:]:
                values = torch.tensor([one[name] for one in found], dtype=torch.float64)
                row[name] = float(values.mean() if "sweeps" in name else values.log().mean().exp())
            rows.append(row)
            print(markdown_table(COLUMNS, rows[-1:]), flush=True)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "graph_allocator.md").write_text(f"{stamp()}\n\n{markdown_table(COLUMNS, rows)}")


if __name__ == "__main__":
    main()
