"""What the GPU gives, everything in one command: layers, prefill, a model of LLaMA-7B's shape, SliM-LLM of that shape.

    PYTHONPATH=src python -m benchmarks.gpu                      # every part, one table with targets
    PYTHONPATH=src python -m benchmarks.gpu --only copy layers   # some parts; what others found before is kept
    PYTHONPATH=src python -m benchmarks.gpu --report             # the table of what was found so far
    PYTHONPATH=src python -m benchmarks.gpu --only tune          # better cuts, kept where products look for them
    PYTHONPATH=src python -m benchmarks.gpu --only slim --blocks 4   # four blocks, the rest by proportion
    TRITON_INTERPRET=1 BITQUILT_ISA=triton python -m benchmarks.gpu --device cpu --tiny     # tries the script

Needs PyTorch and Triton; the part `slim` the package's own requirements too. Weights are random. Each product of a
measurement reads another copy of its weight, more of them than the cache holds, in one CUDA graph. Every part is saved
when it is done (benchmarks/output/gpu.json): after an interruption name the parts that are missing.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import gpu_parts
from benchmarks.common import OUTPUT, markdown_table, stamp
from benchmarks.gpu_setup import Setting, name_of

PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "copy": gpu_parts.copy,
    "layers": gpu_parts.layers,
    "codebooks": gpu_parts.codebooks,
    "sixteen": gpu_parts.sixteen,
    "prefill": gpu_parts.prefill,
    "decode": gpu_parts.decode,
    "slim": gpu_parts.slim,
    "tune": gpu_parts.tune,
    "tune-codebooks": gpu_parts.tune_codebooks,
    "tune-mx": gpu_parts.tune_mx,
}
_TUNES = tuple(part for part in PARTS if part.startswith("tune"))
_OVER_BF16 = {2: 5.0, 3: 3.5, 4: 2.8}


def rows(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: what, measured, target, verdict; parts that are missing are not in it."""
    table: list[dict[str, Any]] = []

    def add(what: str, measured: float, unit: str, target: float | None = None, below: bool = False) -> None:
        verdict = (
            None if target is None else "pass" if (measured <= target if below else measured >= target) else "miss"
        )
        sign = "<=" if below else ">="
        wanted = None if target is None else f"{sign} {target:g}"
        table.append({"what": what, "measured": measured, "unit": unit, "target": wanted, "verdict": verdict})

    if copied := found.get("copy"):
        add("copy, read + written", copied["bytes_per_second"] / 1e9, "GB/s")
        add("bf16 product 8192^3", copied["flops"] / 1e12, "TFLOP/s")
    for part, share in (("layers", 0.70), ("codebooks", 0.50)):
        for row in found.get(part, {}).get("rows", []):
            name = f"{row['shape']}, {row['kind']}"
            add(f"{name}: 1 token", row["seconds"] * 1e6, "us")
            add(f"{name}: share of the copy", row["share"], "", share)
            target = _OVER_BF16[row["bits"]] if part == "layers" else None
            add(f"{name}: over bf16", row["over_bf16"], "x", target)
    for row in found.get("sixteen", {}).get("rows", []):
        add(f"{row['shape']}, {row['kind']}: 16 tokens / 1 token", row["ratio"], "x", 1.3, below=True)
    for row in found.get("prefill", {}).get("rows", []):
        target = 0.8 if row["path"] == "chosen" else None
        add(f"{row['shape']}, {row['kind']}, {row['tokens']} tokens ({row['path']}): over bf16", row["over_bf16"], "x",
            target)  # fmt: skip
    if model := found.get("decode"):
        add("LLaMA-7B, 2 bits: weights in memory", model["bytes"] / 1e9, "GB", 2.3, below=True)
        add("LLaMA-7B, bf16: decode", model["bf16_tokens_per_second"], "tokens/s")
        add("LLaMA-7B, 2 bits: decode", model["tokens_per_second"], "tokens/s")
        add("LLaMA-7B, 2 bits: over bf16", model["tokens_per_second"] / model["bf16_tokens_per_second"], "x", 4.0)
    if slim := found.get("slim"):
        for stage, seconds in slim["stages"].items():
            add(f"SliM-LLM, {stage}", seconds, "s")
        whole = "" if slim["blocks"] == slim["of"] else f" ({slim['blocks']} of {slim['of']} blocks, by proportion)"
        add(f"SliM-LLM, in all{whole}", slim["minutes"], "min", 15.0, below=True)
    for row in (row for part in _TUNES for row in found.get(part, {}).get("rows", [])):
        add(
            f"{row['shape']}, {row['kind']}, {row['tokens']} tokens: of {row['tried']} cuts {row['best']}, "
            f"{row['chosen'] / row['seconds']:.2f} x the speed of the cut without measuring",
            row["seconds"] * 1e6,
            "us",
        )
    return table


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=[p for p in PARTS if p not in _TUNES])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes for trying the script, without meaning")
    parser.add_argument("--blocks", type=int, default=32, help="of the SliM-LLM run")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON instead of a table")
    arguments = parser.parse_args(given)
    path = OUTPUT / ("gpu-tiny.json" if arguments.tiny else "gpu.json")
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if not arguments.report:
        if arguments.device != "cpu" and not torch.cuda.is_available():
            raise SystemExit("no GPU that torch can use; --device cpu --tiny tries the script without one")
        setting = Setting.of(arguments.device, arguments.tiny, arguments.blocks, found.get("copy"))
        for part in arguments.only:
            started = time.perf_counter()
            try:
                result = PARTS[part](setting)
            except (
                ModuleNotFoundError
            ) as missing:  # on a machine with PyTorch and Triton alone: the part that quantizes
                print(f"{part}: left out, {missing.name} is not installed; pip install .", flush=True)
                continue
            if part == "copy":
                setting = Setting.of(arguments.device, arguments.tiny, arguments.blocks, result)
            result |= {"took": time.perf_counter() - started, "stamp": stamp() | {"gpu": name_of(setting.device)}}
            found[part] = result
            OUTPUT.mkdir(exist_ok=True)
            path.write_text(json.dumps(found, indent=1))
            print(f"{part}: {result['took']:.0f} s", flush=True)
    table = rows(found)
    print(json.dumps({"found": found, "rows": table}) if arguments.json else
          markdown_table(("what", "measured", "unit", "target", "verdict"), table))  # fmt: skip
    return found


if __name__ == "__main__":
    main()
