"""How do the layers of a model lie beside each other? `quilt_of(layers)`: blocks down, kinds of layers across.

A layer's block is its path up to the first number, its kind the rest; a layer without a number (the head) is its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from bitquilt.report.facts import LayerFacts

WIDEST = 12  # kinds that fit side by side; more are listed one below another


@dataclass(frozen=True)
class Quilt:
    """`rows`: (block, {kind: layer}) in the model's order; `kinds` in the order of first use, with short labels."""

    kinds: tuple[str, ...]
    labels: tuple[str, ...]
    rows: tuple[tuple[str, dict[str, LayerFacts]], ...]
    alone: tuple[LayerFacts, ...]

    @property
    def fits(self) -> bool:
        """Whether the kinds fit side by side."""
        return 0 < len(self.kinds) <= WIDEST


def quilt_of(layers: Mapping[str, LayerFacts]) -> Quilt:
    """Blocks and kinds of `layers` by path."""
    rows: dict[str, dict[str, LayerFacts]] = {}
    kinds: dict[str, None] = {}
    alone = []
    for name, layer in layers.items():
        block, kind = split_path(name)
        if not block:
            alone.append(layer)
            continue
        kinds.setdefault(kind)
        rows.setdefault(block, {})[kind] = layer
    return Quilt(tuple(kinds), short_labels(list(kinds)), tuple(rows.items()), tuple(alone))


def split_path(name: str) -> tuple[str, str]:
    """model.layers.3.mlp.up_proj -> ("model.layers.3", "mlp.up_proj"); ("", name) without a number."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: at + 1]), ".".join(parts[at + 1 :])


def short_labels(kinds: list[str]) -> tuple[str, ...]:
    """The last part of each path where that tells them apart, without a common "_proj"; else the whole path."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    if len(set(last)) < len(last):
        return tuple(kinds)
    trimmed = [word.removesuffix("_proj") for word in last]
    return tuple(trimmed if len(set(trimmed)) == len(trimmed) else last)
