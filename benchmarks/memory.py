"""Peak memory of quantizing a model several times larger than the limit allows at once.

    python -m benchmarks.memory                      # a 1.1-billion-parameter Llama, bf16, 4 x 256 tokens
    python -m benchmarks.memory --layers 4           # quicker

Makes the model on disk (random weights, shard by shard), then quantizes it in a process of its own whose peak
resident memory the kernel reports; the address space is limited with RLIMIT_DATA so that an excess is an error.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.common import OUTPUT, stamp

SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
VOCABULARY = 32_000
RUN = """
import json, resource, sys, bitquilt
limit = int(sys.argv[5])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
result = bitquilt.quantize(sys.argv[1], sys.argv[4], sys.argv[3], sys.argv[2], samples=4, seq_len=256, bits=2)
print(json.dumps({"bpw": result.report["bpw"], "bytes": result.report["bytes"]}))
"""


def make_model(folder: Path, layers: int) -> int:
    """A random Llama of the 1.1B shape, one shard per block; returns its parameters."""
    generator = torch.Generator().manual_seed(0)
    weight_map, parameters = {}, 0

    def write(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal parameters
        tensors = {}
        for key, shape in shapes.items():
            values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
            tensors[key] = values.to(torch.bfloat16)
            parameters += values.numel()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, name))

    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    kv = hidden // SHAPE["num_attention_heads"] * SHAPE["num_key_value_heads"]
    for i in range(layers):
        prefix = f"model.layers.{i}."
        shapes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        write(f"block-{i:02d}.safetensors", {prefix + key: shape for key, shape in shapes.items()})
    outer = {"model.embed_tokens.weight": (VOCABULARY, hidden), "lm_head.weight": (VOCABULARY, hidden)}
    write("outer.safetensors", {**outer, "model.norm.weight": (hidden,)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "num_hidden_layers": layers,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **SHAPE,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--recipe", default="slim-llm")
    parser.add_argument("--limit-gib", type=float, default=4.0)
    arguments = parser.parse_args()
    OUTPUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUTPUT) as scratch:
        model, out, ids = Path(scratch) / "model", Path(scratch) / "out", Path(scratch) / "ids.safetensors"
        model.mkdir()
        parameters = make_model(model, arguments.layers)
        generator = torch.Generator().manual_seed(1)
        save_file({"input_ids": torch.randint(0, VOCABULARY, (4, 256), generator=generator)}, ids)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        started = time.perf_counter()
        limit = str(int(arguments.limit_gib * 2**30))
        command = [sys.executable, "-c", RUN, str(model), str(out), str(ids), arguments.recipe, limit]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"it did not fit into {arguments.limit_gib} GiB:\n{done.stderr[-2000:]}")
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    result: dict[str, Any] = {
        "parameters": parameters,
        "model bytes (bf16)": size,
        "peak resident bytes": peak,
        "peak GiB": round(peak / 2**30, 2),
        "limit GiB": arguments.limit_gib,
        "seconds": round(seconds, 1),
        "recipe": arguments.recipe,
        **json.loads(done.stdout.splitlines()[-1]),
    }
    (OUTPUT / "memory.json").write_text(json.dumps({"stamp": stamp(), **result}, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
