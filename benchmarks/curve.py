"""Quality over TRUE bits per weight: channel-wise codebooks against uniform grids, and what each part is worth.

    python -m benchmarks.curve                                   # three models, to 4.5 bpw in steps of 0.25
    python -m benchmarks.curve --models stories260k --quick      # two points, few tokens: does it run?
    python -m benchmarks.curve --parts equal                     # cmpq at exactly the bpw of each baseline

Parts: `curve` = cmpq (and its options) on a grid of bpw from the smallest its narrowest layer reaches; `baselines` =
RTN, GPTQ and SliM-LLM at 2, 3, 4 bits, group size 32; `equal` = cmpq aimed at the true bpw of each baseline;
`ablation` = cmpq without one of its parts at one bpw. Calibrates and measures on different files.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import bitquilt
from benchmarks.common import OUTPUT, SHARED, markdown_table, stamp
from benchmarks.quality import TEXTS
from bitquilt.errors import UserError
from bitquilt.models.checkpoint import open_checkpoint
from bitquilt.models.linear import linear_weight
from bitquilt.models.structure import open_skeleton, quiet_transformers
from bitquilt.recipes import make_recipe
from bitquilt.recipes.cmpq import CMPQ
from bitquilt.runtime.job import targets

BASELINES: dict[str, dict[str, Any]] = {"rtn": {}, "gptq": {}, "slim-llm": {}}
CURVES: dict[str, dict[str, Any]] = {
    "cmpq": {},
    "cmpq, error table": {"allocation": "error_table"},
    "cmpq, compensation": {"compensation": True},
    "cmpq, both": {"allocation": "error_table", "compensation": True},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "all parts": {},
    "bits not by activations": {"allocation": "first"},
    "without O_act": {"act_outliers": 0.0},
    "without O_q": {"error_outliers": 0.0},
    "without outliers": {"act_outliers": 0.0, "error_outliers": 0.0},
    "uniform levels": {"clustering": "uniform"},
    "Lloyd": {"clustering": "lloyd"},
    "swap 10 %": {"swap": 0.1},
    "mean abs": {"statistic": "mean_abs"},
    "max abs": {"statistic": "max_abs"},
    "float8 levels": {"codebook_dtype": "float8"},
}
GROUP_SIZE, HIGHEST, STEP = 32, 4.5, 0.25
COLUMNS = ["model", "row", "bpw", "nominal_bits", "kl_mean", "perplexity", "top1_agreement", "seconds"]


def layer_shapes(model: str) -> dict[str, tuple[int, int]]:
    """`[out, in]` of every layer a run quantizes."""
    skeleton = open_skeleton(open_checkpoint(SHARED / "models" / model))
    shapes = {}
    for path in skeleton.blocks:
        for name, module in targets(skeleton, path, skeleton.model.get_submodule(path), ()).items():
            rows, columns = linear_weight(module).shape
            shapes[f"{path}.{name}"] = (rows, columns)
    return shapes


def grid_points(model: str, options: dict[str, Any], step: float) -> list[float]:
    """The multiples of `step` that every layer of the model reaches, at most HIGHEST."""
    shapes, points = layer_shapes(model), []
    for i in range(round(1 / step), math.floor(HIGHEST / step) + 1):
        try:
            CMPQ(bpw=i * step, **options).check_layers(shapes)
        except ValueError:
            continue
        points.append(i * step)
    return points


def measure(model: str, row: str, recipe: str, options: dict[str, Any], size: dict[str, int]) -> dict[str, Any]:
    """One run: true size, KL and perplexity."""
    calibration, evaluation = (SHARED / "text" / text for text in TEXTS[model])
    source = SHARED / "models" / model
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        started = time.perf_counter()
        out = Path(folder) / "out"
        result = bitquilt.quantize(
            source, make_recipe(recipe, **options), calibration, out, samples=size["samples"], seq_len=256
        )
        seconds = time.perf_counter() - started
        score = bitquilt.evaluate(out, evaluation, reference=source, seq_len=256, max_tokens=size["tokens"])
    value = {
        "model": model,
        "row": row,
        "bpw": result.report["bpw"],
        "nominal_bits": result.report["nominal_bits"],
        "kl_mean": score.kl_mean,
        "perplexity": score.perplexity,
        "top1_agreement": score.top1_agreement,
        "seconds": round(seconds, 1),
    }
    print(json.dumps(value), flush=True)
    return value


def run_model(model: str, arguments: argparse.Namespace, size: dict[str, int]) -> list[dict[str, Any]]:
    """All parts that are asked for."""
    results = []
    if {"baselines", "equal"} & set(arguments.parts):
        for row, options in BASELINES.items():
            for bits in (2, 3) if arguments.quick else (2, 3, 4):
                chosen = {"bits": bits, "group_size": GROUP_SIZE, **options}
                results.append({"part": "baselines", **measure(model, f"{row} {bits}", row, chosen, size)})
    curves = {row: CURVES[row] for row in arguments.curves}
    if "equal" in arguments.parts:
        by_size = {round(r["bpw"], 3): r for r in reversed(results)}  # rtn and gptq take the same bytes: once is enough
        for baseline in list(by_size.values()):
            for row, options in curves.items():
                try:
                    found = measure(
                        model, f"{row} = {baseline['row']}", "cmpq", {"bpw": baseline["bpw"], **options}, size
                    )
                except UserError as error:  # a codebook is dear on a narrow layer: out of reach is a result too
                    print(f"{model}, {row} at {baseline['bpw']:.3f}: {error}", flush=True)
                    continue
                results.append({"part": "equal", **found})
    if "curve" in arguments.parts:
        for row, options in curves.items():
            points = grid_points(model, options, STEP)
            if arguments.quick:
                points = points[:: max(1, len(points) - 1)]
            found_points = (measure(model, row, "cmpq", {"bpw": point, **options}, size) for point in points)
            results += [{"part": "curve", **found} for found in found_points]
    if "ablation" in arguments.parts:
        for row, options in list(ABLATIONS.items())[: 2 if arguments.quick else None]:
            chosen = {"bpw": arguments.ablation_bpw, **options}
            results.append({"part": "ablation", **measure(model, row, "cmpq", chosen, size)})
    return results


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """KL over true bpw, one panel per model, logarithmic."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(r["model"] for r in results))
    figure, panels = plt.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False, layout="constrained")
    for panel, model in zip(panels[0], models, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for r in results:
            if r["model"] == model and r["part"] in ("curve", "baselines"):
                name = r["row"] if r["part"] == "curve" else r["row"].rsplit(" ", 1)[0]
                lines.setdefault(name, []).append((r["bpw"], r["kl_mean"]))
        for name, points in lines.items():
            panel.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
        panel.set(title=model, xlabel="true bits per weight", ylabel="mean KL divergence, nats", yscale="log")
        panel.grid(alpha=0.3)
        if lines:
            panel.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parts = ["baselines", "equal", "curve", "ablation"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--curves", nargs="+", default=list(CURVES), choices=list(CURVES))
    parser.add_argument("--ablation-bpw", type=float, default=4.0)
    parser.add_argument("--quick", action="store_true", help="few points, few tokens: to see that it runs")
    arguments = parser.parse_args()
    size = {"samples": 8, "tokens": 1_500} if arguments.quick else {"samples": 64, "tokens": 12_000}
    results: list[dict[str, Any]] = []
    for model in arguments.models:
        results += run_model(model, arguments, size)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "curve.json").write_text(json.dumps({"stamp": stamp(), "results": results}, indent=1))
    table = markdown_table(["part", *COLUMNS], results)
    (OUTPUT / "curve.md").write_text(table)
    draw(results, OUTPUT / "curve.png")
    print(table)


if __name__ == "__main__":
    main()
