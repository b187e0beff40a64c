"""What is training worth, and what does it cost? SliM-LLM+ and quilt by effort; each option of the trainer.

    python -m benchmarks.training                                        # three models, 2 and 3 bits, two group sizes
    python -m benchmarks.training --models stories260k --bits 2 --group-size 32 --rows "quilt best" "slim-llm+"
    python -m benchmarks.training --parts options --models stories260k   # one option changed at a time
    python -m benchmarks.training --rows                                 # the tables of what is there

Rows are kept one by one in benchmarks/output/training.json and not computed twice (--again does). Protocol: 64 x 256
calibration tokens, 60,000 measured, as in benchmarks.quality; `seconds` are of quantizing alone, on one thread.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from benchmarks.common import OUTPUT, ROOT, SHARED, markdown_table, stamp
from benchmarks.scored import TEXTS, quantize_and_score
from benchmarks.shapes import grid_bpw, layer_shapes
from bitquilt import Budget
from bitquilt.core.types import group_slices
from bitquilt.layer.grids.uniform import RangeSearch, fit
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.linear import linear_weight
from bitquilt.model.structure import open_skeleton
from bitquilt.recipes import make_recipe
from bitquilt.stream.job import targets

SAMPLES, EVALUATED = 64, 60_000
SELF = {"self_samples": 192}
Row = tuple[str, dict[str, Any], dict[str, Any]]
ROWS: dict[str, Row] = {
    "gptq, scale search": ("gptq", {"scale_search": True}, {}),
    "slim-llm": ("slim-llm", {}, {}),
    "slim-llm+": ("slim-llm+", {}, {}),
    "quilt fast": ("quilt", {}, {}),
    "quilt normal": ("quilt", {"effort": "normal"}, {}),
    "quilt best": ("quilt", {"effort": "best"}, {}),
    "quilt best, self-samples": ("quilt", {"effort": "best"}, SELF),
}
NORMAL, BEST = {"effort": "normal"}, {"effort": "best"}
LAST = {"kept_epoch": "last"}
OPTIONS: dict[str, Row] = {
    "slim-llm+, 10 epochs": ("slim-llm+", {"epochs": 10}, {}),
    "slim-llm+, published": ("slim-llm+", {"published": True}, {}),
    "slim-llm+, published, 10 epochs": ("slim-llm+", {"published": True, "epochs": 10}, {}),
    "slim-llm+, uniform bits": ("slim-llm+", {"allocation": "uniform"}, {}),
    "fast, self-samples": ("quilt", {}, SELF),
    "normal, 4 epochs": ("quilt", {**NORMAL, "epochs": 4}, {}),
    "normal, 10 epochs": ("quilt", {**NORMAL, "epochs": 10}, {}),
    "normal, self-samples": ("quilt", NORMAL, SELF),
    "best, blocks not trained before": ("quilt", {**BEST, "epochs": 0}, {}),
    "best, blocks not trained before, self-samples": ("quilt", {**BEST, "epochs": 0}, SELF),
    "best, codes stay": ("quilt", {**BEST, "tune_rate": 0.0}, {}),
    "best, codes stay, self-samples": ("quilt", {**BEST, "tune_rate": 0.0}, SELF),
}  # fmt: skip
# AutoRound leaves layers alone whose sides are no multiples of 32, such as all of stories260k's MLP: ours beside it.
ATTENTION = {"skip": ("*.mlp.*",)}
LIKE_AUTOROUND: dict[str, Row] = {
    f"{name}, attention only": (recipe, options, {**settings, **ATTENTION})
    for name, (recipe, options, settings) in ROWS.items()
    if recipe == "quilt"
}
# One budget for all layers: as many true bits as a symmetric grid takes, AutoRound's as it ships.
SYMMETRIC = "symmetric grid"
SHARED_BITS: dict[str, Row] = {
    "cmpq+, one budget": ("cmpq+", {}, {"budget": SYMMETRIC}),
    "cmpq+ normal, one budget": ("cmpq+", NORMAL, {"budget": SYMMETRIC}),
    "cmpq+ normal, one budget, last epoch": ("cmpq+", {**NORMAL, **LAST}, {"budget": SYMMETRIC}),
    "cmpq+ best, one budget": ("cmpq+", BEST, {"budget": SYMMETRIC}),
    "quilt fast, one budget": ("quilt", {"group_size": 64}, {"budget": SYMMETRIC}),
    "quilt normal, one budget": ("quilt", {"group_size": 64, **NORMAL}, {"budget": SYMMETRIC}),
    "quilt normal, one budget, last epoch": ("quilt", {"group_size": 64, **NORMAL, **LAST}, {"budget": SYMMETRIC}),
    "quilt best, one budget": ("quilt", {"group_size": 64, **BEST}, {"budget": SYMMETRIC}),
    "quilt fast, one budget, groups of 128": ("quilt", {"group_size": 128}, {"budget": SYMMETRIC}),
    "quilt normal, one budget, groups of 128": ("quilt", {"group_size": 128, **NORMAL}, {"budget": SYMMETRIC}),
    "quilt best, one budget, groups of 128": ("quilt", {"group_size": 128, **BEST}, {"budget": SYMMETRIC}),
}
ONE_BUDGET = SHARED_BITS | {
    f"{name}, attention only": (r, o, {**settings, **ATTENTION}) for name, (r, o, settings) in SHARED_BITS.items()
}
# Before and after clipping="trained", for every recipe that offers it.
PLAIN: dict[str, Row] = {
    "rtn": ("rtn", {}, {}),
    "gptq, scale search": ROWS["gptq, scale search"],
    "slim-llm": ROWS["slim-llm"],
    "aptq": ("aptq", {"scale_search": True}, {}),
    "mg-ptq": ("mg-ptq", {}, {}),
}
CLIPPED: dict[str, Row] = {
    f"{r}, clipping trained": (n, {**o, "clipping": "trained"}, s) for r, (n, o, s) in PLAIN.items()
}
KNOWN = {
    "clipping": PLAIN | CLIPPED,
    "table": ROWS,
    "options": OPTIONS,
    "attention": LIKE_AUTOROUND,
    "budget": ONE_BUDGET,
}
COLUMNS = ["model", "row", "bits", "group_size", "bpw", "kl_mean", "perplexity", "top1_agreement", "seconds"]
Key = tuple[str, str, int, int, int]


class Table:
    """Rows by (model, row, bits, group size, seed), written to disk one at a time; several processes may add to it."""

    def __init__(self, path: Path = OUTPUT / "training.json", again: bool = False) -> None:
        self.path, self.again = path, again
        OUTPUT.mkdir(exist_ok=True)

    def rows(self) -> dict[str, dict[str, Any]]:
        """What is there, by key."""
        return dict(json.loads(self.path.read_text())) if self.path.is_file() else {}

    def row(self, key: Key, measure: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        """Measure a row that is not there yet, and keep it."""
        name = " | ".join(map(str, key))
        if name in self.rows() and not self.again:
            return
        model, row, bits, group_size, seed = key
        value = {
            "model": model,
            "row": row,
            "bits": bits,
            "group_size": group_size,
            "seed": seed,
            **measure(*arguments),
        }
        print(json.dumps(value), flush=True)
        with FileLock(self.path.with_suffix(".lock")):
            rows = {**self.rows(), name: {**value, "stamp": stamp()}}
            draft = self.path.with_suffix(".tmp")
            draft.write_text(json.dumps(rows, indent=1))
            draft.replace(self.path)

    def beside_autoround(self) -> list[dict[str, Any]]:
        """By model, bits and group size: KL of AutoRound's presets and of ours with one budget of its bits, over the
        layers that it rounds there."""
        rows, found = self.rows(), []
        for name, row in rows.items():
            model, title, *rest = name.split(" | ")
            if title != "auto-round default, sym":
                continue
            some = "" if len(set(row["linears"].split(" of "))) == 1 else ", attention only"
            titles = {f"AutoRound {preset}": f"auto-round {preset}, sym" for preset in ("default", "best")}
            titles |= {
                ours: f"{ours}, one budget{some}"
                for ours in ("quilt fast", "quilt normal", "quilt best", "cmpq+", "cmpq+ normal", "cmpq+ best")
            }
            scored = {column: rows.get(" | ".join([model, title, *rest])) for column, title in titles.items()}
            size = {key: row[key] for key in ("model", "bits", "group_size", "linears", "bpw")}
            found.append(size | {column: kept and kept["kl_mean"] for column, kept in scored.items()})
        return sorted(found, key=lambda r: (r["model"], r["bits"], r["group_size"]))

    def write(self) -> None:
        """Print everything as a table, and keep that too."""
        rows = sorted(self.rows().values(), key=lambda r: (r["model"], r["bits"], r["group_size"], -r["kl_mean"]))
        table = markdown_table(COLUMNS, rows)
        if beside := self.beside_autoround():
            table += "\n" + markdown_table(list(beside[0]), beside)
        self.path.with_suffix(".md").write_text(table)
        print(table)


def measure(model: str, row: Row, bits: int, group_size: int, seed: int) -> dict[str, Any]:
    """One run: true size, KL, perplexity, seconds, and what training did to its own loss."""
    name, options, settings = row
    if settings.get("budget") == SYMMETRIC:
        shapes = layer_shapes(model, settings.get("skip", ()))
        settings = {**settings, "budget": Budget("bpw", grid_bpw(shapes, bits, group_size, symmetric=True))}
        recipe = make_recipe(name, **options)
    else:
        recipe = make_recipe(name, bits=bits, group_size=group_size, **options)
    found = quantize_and_score(model, recipe, tokens=EVALUATED, samples=SAMPLES, seed=seed, **settings)
    trained = found.report["training"]
    return {
        **found.row(),
        "training": {path: [t["start_loss"], t["loss"], t["seconds"]] for path, t in trained.items()},
        "tuning": found.report["tuning"],
        "clipping": [t["clipping"] for t in trained.values() if "clipping" in t],
    }


def searched_factors(model: str, bits: int, group_size: int) -> torch.Tensor:
    """The share of its range that each group of the model keeps where the share is searched for the least error."""
    skeleton, found = open_skeleton(open_checkpoint(SHARED / "models" / model)), []
    for path in skeleton.blocks:
        for module in targets(skeleton, path, skeleton.load(path), ()).values():
            weight = linear_weight(module).float()
            for group in group_slices(weight.shape[1], group_size):
                part = weight[:, group]
                low, high = part.amin(dim=1, keepdim=True).clamp(max=0), part.amax(dim=1, keepdim=True).clamp(min=0)
                full = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
                found.append((fit(part, bits, search=RangeSearch()).scale.float() / full).flatten())
    return torch.cat(found)


def draw_clipping(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Learned clipping factors (slim-llm+, published) over the searched ones, a panel per model and bits."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    chosen = [r for r in rows.values() if r.get("clipping")]
    best = {(r["model"], r["bits"]): r for r in sorted(chosen, key=lambda r: (-r["group_size"], -len(r["row"])))}
    if not best:
        return
    figure, panels = plt.subplots(1, len(best), figsize=(4 * len(best), 3), squeeze=False, layout="constrained")
    for panel, ((model, bits), row) in zip(panels[0], sorted(best.items()), strict=True):
        learned = torch.tensor(row["clipping"]).sum(0).float()
        edges = torch.linspace(0, 1, len(learned) + 1)
        searched = torch.histc(searched_factors(model, bits, row["group_size"]).clamp(0, 1.1), 55, 0.0, 1.1)
        bins = torch.linspace(0, 1.1, 56)
        panel.stairs(searched / searched.sum(), bins, label="searched, one per group", fill=True, alpha=0.4)
        panel.stairs(learned / learned.sum(), edges, label="learned, both ends")
        panel.set_title(f"{model}, {bits} bits, groups of {row['group_size']}\n{row['row']}", fontsize=10)
        panel.set_xlabel("share of the range")
        panel.set_xlim(0.3, 1.1)
    panels[0][0].set_ylabel("share of the groups")
    panels[0][0].legend(fontsize=7, loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["stories260k", "babyllama-1m-chars", "demo"], choices=list(TEXTS)
    )
    parser.add_argument("--parts", nargs="+", default=["table"], choices=list(KNOWN))
    parser.add_argument("--rows", nargs="*", help="some of them; none: no measurement", default=None)
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--group-size", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there")
    arguments = parser.parse_args()
    table = Table(again=arguments.again)
    known = {row: value for part in KNOWN.values() for row, value in part.items()}
    chosen = [row for part in arguments.parts for row in KNOWN[part]] if arguments.rows is None else arguments.rows
    if unknown := [row for row in chosen if row not in known]:
        parser.error(f"unknown rows {unknown}; there are {list(known)}")
    for model in arguments.models:
        for bits in arguments.bits:
            for group_size in arguments.group_size:
                for row in chosen:
                    key = (model, row, bits, group_size, arguments.seed)
                    table.row(key, measure, model, known[row], bits, group_size, arguments.seed)
    table.write()
    draw_clipping(table.rows(), ROOT / "docs" / "img" / "clipping.png")


if __name__ == "__main__":
    main()
