"""How long does planning a 70B model take? Headers of a Llama-70B shape, weights as holes in sparse files.

    python -m benchmarks.planning

`plan` from headers alone, and the global allocation of its 50 thousand column groups (slim-llm) and 6 million channels
(cmpq) with tables of loss drawn at random: wall time and peak memory of the whole command, Python's start included.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import OUTPUT, markdown_table, stamp
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.structure import open_skeleton
from bitquilt.planning.sensitivities import Sensitivities, measured_for
from bitquilt.recipes import make_recipe
from bitquilt.stream.job import all_targets, shapes

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip


def write_model(folder: Path) -> None:
    """A config, an index and one sparse file per block: real headers, no data."""
    wide, middle, keys = 8192, 28672, 1024
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for i in range(80):
        at = f"model.layers.{i}"
        parts[f"block-{i:02d}.safetensors"] = {
            f"{at}.self_attn.q_proj.weight": (wide, wide), f"{at}.self_attn.k_proj.weight": (keys, wide),
            f"{at}.self_attn.v_proj.weight": (keys, wide), f"{at}.self_attn.o_proj.weight": (wide, wide),
            f"{at}.mlp.gate_proj.weight": (middle, wide), f"{at}.mlp.up_proj.weight": (middle, wide),
            f"{at}.mlp.down_proj.weight": (wide, middle), f"{at}.input_layernorm.weight": (wide,),
            f"{at}.post_attention_layernorm.weight": (wide,),
        }  # fmt: skip
    outer = {
        "model.embed_tokens.weight": (128256, wide),
        "model.norm.weight": (wide,),
        "lm_head.weight": (128256, wide),
    }
    parts["outer.safetensors"] = outer
    for name, tensors in parts.items():
        header: dict[str, Any] = {}
        offset = 0
        for tensor, shape in tensors.items():
            size = 2 * int(np.prod(shape))
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
    index = {"metadata": {}, "weight_map": {t: name for name, tensors in parts.items() for t in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))


def random_tables(folder: Path, name: str, path: Path) -> int:
    """Lognormal tables for every layer; returns the number of units."""
    checkpoint = open_checkpoint(folder)
    recipe: Any = make_recipe(name)
    generator = np.random.default_rng(0)
    losses, widths = {}, {}
    for layer, (rows, columns) in shapes(all_targets(open_skeleton(checkpoint), (), False)).items():
        widths[layer] = recipe.widths(rows)
        count = -(-columns // getattr(recipe, "group_size", 1))
        scale = np.exp(generator.normal(-12, 2, (count, 1)))
        fall = np.cumsum(np.log(generator.uniform(2.5, 5, (count, len(widths[layer]) - 1))), axis=1)
        losses[layer] = (scale * np.exp(-np.hstack([np.zeros((count, 1)), fall]))).astype(np.float32)
    group_size = getattr(recipe, "group_size", 1)
    Sensitivities(losses, widths, group_size, 6.0, measured_for(checkpoint, recipe)).save(path)
    return sum(map(len, losses.values()))


def timed(*arguments: str) -> dict[str, Any]:
    """Wall seconds and peak resident bytes of one `bitquilt` command, and what it printed."""
    command = [sys.executable, "-c", "from bitquilt.cli import main; main()", *arguments]
    started = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": round(seconds, 2), "peak GiB": round(peak / 2**30, 2), "value": json.loads(ran.stdout)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "llama-70b-shape"
        folder.mkdir()
        write_model(folder)
        os.chdir(name)
        ran = timed("plan", str(folder), "--json")
        rows.append({"what": "plan from headers", "units": None, **ran})
        ran = timed("plan", str(folder), "--size", "30GiB", "--json")
        rows.append({"what": "plan --size 30GiB from headers", "units": None, **ran})
        for recipe in ("slim-llm", "cmpq"):
            tables = Path(name) / f"{recipe}.tables"
            units = random_tables(folder, recipe, tables)
            flags = ("--recipe", recipe, "--size", "30GiB", "--sensitivities", str(tables), "--json")
            rows.append({"what": f"{recipe}, global, 30 GiB", "units": units, **timed("plan", str(folder), *flags)})
    for row in rows:
        value = row.pop("value")
        row |= {"bytes": value["bytes"], "bpw": value["bpw"]}
        print(json.dumps(row), flush=True)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "planning.json").write_text(json.dumps({"stamp": stamp(), "results": rows}, indent=1))
    print(markdown_table(list(rows[0]), rows))


if __name__ == "__main__":
    main()
