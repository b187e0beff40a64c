"""What did each way to place the bits come to, over all layers? Of recipes that compare several: `mg-ptq`."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from bitquilt.cli.output import print_fact, stdout


def allocator_totals(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """`{"table_error": {allocator: sum over layers}, "swept_loss": ...}`, of allocators that every layer was given."""
    totals: dict[str, dict[str, float]] = {}
    for kind in ("table_error", "swept_loss"):
        entries = [layer[kind] for layer in report.get("layers", {}).values() if kind in layer]
        sums: dict[str, float] = defaultdict(float)
        for entry in entries:
            for name, value in entry.items():
                sums[name] += value
        whole = {name: total for name, total in sums.items() if all(name in entry for entry in entries)}
        if whole:
            totals[kind] = whole
    return totals


def print_allocators(report: Mapping[str, Any]) -> None:
    """One line for the tabulated errors, one for the losses after the sweep; nothing where nothing was compared."""
    labels = {"table_error": "by table", "swept_loss": "after sweep"}
    for kind, sums in allocator_totals(report).items():
        text = ", ".join(f"{name} {value:.5g}" for name, value in sums.items())
        print_fact(stdout, "bits by", f"{labels[kind]}: {text}")
