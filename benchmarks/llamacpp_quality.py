"""Whose bits are worth more? llama.cpp's quantizer with an importance matrix, and ours at exactly its bits per weight.

    pip install llama-cpp-python gguf              # not dependencies of ours
    python -m benchmarks.llamacpp_quality          # the demo model, nine types: minutes
    python -m benchmarks.llamacpp_quality --types Q2_K Q4_K_M

The demo model alone: K and I types round 256 inputs together, and its are the only layers here that have them. The
importance matrix is what llama.cpp's own tool collects, the mean square of each layer's inputs, over the tokens that
ours calibrates on. Both quantize the matrices of the blocks; embedding and head stay as they are. `bpw`: true bits per
weight of these matrices, llama.cpp's from its file (its types mix widths), ours not above it. Rows of ours are kept as
`benchmarks.rows` keeps them.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import OUTPUT, SHARED, markdown_table, stamp
from benchmarks.gguf_files import bits_per_weight, block_layers, quantize_gguf, rivals, tensor_name, write_gguf
from benchmarks.rows import Run, measured
from benchmarks.scored import calibration_ids, score_weights
from benchmarks.shapes import layer_shapes
from bitquilt.model.transformers_logging import quiet_transformers

MODEL = "demo"
SAMPLES, TOKENS = 64, 20_000
TYPES = {
    "IQ2_XXS": 19, "IQ2_XS": 20, "IQ2_S": 28, "Q2_K": 10, "IQ3_XXS": 23, "Q3_K_M": 12, "IQ4_XS": 30, "Q4_K_S": 14,
    "Q4_K_M": 15,
}  # llama_ftype  # fmt: skip
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "quilt": ("quilt", {"group_size": 64}),
    "cmpq+": ("cmpq+", {}),
}


def importance(source: Path, names: list[str]) -> dict[str, list[float]]:
    """The mean square of every layer's inputs `[in]`, by GGUF's names."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids, sums = calibration_ids(MODEL, SAMPLES), dict[str, torch.Tensor]()

    def watch(name: str) -> None:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + inputs[0].flatten(0, -2).square().sum(dim=0)

        model.get_submodule(name).register_forward_pre_hook(hook)

    for name in names:
        watch(name)
    with torch.no_grad():
        for part in ids.split(8):
            model(part)
    return {tensor_name(name): (total / ids.numel()).tolist() for name, total in sums.items()}


def theirs(file: Path, names: list[str], gguf: Any) -> dict[str, Any]:
    """The full-precision model with the file's blocks, evaluated as ours is."""
    found = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type)) for t in block_layers(file, gguf)}
    scores = score_weights(MODEL, {name: found[tensor_name(name)] for name in names}, tokens=TOKENS)
    return {"bpw": bits_per_weight(file, gguf), **scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES))
    arguments = parser.parse_args()
    llama_cpp, gguf = rivals()
    source, rows = SHARED / "models" / MODEL, []
    names = list(layer_shapes(MODEL))
    with tempfile.TemporaryDirectory() as place, quiet_transformers():
        folder = Path(place)
        write_gguf(source, folder / "f16.gguf", gguf)
        matrix = importance(source, names)
        for kind in arguments.types:
            file = folder / f"{kind}.gguf"
            quantize_gguf(folder / "f16.gguf", file, TYPES[kind], llama_cpp, matrix)
            rival = theirs(file, names, gguf)
            rows.append({"type": kind, "row": "llama.cpp", **rival})
            for row, (recipe, options) in OURS.items():
                # equal bits: to a rounding error, which a budget never forgives
                budget = rival["bpw"] * (1 + 1e-12)
                if found := measured(Run(MODEL, recipe, options, SAMPLES, TOKENS, budget)):
                    share = {"of llama.cpp's": found["kl_mean"] / rival["kl_mean"]}
                    rows.append({"type": kind, "row": row, **{key: found[key] for key in rival}, **share})
            print(json.dumps(rows[-3:]), flush=True)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "llamacpp_quality.json").write_text(json.dumps({"stamp": stamp(), "rows": rows}, indent=1))
    print(markdown_table(["type", "row", "bpw", "kl_mean", "of llama.cpp's", "perplexity", "top1_agreement"], rows))


if __name__ == "__main__":
    main()
