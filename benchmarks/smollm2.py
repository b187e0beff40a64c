"""Recipes at equal bytes of the whole folder on a real model, SmolLM2-135M-Instruct: quality, time and memory.

    python -m benchmarks.models smollm2 MODEL
    python -m benchmarks.smollm2 MODEL [--sizes 70MB] [--recipes cmpq+ gptq] [--tokens 4096]

Every row is one `bitquilt quantize --size` in a process of its own, calibrated on 64 x 512 tokens of C4, and one
`bitquilt eval` on the first tokens of WikiText-2's test set, in windows of 512. `cpu s` counts the seconds of all
cores.
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

from benchmarks.common import OUTPUT, SHARED, markdown_table, stamp

CALIBRATION = ("--calibration", SHARED / "text/c4/c4_sample.txt", "--samples", 64, "--seq-len", 512)
RECIPES = ("cmpq+", "quilt", "slim-llm", "gptq", "rtn")
COLUMNS = ("size", "recipe", "bytes", "KL", "perplexity", "minutes", "cpu s", "peak GB")


def command(*words: Any) -> dict[str, Any]:
    """Run `bitquilt` and return the JSON that it prints."""
    line = [sys.executable, "-m", "bitquilt", *map(str, words), "--json"]
    return dict(json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout))


def measured(model: Path, recipe: str, size: str, tokens: int, folder: Path) -> dict[str, Any]:
    """Quantize, evaluate, and return a row."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    made = command("quantize", model, folder / "out", "--recipe", recipe, "--size", size, *CALIBRATION)
    minutes, after = (time.perf_counter() - started) / 60, resource.getrusage(resource.RUSAGE_CHILDREN)
    text = ("--text", SHARED / "text/wikitext2/test.raw.txt", "--max-tokens", tokens, "--seq-len", 512)
    found = command("eval", folder / "out", "--reference", model, *text)
    return {
        "size": size,
        "recipe": recipe,
        "bytes": made["folder_bytes"],
        "KL": found["kl_mean"],
        "perplexity": found["perplexity"],
        "minutes": minutes,
        "cpu s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak GB": json.loads((folder / "out" / "report.json").read_text())["peak_memory_bytes"] / 1e9,
    }


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["70MB"])
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--tokens", type=int, default=4096)
    asked = parser.parse_args()
    rows = []
    for size in asked.sizes:
        for recipe in asked.recipes:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measured(asked.model, recipe, size, asked.tokens, Path(folder)))
            print(markdown_table(COLUMNS, rows[-1:]), flush=True)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "smollm2.md").write_text(f"{stamp()}\n\n{markdown_table(COLUMNS, rows)}")


if __name__ == "__main__":
    main()
