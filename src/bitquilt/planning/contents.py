"""`folder_contents`: what the bytes of a planned folder hold, the embedding named."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitquilt.core.packing import storage_bits
from bitquilt.core.types import Layout
from bitquilt.model.replace import replaced_weights, table_path
from bitquilt.model.structure import Skeleton

OTHER_FILES = "tokenizer and other files"


@dataclass(frozen=True)
class Content:
    """One part of a folder: its bytes, and the number of weights there, 0 for anything but tensors of the model."""

    part: str
    nbytes: int
    weights: int

    @property
    def bits(self) -> float | None:
        """Bits per weight; None without weights."""
        return 8 * self.nbytes / self.weights if self.weights else None


def folder_contents(skeleton: Skeleton, layouts: Mapping[str, Layout], total: int) -> tuple[Content, ...]:
    """Return the parts of the folder of `total` bytes with these layouts, the largest first."""
    names = _outer(skeleton)
    blocks = tuple(f"{path}." for path in skeleton.blocks)

    def part_of(name: str) -> str:
        return names.get(name) or ("blocks" if name.startswith(blocks) else "norms and the rest of the model")

    found: dict[str, list[int]] = {}
    for name, layout in layouts.items():
        home = table_path(name) if layout.of_rows else name
        _add(found, part_of(f"{home}.weight"), storage_bits(layout) // 8, layout.out_features * layout.in_features)
    infos, replaced = skeleton.checkpoint.tensors, replaced_weights(layouts)
    for sources in skeleton.sources.values():
        for source in sources:
            name = skeleton.parameters.get(source) or source
            if name not in replaced:
                _add(found, part_of(name), infos[source].nbytes, math.prod(infos[source].shape))
    _add(found, OTHER_FILES, max(0, total - sum(nbytes for nbytes, _ in found.values())), 0)
    parts = [Content(part, nbytes, weights) for part, (nbytes, weights) in found.items()]
    return tuple(sorted(parts, key=lambda one: -one.nbytes))


def _outer(skeleton: Skeleton) -> dict[str, str]:
    """Names of the weights of embedding and head -> how they are called."""
    model: Any = skeleton.model
    tied = set(model.all_tied_weights_keys.values())
    found = {}
    for called, module in (("head", model.get_output_embeddings()), ("embedding", model.get_input_embeddings())):
        path = next((name for name, one in model.named_modules() if one is module), None)
        if module is not None and path is not None:
            name = f"{path}.weight"
            found[name] = "embedding and head" if name in tied else called
    return found


def _add(found: dict[str, list[int]], part: str, nbytes: int, weights: int) -> None:
    entry = found.setdefault(part, [0, 0])
    entry[0] += nbytes
    entry[1] += weights


def contents_text(parts: Sequence[Content], total: int) -> str:
    """Say in one line what the bytes hold: shares, and bits per weight where there are weights."""
    texts = []
    for one in parts:
        bits = "" if one.bits is None else f" at {one.bits:.3g} bits"
        if one.nbytes >= 0.005 * total:
            texts.append(f"{one.part} {one.nbytes / total:.0%}{bits}")
    return ", ".join(texts)
