"""Sizes of mixtures of experts at 3 bits per weight, by `bitquilt plan` on made-up headers: no weight exists.

python -m benchmarks.moe_sizes [NAME ...] [--bpw 3]

Each model's config is written as published; its safetensors files have true headers and no data (a hole of the right
size, on a file system that has holes).
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
import transformers
from accelerate import init_empty_weights
from transformers.core_model_loading import revert_weight_conversion

_COMMON: dict[str, Any] = {"torch_dtype": "bfloat16", "tie_word_embeddings": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "OLMoE-1B-7B": (
        "olmoe",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
         "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304},
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        {"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
         "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
         "vocab_size": 201088},
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
         "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
         "num_experts_per_tok": 8, "vocab_size": 151936, "mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
    "Mixtral-8x7B": (
        "mixtral",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000},
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        {"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
         "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1,
         "num_experts_per_tok": 8, "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512,
         "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 129280},
    ),
}  # fmt: skip
_FILE_BYTES = 5 * 10**9  # as on the hub; a file is mapped to read its header
_CLI = "import bitquilt.cli as c; c.main()"


def write_headers(name: str, folder: Path) -> int:
    """Write config.json and files of weights without data; return the bytes that the weights would take."""
    kind, fields = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **{**fields, **_COMMON})
    with init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    state = revert_weight_conversion(model, dict(model.state_dict()))
    files: list[dict[str, torch.Tensor]] = [{}]
    for key, tensor in state.items():
        if sum(t.nbytes for t in files[-1].values()) + tensor.nbytes > _FILE_BYTES and files[-1]:
            files.append({})
        files[-1][key] = tensor
    index: dict[str, str] = {}
    for number, tensors in enumerate(files):
        file, offset, header = folder / f"model-{number}.safetensors", 0, {}
        for key, tensor in tensors.items():
            dtype = {torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype]
            header[key] = {
                "dtype": dtype,
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
            index[key] = file.name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(t.nbytes for t in state.values())


def main() -> None:
    """Print a row for each model: bytes in 16 bits, of the planned folder, seconds and peak memory of the plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(MODELS))
    parser.add_argument("--bpw", default="3")
    parser.add_argument("--recipe", default="slim-llm")
    chosen = parser.parse_args()
    for name in chosen.names:
        with tempfile.TemporaryDirectory() as place:
            nbytes = write_headers(name, Path(place) / name)
            command = [sys.executable, "-c", _CLI, "plan", str(Path(place) / name), "--recipe", chosen.recipe]
            started = time.perf_counter()
            done = subprocess.run(
                [*command, "--recipe", "slim-llm", "--bpw", chosen.bpw, "--json"],
                capture_output=True,
                text=True,
                check=False,
            )
            seconds = time.perf_counter() - started
            if done.returncode:
                print(f"{name}: {done.stderr.strip()[-500:]}")
                continue
            found = json.loads(done.stdout)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # the largest so far
            print(
                f"{name:16s} {nbytes / 1e9:8.1f} GB in 16 bits, {found['bytes'] / 1e9:6.1f} at {found['bpw']:.3f} bits "
                f"({len(found['layers'])} matrices); planned in {seconds:.1f} s and {peak:.1f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
