"""Quality over TRUE bits per weight: channel-wise free levels against uniform grids, and what each part is worth.

    python -m benchmarks.curve                                   # three models, to 4.5 bpw in steps of 0.25
    python -m benchmarks.curve --models stories260k --quick      # two points, few tokens: does it run?
    python -m benchmarks.curve --models                          # table and plot of what was measured before

Parts: `curve` = cmpq and cmpq+ on a grid of bpw from the smallest that all layers reach; `baselines` = RTN, GPTQ and
SliM-LLM at 2, 3, 4 bits, group size 32; `equal` = cmpq and its options at exactly the bpw of these; `ablation` = cmpq
without one of its parts at one bpw. Calibrates (32 x 256 tokens) and measures (8,000 tokens) on different files.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import bitquilt
from benchmarks.common import OUTPUT, ROOT, SHARED, markdown_table, stamp
from benchmarks.quality import TEXTS
from bitquilt.errors import UserError
from bitquilt.models.checkpoint import open_checkpoint
from bitquilt.models.linear import linear_weight
from bitquilt.models.structure import open_skeleton, quiet_transformers
from bitquilt.packing import storage_bits
from bitquilt.recipes import make_recipe
from bitquilt.runtime.job import targets
from bitquilt.types import Format, Layout

BASELINES: dict[str, dict[str, Any]] = {"rtn": {}, "gptq": {}, "slim-llm": {}}
CURVES = ("cmpq", "cmpq+")
EQUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "cmpq": ("cmpq", {}),
    "cmpq+": ("cmpq+", {}),
    "cmpq, published": ("cmpq", {"published": True}),
}
ASKED = {"outlier_choice": "asked"}
ABLATIONS: dict[str, dict[str, Any]] = {
    "all parts": {},
    "bits not by activations": {"allocation": "first"},
    "both kinds of outliers, as asked": ASKED,
    "O_q only": {"act_outliers": 0.0, **ASKED},
    "O_act only": {"error_outliers": 0.0, **ASKED},
    "no outliers": {"act_outliers": 0.0, "error_outliers": 0.0},
    "uniform levels": {"clustering": "uniform"},
    "Lloyd": {"clustering": "lloyd"},
    "table not weighted by activations": {"weighting": "none"},
    "swap 10 %": {"swap": 0.1},
    "mean abs": {"statistic": "mean_abs"},
    "max abs": {"statistic": "max_abs"},
    "error table": {"allocation": "error_table"},
    "compensation (cmpq+)": {"compensation": True},
    "compensation and error table": {"compensation": True, "allocation": "error_table"},
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
            shapes[name] = (rows, columns)
    return shapes


def grid_points(model: str, recipe: str) -> list[float]:
    """The multiples of STEP that every layer of the model reaches, at most HIGHEST."""
    shapes, points = layer_shapes(model), []
    for i in range(round(1 / STEP), round(HIGHEST / STEP) + 1):
        try:
            make_recipe(recipe, bpw=i * STEP).check_layers(shapes)  # type: ignore[attr-defined]
        except ValueError:
            continue
        points.append(i * STEP)
    return sorted(points, key=lambda point: point * 2 % 1)  # every other one first: half a run is a coarse curve


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


def runs(model: str, arguments: argparse.Namespace) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Part, row, recipe and options of every run that is asked for."""
    sizes = (2, 3) if arguments.quick else (2, 3, 4)
    if "baselines" in arguments.parts:
        for row in BASELINES:
            yield from (("baselines", row, row, {"bits": bits, "group_size": GROUP_SIZE}) for bits in sizes)
    if "equal" in arguments.parts:
        shapes = layer_shapes(model)
        for bits in sizes:
            bpw = rtn_bpw(shapes, bits)
            yield from (("equal", row, name, {"bpw": bpw, **options}) for row, (name, options) in EQUAL.items())
    if "curve" in arguments.parts:
        for row in CURVES:
            points = grid_points(model, row)
            points = [min(points), max(points)] if arguments.quick else points
            yield from (("curve", row, row, {"bpw": point}) for point in points)
    if "ablation" in arguments.parts:
        for row, options in list(ABLATIONS.items())[: 2 if arguments.quick else None]:
            yield "ablation", row, "cmpq", {"bpw": arguments.ablation_bpw, **options}


def rtn_bpw(shapes: dict[str, tuple[int, int]], bits: int) -> float:
    """True bits per weight of RTN and GPTQ over the whole model; slim-llm takes as many, to 0.001."""
    form = Format(bits, GROUP_SIZE)
    total = sum(storage_bits(Layout(rows, columns, ((form, columns),))) for rows, columns in shapes.values())
    return total / sum(rows * columns for rows, columns in shapes.values())


def run_model(model: str, arguments: argparse.Namespace, size: dict[str, int]) -> None:
    """Every run, each kept as soon as it is done; rows of an earlier call that this one does not repeat stay."""
    path = OUTPUT / f"curve-{model}.json"
    kept = json.loads(path.read_text())["results"] if path.is_file() and not arguments.quick else []
    results = [r for r in kept if r["part"] not in arguments.parts]
    for part, row, recipe, options in runs(model, arguments):
        try:
            found = measure(model, row, recipe, options, size)
        except UserError as error:  # a table per channel is dear on a narrow layer: out of reach is a result too
            print(f"{model}, {row}: {error}", flush=True)
            continue
        results.append({"part": part, **found})
        path.write_text(json.dumps({"stamp": stamp(), "results": results}, indent=1))


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
    parser.add_argument("--models", nargs="*", default=list(TEXTS), choices=list(TEXTS), help="none: plot only")
    parts = ["baselines", "equal", "curve", "ablation"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--ablation-bpw", type=float, default=3.0)
    parser.add_argument("--quick", action="store_true", help="few points, few tokens: to see that it runs")
    arguments = parser.parse_args()
    size = {"samples": 8, "tokens": 1_500} if arguments.quick else {"samples": 32, "tokens": 8_000}
    OUTPUT.mkdir(exist_ok=True)
    for model in arguments.models:
        run_model(model, arguments, size)
    files = [OUTPUT / f"curve-{model}.json" for model in TEXTS]
    results = [r for file in files if file.is_file() for r in json.loads(file.read_text())["results"]]
    table = markdown_table(["part", *COLUMNS], results)
    (OUTPUT / "curve.md").write_text(table)
    draw(results, ROOT / "docs" / "img" / "curve.png")
    print(table)
    print("not monotone:", "; ".join(not_monotone(results)) or "nowhere")


if __name__ == "__main__":
    main()
