"""Layers that a serving engine fuses: `tied_layers` returns the sets of paths that must share their format.

q, k and v, or gate and up, read the same input and are multiplied as one matrix: transformers' own tensor-parallel plan
splits them by columns. Experts of one kind are multiplied together as well.
"""

import re
from collections.abc import Mapping
from typing import Any

_EXPERT = re.compile(r"\.experts\.\d+\.")
# Names that are fused wherever they occur, for families without a parallel plan.
_FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"w1", "w3"}, {"query", "key", "value"})


def tied_layers(model: Any, shapes: Mapping[str, tuple[int, int]]) -> list[tuple[str, ...]]:
    """Return sets of two or more of the layers in `shapes` (`[out, in]` by path), each in the order of `shapes`."""
    plan = getattr(model.config, "base_model_tp_plan", None) or {}
    by_column = [_pattern(key) for key, style in plan.items() if "colwise" in str(style)]
    groups: dict[tuple[str, int, str], list[str]] = {}
    for name, (_, width) in shapes.items():
        parent, _, own = name.rpartition(".")
        parent = _EXPERT.sub(".experts.*.", f"{parent}.")
        fused = next((i for i, names in enumerate(_FUSED) if own in names), -1)
        if fused < 0 and any(pattern.search(name) for pattern in by_column):
            fused = len(_FUSED)
        key = (parent, width, str(fused) if fused >= 0 else own)
        if fused >= 0 or "experts.*" in parent:
            groups.setdefault(key, []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(r"(^|\.)" + r"\d+".join(re.escape(part) for part in key.split("*")) + "$")
