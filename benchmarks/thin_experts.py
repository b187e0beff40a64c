"""How much of the pooled Hessian an expert with few tokens should take: error at 3 bits over the weight of the pool.

    python -m benchmarks.thin_experts

Two MLPs of shakespeare2m-bytes stand for experts: half of their neurons, and the tokens that a random router of eight
sends there, three routers each. `gate` and `down` are solved by gptq for H_e + c in C_pool, from the first n tokens of
the expert, and their squared output error is measured on 2,048 others of it. c counts pooled tokens per input channel:
0 is the expert's own Hessian.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import OUTPUT, SHARED, markdown_table, stamp
from bitquilt.core.types import Layer, LayerStats, uniform_plan
from bitquilt.model.linear import QuantizedLinear
from bitquilt.recipes.gptq import GPTQ

LAYERS, ROUTERS, EXPERTS, BITS = (1, 3), 3, 8, 3
TOKENS = (16, 64, 192, 512, 2048)
WEIGHTS = (0, 0.1, 0.3, 1, 3)


def block_inputs() -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield each MLP with its inputs `[tokens, width]`."""
    folder = SHARED / "models" / "shakespeare2m-bytes"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = (SHARED / "text/shakespeare/tinyshakespeare.txt").read_text()[:400_000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])[: 256 * 400].view(-1, 256)
    for i in LAYERS:
        seen: list[Tensor] = []
        mlp = model.model.layers[i].mlp
        handle = mlp.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            for part in ids.split(16):
                model(part)
        handle.remove()
        yield mlp, torch.cat(seen)


def solved(weight: Tensor, hessian: Tensor, tokens: float) -> Tensor:
    """The weight after gptq for a Hessian that sums over so many tokens."""
    recipe = GPTQ(bits=BITS, group_size=64)
    layer = Layer("expert", weight, None, LayerStats(hessian, max(1, int(tokens))))
    plan = uniform_plan(weight.shape[1], BITS, 64)
    return QuantizedLinear.from_weight(recipe.quantize(layer, plan, recipe.prepare(layer.stats)).weight).dequantize()


def errors(mlp: nn.Module, inputs: Tensor, seed: int) -> Iterator[tuple[str, int, float, float]]:
    """Yield (layer, tokens, weight of the pool, relative squared error on other tokens of the expert)."""
    generator = torch.Generator().manual_seed(seed)
    router = torch.randn(EXPERTS, inputs.shape[1], generator=generator)
    mine = inputs[((inputs - inputs.mean(0)) @ router.t()).argmax(1) == seed]
    mine = mine[torch.randperm(len(mine), generator=generator)]
    pool = inputs[torch.linspace(0, len(inputs) - 1, 1024).long()]
    half = mlp.gate_proj.weight.shape[0] // 2
    gate, up = mlp.gate_proj.weight.data[:half], mlp.up_proj.weight.data[:half]
    down = mlp.down_proj.weight.data[:, :half].contiguous()

    def hidden(x: Tensor) -> Tensor:
        return nn.functional.silu(x @ gate.t()) * (x @ up.t())

    kinds: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {"gate": (gate, lambda x: x), "down": (down, hidden)}
    for kind, (weight, reads) in kinds.items():
        own, pooled, held = reads(mine[: TOKENS[-1]]), reads(pool), reads(mine[TOKENS[-1] : 2 * TOKENS[-1]])
        common, width = pooled.t() @ pooled / len(pooled), weight.shape[1]
        for n in TOKENS:
            for c in WEIGHTS:
                found = solved(weight, own[:n].t() @ own[:n] + c * width * common, n + c * width)
                wrong = ((found - weight) @ held.t()).square().sum() / (weight @ held.t()).square().sum()
                yield kind, n, c, float(wrong)


def main() -> None:
    """Print and write the table."""
    found: dict[tuple[str, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for mlp, inputs in block_inputs():
        for seed in range(ROUTERS):
            for kind, n, c, error in errors(mlp, inputs, seed):
                found[kind, n][c].append(error)
    columns = ("layer", "tokens", *(f"c = {c}" for c in WEIGHTS))
    rows = [
        {"layer": kind, "tokens": n, **{f"c = {c}": sum(own[c]) / len(own[c]) for c in WEIGHTS}}
        for (kind, n), own in sorted(found.items(), reverse=True)
    ]
    table = markdown_table(columns, rows)
    print(table)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "thin_experts.md").write_text(f"{stamp()}\n\n{table}")


if __name__ == "__main__":
    main()
