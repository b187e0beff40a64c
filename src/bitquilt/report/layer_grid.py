"""The layers of a model as a table: `layer_grid(layers)` puts blocks in rows and kinds of layers in columns.

A layer's block is its path up to the first number and its kind is the rest. A layer without a number, such as the head,
stands alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from bitquilt.report.facts import LayerFacts

WIDEST = 12  # kinds that fit side by side on a page; with more, layers are listed one below another


@dataclass(frozen=True)
class LayerGrid:
    """`rows`: (block, {kind: layer}) in the model's order. `kinds`: in the order of first use, with short `labels`."""

    kinds: tuple[str, ...]
    labels: tuple[str, ...]
    rows: tuple[tuple[str, dict[str, LayerFacts]], ...]
    alone: tuple[LayerFacts, ...]

    @property
    def fits(self) -> bool:
        """Whether the kinds fit side by side."""
        return 0 < len(self.kinds) <= WIDEST


def layer_grid(layers: Mapping[str, LayerFacts]) -> LayerGrid:
    """Sort `layers` into blocks and kinds by their paths."""
    rows: dict[str, dict[str, LayerFacts]] = {}
    kinds: dict[str, None] = {}
    alone = []
    for name, layer in layers.items():
        block, kind = _split_path(name)
        if block:
            kinds.setdefault(kind)
            rows.setdefault(block, {})[kind] = layer
        else:
            alone.append(layer)
    return LayerGrid(tuple(kinds), _short_labels(list(kinds)), tuple(rows.items()), tuple(alone))


def _split_path(name: str) -> tuple[str, str]:
    """model.layers.3.mlp.up_proj -> ("model.layers.3", "mlp.up_proj"); without a number ("", name)."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: at + 1]), ".".join(parts[at + 1 :])


def _short_labels(kinds: list[str]) -> tuple[str, ...]:
    """The last part of each path, without "_proj", as long as labels stay distinct; else the whole paths."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    if len(set(last)) < len(last):
        return tuple(kinds)
    trimmed = [word.removesuffix("_proj") for word in last]
    return tuple(trimmed if len(set(trimmed)) == len(trimmed) else last)
