"""Mean KL and perplexity of folders in MLX's format against their full-precision source.

    pip install mlx mlx-lm                                   # not dependencies of ours
    mlx_lm.convert --hf-path SOURCE -q --q-bits 4 --mlx-path THEIRS
    bitquilt quantize SOURCE OUT --for mlx ... && bitquilt export OUT OURS --to mlx
    python -m benchmarks.mlx_folders SOURCE THEIRS OURS

Weights come from `mx.dequantize`, and torch multiplies in float32: `mlx_lm` itself computes in 16 bits and takes
minutes for a window on a CPU. Text: the first eight windows of 512 tokens of WikiText-2's test set.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import SHARED, markdown_table

LENGTH, WINDOWS = 512, 8


def weights(folder: Path, mx: Any) -> dict[str, Tensor]:
    """The tensors of an MLX folder, dequantized, in float32."""
    import numpy as np

    forms = json.loads((folder / "config.json").read_text())["quantization"]
    stored = {name: value for file in folder.glob("model*.safetensors") for name, value in mx.load(str(file)).items()}
    found = {}
    for name, value in stored.items():
        path = name.removesuffix(".weight")
        if name.endswith((".scales", ".biases")):
            continue
        if f"{path}.scales" in stored:
            form = forms.get(path) or forms
            scales, biases = (stored[f"{path}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            value = mx.dequantize(value, scales, biases, form["group_size"], form["bits"])
        found[name] = torch.from_numpy(np.array(value.astype(mx.float32)))
    return found


@torch.no_grad()
def log_probabilities(model: Any, windows: Tensor) -> list[Tensor]:
    """Of the next token, `[tokens, vocabulary]` for each window."""
    return [model(window[None]).logits[0].log_softmax(-1) for window in windows]


def perplexity(found: list[Tensor], windows: Tensor) -> float:
    """Of all but the first token of each window."""
    told = sum(float(p[:-1].gather(1, ids[1:, None]).sum()) for p, ids in zip(found, windows, strict=True))
    return math.exp(-told / (len(windows) * (LENGTH - 1)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    asked = parser.parse_args()
    try:
        import mlx.core as mx
    except ImportError:
        raise SystemExit("mlx is missing; pip install mlx mlx-lm") from None
    text = (SHARED / "text/wikitext2/test.raw.txt").read_text()[:60_000]
    ids = AutoTokenizer.from_pretrained(asked.source)(text, add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: LENGTH * WINDOWS]).view(WINDOWS, LENGTH)
    model = AutoModelForCausalLM.from_pretrained(asked.source, dtype=torch.float32).eval()
    full = log_probabilities(model, windows)
    rows = [{"folder": str(asked.source), "bytes": None, "KL": 0.0, "perplexity": perplexity(full, windows)}]
    for folder in asked.folders:
        model.load_state_dict(weights(folder, mx), strict=False)
        found = log_probabilities(model, windows)
        apart = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(full, found, strict=True)]
        rows.append(
            {
                "folder": str(folder),
                "bytes": sum(path.stat().st_size for path in folder.iterdir()),
                "KL": sum(apart) / len(apart),
                "perplexity": perplexity(found, windows),
            }
        )
    print(markdown_table(("folder", "bytes", "KL", "perplexity"), rows))


if __name__ == "__main__":
    main()
