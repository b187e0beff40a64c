"""`untouched_tensors` lists the tensors that a run copies unchanged, by reason, with their bytes."""

from collections.abc import Container

from bitquilt.core.events import Untouched
from bitquilt.model.experts import SplitExperts
from bitquilt.model.linear import is_linear
from bitquilt.model.structure import Skeleton, find_towers, gates, linear_layers

_TOWER = ", a tower with blocks of its own"
_EXPERTS = "experts, which this family stores in a form that is not taken apart: "


def untouched_tensors(skeleton: Skeleton, layers: Container[str]) -> tuple[Untouched, ...]:
    """Return everything except the weights of `layers` (full paths), the largest share first."""
    blocks = {path: linear_layers(skeleton.model.get_submodule(path)) for path in skeleton.blocks}
    linear = {f"{path}.{name}" for path, found in blocks.items() for name in found}
    small = {f"{path}.{name}" for path, found in blocks.items() for name in gates(found)}
    own = dict(skeleton.model.state_dict())
    infos = skeleton.checkpoint.tensors
    towers, experts = find_towers(skeleton.model, skeleton.blocks), _whole_experts(skeleton)
    grouped: dict[str, list[str]] = {}
    for path, sources in skeleton.sources.items():
        for source in sources:
            name = skeleton.parameters.get(source) or skeleton.experts.get(source)
            layer = name.removesuffix(".weight") if name is not None and name.endswith(".weight") else None
            if layer in layers:
                continue
            form = experts.get((name or source).rpartition(".")[0])
            if form is None and ".experts." in source:  # stored one by one, under names that the model does not have
                form = experts.get("")
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
            elif len(infos[source].shape) < 2 or source.endswith("bias"):  # those of experts are stacked
                reason = "vectors inside the blocks (norms, biases)"
            elif form is not None:
                reason = f"{_EXPERTS}{form}"
            else:
                reason = "inside the blocks, not a plain linear layer (routers, convolutions)"
            grouped.setdefault(reason, []).append(source)
    found = []
    for why, names in grouped.items():
        nbytes = sum(infos[n].nbytes for n in names)
        if why.endswith(_TOWER) or why.startswith(_EXPERTS):
            why += f" ({nbytes / skeleton.checkpoint.nbytes:.0%} of the model)"
        found.append(Untouched(why, len(names), nbytes, names[0]))
    return tuple(sorted(found, key=lambda item: -item.nbytes))


def _whole_experts(skeleton: Skeleton) -> dict[str, str]:
    """Return the class of each module inside the blocks that holds experts in matrices of its own, by path; under ""
    that of the first of them, if any."""
    found: dict[str, str] = {}
    for path in skeleton.blocks:
        for name, module in skeleton.model.get_submodule(path).named_modules():
            kind = type(module).__name__
            matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1]
            if "Expert" in kind and matrices and not isinstance(module, SplitExperts) and not is_linear(module):
                found[f"{path}.{name}"] = kind
                found.setdefault("", kind)
    return found
