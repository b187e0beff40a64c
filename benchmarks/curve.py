"""Quality over TRUE bits per weight: channel-wise free levels against uniform grids, and what each part is worth.

    python -m benchmarks.curve                                   # three models, to 4.5 bpw in steps of 0.25
    python -m benchmarks.curve --models stories260k --quick      # two points, few tokens: does it run?
    python -m benchmarks.curve --kept                            # table and plot of what was measured before

Parts: `curve` = cmpq and cmpq+ on a grid of bpw from the smallest that all layers reach; `baselines` = RTN, GPTQ and
SliM-LLM at 2, 3, 4 bits, group size 32; `equal` = cmpq and its options at exactly the bpw of these; `ablation` = cmpq
and cmpq+ with and without some of their parts at one bpw. Calibrates (32 x 256 tokens) and measures (8,000 tokens) on
different files. Finished rows are kept (`benchmarks.rows`): an interrupted run continues, and --again measures anew.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import OUTPUT, ROOT, markdown_table, stamp
from benchmarks.rows import Run, measured
from benchmarks.scored import TEXTS
from benchmarks.shapes import grid_bpw, layer_shapes
from bitquilt.recipes import make_recipe

BASELINES: dict[str, dict[str, Any]] = {"rtn": {}, "gptq": {}, "slim-llm": {}}
CURVES = ("cmpq", "cmpq+")
EQUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "cmpq": ("cmpq", {}),
    "cmpq+": ("cmpq+", {}),
    "cmpq+, bits by norms": ("cmpq+", {"allocation": "norm"}),
    "cmpq+, each layer for itself": ("cmpq+", {"alpha": 0.0, "stream_alpha": 0.0}),
    "cmpq, published": ("cmpq", {"published": True}),
}
ASKED = {"error_outliers": 0.0045, "act_outliers": 0.0005}  # those of cmpq
ALONE = {"alpha": 0.0, "stream_alpha": 0.0}
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "all parts": ("cmpq", {}),
    "no outliers": ("cmpq", {"act_outliers": 0.0, "error_outliers": 0.0}),
    "error table": ("cmpq", {"allocation": "error_table"}),
    "compensation": ("cmpq+", {**ASKED, **ALONE, "allocation": "norm"}),
    "compensation and error table": ("cmpq+", {**ASKED, **ALONE}),
    "both, and earlier layers' errors": ("cmpq+", ASKED),
    "cmpq+": ("cmpq+", {}),
}
GROUP_SIZE, HIGHEST, STEP = 32, 4.5, 0.25
COLUMNS = ["model", "row", "bpw", "nominal_bits", "kl_mean", "perplexity", "top1_agreement", "seconds"]


def grid_points(model: str, recipe: str) -> list[float]:
    """The multiples of STEP that every layer of the model reaches, at most HIGHEST."""
    shapes, points = layer_shapes(model), []
    for i in range(round(1 / STEP), round(HIGHEST / STEP) + 1):
        try:
            make_recipe(recipe, bpw=i * STEP).check_layers(shapes)  # type: ignore[attr-defined]
        except ValueError:
            continue
        points.append(i * STEP)
    return points


def runs(model: str, arguments: argparse.Namespace) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Part, row, recipe and options of every run that is asked for."""
    sizes = (2, 3) if arguments.quick else (2, 3, 4)
    if "baselines" in arguments.parts:
        for row in BASELINES:
            yield from (("baselines", row, row, {"bits": bits, "group_size": GROUP_SIZE}) for bits in sizes)
    if "equal" in arguments.parts:
        shapes = layer_shapes(model)
        for bits in sizes:
            bpw = grid_bpw(shapes, bits, GROUP_SIZE)
            yield from (("equal", row, name, {"bpw": bpw, **options}) for row, (name, options) in EQUAL.items())
    if "curve" in arguments.parts:
        reach = {row: grid_points(model, row) for row in CURVES}
        for coarse in (True, False):  # every other point first: half a run is a coarse curve
            for row, points in reach.items():
                chosen = [p for p in points if (p / STEP % 2 == 0) == coarse]
                if arguments.quick:
                    chosen = [min(points), max(points)] if coarse else []
                yield from (("curve", row, row, {"bpw": point}) for point in chosen)
    if "ablation" in arguments.parts:
        for row, (name, options) in list(ABLATIONS.items())[: 2 if arguments.quick else None]:
            yield "ablation", row, name, {"bpw": arguments.ablation_bpw, **options}


def run_model(model: str, arguments: argparse.Namespace, size: dict[str, int]) -> list[dict[str, Any]]:
    """Every row that is asked for."""
    results = []
    for part, row, recipe, options in runs(model, arguments):
        known = measured(Run(model, recipe, options, size["samples"], size["tokens"]), arguments.again, arguments.kept)
        if known is None:  # a table per channel is dear on a narrow layer: out of reach is a result too
            continue
        results.append({"part": part, "row": row, **{key: known[key] for key in COLUMNS if key in known}})
        print(json.dumps(results[-1]), flush=True)
    return results


def not_monotone(results: list[dict[str, Any]]) -> list[str]:
    """Points of a curve that are worse than one with fewer bits."""
    found = []
    for model, row in dict.fromkeys((r["model"], r["row"]) for r in results if r["part"] == "curve"):
        points = sorted(
            (r["bpw"], r["kl_mean"]) for r in results if (r["part"], r["model"], r["row"]) == ("curve", model, row)
        )
        found += [f"{model}, {row}: {b[0]:.3f}" for a, b in pairwise(points) if b[1] > a[1]]
    return found


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
                lines.setdefault(r["row"], []).append((r["bpw"], r["kl_mean"]))
        for name, points in lines.items():
            style = {"linestyle": "none", "marker": "x"} if name in BASELINES else {"marker": "o", "markersize": 3}
            panel.plot(*zip(*sorted(points), strict=True), label=name, **style)
        panel.set(title=model, xlabel="true bits per weight", ylabel="mean KL divergence, nats", yscale="log")
        panel.grid(alpha=0.3)
        if lines:
            panel.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(TEXTS), choices=list(TEXTS))
    parts = ["baselines", "equal", "curve", "ablation"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--ablation-bpw", type=float, default=3.0)
    parser.add_argument("--quick", action="store_true", help="few points, few tokens: to see that it runs")
    parser.add_argument("--again", action="store_true", help="measure kept rows anew")
    parser.add_argument("--kept", action="store_true", help="table and plot of the rows that are kept, no others")
    arguments = parser.parse_args()
    size = {"samples": 8, "tokens": 1_500} if arguments.quick else {"samples": 32, "tokens": 8_000}
    OUTPUT.mkdir(exist_ok=True)
    results = [row for model in arguments.models for row in run_model(model, arguments, size)]
    (OUTPUT / "curve.json").write_text(json.dumps({"stamp": stamp(), "results": results}, indent=1))
    table = markdown_table(["part", *COLUMNS], results)
    (OUTPUT / "curve.md").write_text(table)
    if not arguments.quick:
        draw(results, ROOT / "docs" / "img" / "curve.png")
    print(table)
    print("not monotone:", "; ".join(not_monotone(results)) or "nowhere")


if __name__ == "__main__":
    main()
