"""What do eight-bit activations cost? KL per token, decoding, against exact ones and against full precision.

    python -m benchmarks.activations          # 3 small models, 2 and 3 bits, rtn, group size 32, 4,000 tokens
    python -m benchmarks.activations --models demo --tokens 1024

Windows of 256 tokens go through the model 16 at a time with a cache, so that every product runs on the packed codes.
Needs the models and texts that BITQUILT_SHARED points to (default ../shared).
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import bitquilt
from benchmarks.common import OUTPUT, SHARED, markdown_table, stamp
from benchmarks.scored import TEXTS
from bitquilt.data.calibration import load_tokenizer
from bitquilt.data.tokens import token_stream, windows
from bitquilt.model.transformers_logging import quiet_transformers
from bitquilt.ops import cpu_kernels
from bitquilt.report.evaluation.loading import as_model

WINDOW, STEP = 256, 16


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities of `ids` [windows, WINDOW], decoded STEP tokens at a time."""
    found = []
    for window in ids:
        cache = DynamicCache(config=model.config)
        for part in window.split(STEP):
            step = model(part[None], past_key_values=cache, use_cache=True).logits[0]
            found += [step.float().log_softmax(-1)]
    return torch.cat(found)


def divergence(reference: Tensor, other: Tensor) -> float:
    return float((reference.exp() * (reference - other)).sum(-1).mean())


def row(name: str, bits: int, tokens: int) -> dict[str, Any]:
    source, text = SHARED / "models" / name, SHARED / "text" / TEXTS[name][1]
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        out = Path(folder) / "out"
        bitquilt.quantize(source, "rtn", out=out, bits=bits, group_size=32)
        ids = windows(token_stream(text, load_tokenizer(source), tokens), WINDOW)
        full, small = (logits(as_model(path, "cpu", "float32"), ids) for path in (source, out))
        model = as_model(out, "cpu", "float32")
        cpu_kernels.use_activations("int8")
        rounded = logits(model, ids)
        cpu_kernels.use_activations(None)
    exact_kl, int8_kl = divergence(full, small), divergence(full, rounded)
    return {"model": name, "bits": bits, "KL, exact": exact_kl, "KL, int8": int8_kl,
            "int8 adds": int8_kl / exact_kl - 1, "KL of int8 to exact": divergence(small, rounded)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(TEXTS))
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--tokens", type=int, default=4000)
    arguments = parser.parse_args()
    rows = [row(name, bits, arguments.tokens) for name in arguments.models for bits in arguments.bits]
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "activations.json").write_text(json.dumps({"stamp": stamp(), "rows": rows}, indent=1))
    print(markdown_table(list(rows[0]), rows))


if __name__ == "__main__":
    main()
