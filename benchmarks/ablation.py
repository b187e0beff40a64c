"""What is each ingredient of `quilt` worth? One left out or changed at a time, KL on held-out text at equal settings.

    python -m benchmarks.ablation                                    # three models, 2 and 3 bits, group size 32 and 64
    python -m benchmarks.ablation --models demo --bits 2 --group-size 64 --rows quilt "no target"

The protocol is that of benchmarks.quality (64 x 256 calibration tokens, 60,000 measured).
"""

import argparse
import json
from typing import Any

from benchmarks.common import OUTPUT, markdown_table, stamp
from benchmarks.quality import measure_recipe
from benchmarks.scored import TEXTS

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", {}),
    "gptq + scale search": ("gptq", {"scale_search": True}),
    "slim-llm": ("slim-llm", {}),
    "slim-llm + targets, group order, passes": (
        "slim-llm",
        {"alpha": 0.75, "stream_alpha": 0.75, "group_order": True, "passes": 3},
    ),
    "quilt": ("quilt", {}),
    "no target": ("quilt", {"alpha": 0.0, "stream_alpha": 0.0}),
    "no stream": ("quilt", {"stream_alpha": 0.0}),
    "alpha 0.5, stream 0.5": ("quilt", {"alpha": 0.5, "stream_alpha": 0.5}),
    "alpha 1, stream 1": ("quilt", {"alpha": 1.0, "stream_alpha": 1.0}),
    "no descent": ("quilt", {"passes": 0}),
}


def measure(model: str, row: str, bits: int, group_size: int, seed: int) -> dict[str, Any]:
    """One row on one model."""
    name, options = ROWS[row]
    return {"group_size": group_size, **measure_recipe(model, row, name, options, bits, group_size, seed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--group-size", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results = []
    for model in arguments.models:
        for bits in arguments.bits:
            for group_size in arguments.group_size:
                for row in arguments.rows:
                    results.append(measure(model, row, bits, group_size, arguments.seed))
                    print(json.dumps(results[-1]), flush=True)
    table = markdown_table(["model", "bits", "group_size", "row", "bpw", "kl_mean", "perplexity", "seconds"], results)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "ablation.json").write_text(json.dumps({"stamp": stamp(), "results": results}, indent=1))
    (OUTPUT / "ablation.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
