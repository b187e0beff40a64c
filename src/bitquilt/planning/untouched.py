"""`untouched_tensors` lists the tensors that a run copies unchanged, by reason, with their bytes."""

from collections.abc import Container

from bitquilt.core.events import Untouched
from bitquilt.model.structure import Skeleton, find_towers, gates, linear_layers

_TOWER = ", a tower with blocks of its own"


def untouched_tensors(skeleton: Skeleton, layers: Container[str]) -> tuple[Untouched, ...]:
    """Return everything except the weights of `layers` (full paths), the largest share first."""
    blocks = {path: linear_layers(skeleton.model.get_submodule(path)) for path in skeleton.blocks}
    linear = {f"{path}.{name}" for path, found in blocks.items() for name in found}
    small = {f"{path}.{name}" for path, found in blocks.items() for name in gates(found)}
    own = dict(skeleton.model.state_dict())
    infos = skeleton.checkpoint.tensors
    towers = find_towers(skeleton.model, skeleton.blocks)
    grouped: dict[str, list[str]] = {}
    for path, sources in skeleton.sources.items():
        for source in sources:
            name = skeleton.parameters.get(source)
            layer = name.removesuffix(".weight") if name is not None and name.endswith(".weight") else None
            if layer in layers:
                continue
            if name is not None and name not in own:
                reason = "not part of this model class, copied unchanged"
            elif tower := next((t for t in towers if (name or source).startswith(f"{t}.")), None):
                reason = f"{tower}{_TOWER}"
            elif not path:
                reason = "outside the blocks (embedding, final norm, head)"
            elif layer in small:
                reason = "gates and other tiny layers inside the blocks"
            elif layer in linear:
                reason = "skipped on request"
            elif len(infos[source].shape) < 2:
                reason = "vectors inside the blocks (norms, biases)"
            else:
                reason = "inside the blocks, not a plain linear layer (experts, routers, convolutions)"
            grouped.setdefault(reason, []).append(source)
    found = []
    for why, names in grouped.items():
        nbytes = sum(infos[n].nbytes for n in names)
        if why.endswith(_TOWER):
            why += f" ({nbytes / skeleton.checkpoint.nbytes:.0%} of the model)"
        found.append(Untouched(why, len(names), nbytes, names[0]))
    return tuple(sorted(found, key=lambda item: -item.nbytes))
