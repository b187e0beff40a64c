"""Which text to calibrate on, and how much of it: one recipe, one width, a folder for each source and amount.

    python -m benchmarks.models smollm2 MODEL
    python -m benchmarks.calibration_sources MODEL [--sources general self] [--samples 32 64 256]

Every row is one `bitquilt quantize --recipe gptq --bits 3 --embedding-bits 6` on sequences of 512 tokens and one
`bitquilt eval` on the first 8192 tokens of WikiText-2's test set and of the books, in windows of 512.
"""

import argparse
import resource
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import OUTPUT, SHARED, markdown_table, stamp
from benchmarks.smollm2 import command

SOURCES = {
    "general": "general",
    "self": "self",
    "c4": SHARED / "text/c4/c4_sample.txt",
    "wikitext": SHARED / "text/wikitext2/valid.tokens.txt",
    "books": SHARED / "text/books/calibration.txt",
}
MEASURED = {"WikiText-2": SHARED / "text/wikitext2/test.raw.txt", "books": SHARED / "text/books/evaluation.txt"}
COLUMNS = ("source", "tokens", "WikiText-2 KL", "books KL", "cpu s", "peak GB")
RECIPE = ("--recipe", "gptq", "--bits", 3, "--group-size", 32, "--embedding-bits", 6)


def measured(model: Path, source: str, samples: int, out: Path) -> dict[str, Any]:
    """Quantize, evaluate, and return a row."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    data = ("--calibration", SOURCES[source], "--samples", samples, "--seq-len", 512)
    command("quantize", model, out, *RECIPE, *data)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    row = {"source": source, "tokens": samples * 512}
    for name, text in MEASURED.items():
        window = ("--text", text, "--max-tokens", 8192, "--seq-len", 512)
        row[f"{name} KL"] = command("eval", out, "--reference", model, *window)["kl_mean"]
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**row, "cpu s": spent, "peak GB": after.ru_maxrss * 1024 / 1e9}


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--samples", nargs="+", type=int, default=[64])
    asked = parser.parse_args()
    rows = []
    for source in asked.sources:
        for samples in asked.samples:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measured(asked.model, source, samples, Path(folder) / "out"))
            print(markdown_table(COLUMNS, rows[-1:]), flush=True)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "calibration_sources.md").write_text(f"{stamp()}\n\n{markdown_table(COLUMNS, rows)}")


if __name__ == "__main__":
    main()
