"""How long does training a block of a large model take? One step on a random Llama block of the 1.1B shape.

    python -m benchmarks.step                       # 512 tokens, fp32 and bfloat16
    python -m benchmarks.step --tokens 2048 --width 2048 --mlp 5632

A step is forward and backward through the block and through all roundings, and the optimiser: what `quilt --effort
normal` does epochs x samples / batch times per block. Time is linear in tokens but for the attention.
"""

import argparse
import json
import time
from itertools import pairwise

import torch
from torch import nn
from torch.func import functional_call
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benchmarks.common import stamp
from bitquilt.core.types import group_slices
from bitquilt.layer.grids.uniform import fit
from bitquilt.layer.nearest import round_to_nearest
from bitquilt.train.problem import Link, Rule, TrainingSamples, TrainingSettings
from bitquilt.train.rounding import Rounding
from bitquilt.train.trainer import train


def seconds(width: int, mlp: int, tokens: int, autocast: bool, steps: int) -> float:
    """Of one training step of one sample."""
    heads = width // 64
    config = LlamaConfig(
        hidden_size=width, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=max(1, heads // 8),
        attn_implementation="sdpa",
    )  # fmt: skip
    block = LlamaDecoderLayer(config, 0).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            groups = group_slices(module.in_features, 64)
            swept = round_to_nearest(module.weight.data, groups, lambda _k, columns: fit(columns, 2, symmetric=True))
            parts[f"{name}.weight"] = Rounding.of(swept, groups, torch.float16, Rule(1e-3, -0.5, 0.5), Rule(3e-3))
    x = torch.randn(2, tokens, width, generator=generator)
    positions = LlamaRotaryEmbedding(config)(x, torch.arange(tokens).unsqueeze(0))

    def forward(weights: object, hidden: torch.Tensor) -> torch.Tensor:
        output = functional_call(block, weights, (hidden,), {"position_embeddings": positions})  # type: ignore[arg-type]
        return output if isinstance(output, torch.Tensor) else output[0]

    times: list[float] = []
    with torch.no_grad():
        target = block(x, position_embeddings=positions)
        target = target if isinstance(target, torch.Tensor) else target[0]
    samples = TrainingSamples(2, lambda chosen: x[list(chosen)], (lambda chosen: target[list(chosen)],))
    training = TrainingSettings(steps, 1, autocast=autocast)
    train([Link(forward, parts)], samples, training, lambda _done, _of, _loss: times.append(time.perf_counter()))
    asked = time.perf_counter()
    with torch.no_grad():
        forward({name: part.weight(part.start) for name, part in parts.items()}, x[:1])
    asked = time.perf_counter() - asked  # the held-out sample, once per epoch of one step
    return min(b - a for a, b in pairwise(times)) - asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=5632)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    for autocast in (False, True):
        found = seconds(arguments.width, arguments.mlp, arguments.tokens, autocast, arguments.steps)
        row = {"autocast": autocast, "tokens": arguments.tokens, "seconds_per_step": round(found, 3)}
        print(json.dumps({**row, **stamp()}), flush=True)


if __name__ == "__main__":
    main()
