"""SliM-LLM of a random model of LLaMA-7B's shape on a GPU, for `benchmarks.gpu`: how long does each stage take?

The model (13.5 GB in bf16) and the run's work lie in benchmarks/output/gpu-slim; a run that was cut short continues
there. Needs what the package needs, transformers above all, and 40 GB of disk.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import OUTPUT
from benchmarks.gpu_setup import Setting, Sizes


def run_slim(setting: Setting) -> dict[str, Any]:
    """Seconds by stage and minutes in all; of `setting.blocks` blocks the blocks' time in proportion to all of them."""
    import bitquilt

    sizes, count = setting.sizes, min(setting.blocks, setting.sizes.layers)
    folder = OUTPUT / ("gpu-slim-tiny" if setting.tiny else "gpu-slim")
    model = folder / f"model-{count}"
    if not (model / "model.safetensors.index.json").is_file():
        _write_model(model, sizes, count, setting.device)
    out = folder / f"slim-{count}"
    shutil.rmtree(out, ignore_errors=True)
    options = {"bits": 2, "group_size": 128} if not setting.tiny else {"bits": 2, "group_size": 64}
    result = bitquilt.quantize(
        model, "slim-llm", _tokens(folder, sizes), out, samples=sizes.samples, seq_len=min(2048, sizes.tokens),
        device=str(setting.device), **options,
    )  # fmt: skip
    report = result.report
    stages = {stage["name"]: float(stage["seconds"]) for stage in report["stages"]}
    blocks = float(report["seconds"]["blocks"])
    rest = float(report["seconds"]["this_process"]) - blocks
    return {
        "stages": stages,
        "blocks": count,
        "of": sizes.layers,
        "continued_after_block": report["continued_after_block"],
        "seconds_per_block": blocks / count,
        "minutes": (blocks * sizes.layers / count + max(0.0, rest)) / 60,
        "bpw": report["bpw"],
        "logit_difference": report["logit_difference"],
    }


def _tokens(folder: Path, sizes: Sizes) -> Path:
    from safetensors.torch import save_file

    path = folder / "tokens.safetensors"
    if not path.is_file():
        generator = torch.Generator().manual_seed(0)
        shape = (sizes.samples, min(2048, sizes.tokens))
        save_file({"input_ids": torch.randint(3, sizes.vocabulary, shape, generator=generator)}, path)
    return path


def _write_model(folder: Path, sizes: Sizes, blocks: int, device: torch.device) -> None:
    """Random bf16 weights under transformers' names, one file per block, the index last."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": sizes.width,
        "intermediate_size": sizes.inner, "num_hidden_layers": blocks, "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads, "vocab_size": sizes.vocabulary, "rms_norm_eps": 1e-5,
        "max_position_embeddings": max(2048, sizes.tokens), "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        found = torch.randn(rows, columns, generator=generator, device=device) * columns**-0.5
        return found.to(torch.bfloat16).cpu()

    ones = torch.ones(sizes.width, dtype=torch.bfloat16)
    wide, names = sizes.width, {}
    outer = {"model.embed_tokens.weight": matrix(sizes.vocabulary, wide), "model.norm.weight": ones.clone()}
    parts = [outer | {"lm_head.weight": matrix(sizes.vocabulary, wide)}]
    for i in range(blocks + 1):
        file = f"model-{i:05d}.safetensors"
        tensors = parts.pop() if i == 0 else _block(f"model.layers.{i - 1}.", matrix, ones, sizes)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _block(prefix: str, matrix: Any, ones: torch.Tensor, sizes: Sizes) -> dict[str, torch.Tensor]:
    wide, inner = sizes.width, sizes.inner
    found = {f"{prefix}self_attn.{name}_proj.weight": matrix(wide, wide) for name in "qkvo"}
    found |= {f"{prefix}mlp.{name}_proj.weight": matrix(inner, wide) for name in ("gate", "up")}
    found |= {f"{prefix}mlp.down_proj.weight": matrix(wide, inner)}
    return found | {f"{prefix}{name}_layernorm.weight": ones.clone() for name in ("input", "post_attention")}
