"""Linear layers whose weight belongs to another block, as in Zamba2: `shared_layers` finds them, `share_layers` lets
them compute with the quantized layer that holds the weight (`SharedLinear`)."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bitquilt.errors import UserError
from bitquilt.model.linear import QuantizedLinear, is_linear, replace_module

_WEIGHT = ".weight"


class SharedLinear(nn.Module):
    """A layer without a weight of its own; `source` is the path of the layer `holder` that has it."""

    def __init__(self, source: str, holder: QuantizedLinear) -> None:
        super().__init__()
        self.source = source
        self.hold(holder)

    def hold(self, holder: QuantizedLinear) -> None:
        """Compute with this layer from now on."""
        self._shared = (holder,)  # not a submodule: its tensors are stored once, under the holder's name
        self.in_features, self.out_features = holder.in_features, holder.out_features

    @property
    def holder(self) -> QuantizedLinear:
        """The layer that has the weight."""
        return self._shared[0]

    @property
    def weight(self) -> Tensor:
        """See `QuantizedLinear.weight`."""
        return self.holder.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the holder's product with x."""
        found: Tensor = self.holder(x)
        return found


def shared_layers(model: Any) -> dict[str, str]:
    """Return the linear layers whose weight is tied to that of another linear layer: path -> path of the other.

    Raises UserError for one with a bias, which no family has.
    """
    found = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        names = [name.removesuffix(_WEIGHT) for name in (target, source) if name.endswith(_WEIGHT)]
        if len(names) == 2 and all(is_linear(model.get_submodule(name)) for name in names):
            if getattr(model.get_submodule(names[0]), "bias", None) is not None:
                raise UserError(f"{names[0]} shares the weight of {names[1]} and has a bias: this is not supported")
            found[names[0]] = names[1]
    return found


def share_layers(model: Any, shared: Mapping[str, str], layouts: Container[str]) -> None:
    """Put a `SharedLinear` at each path of `shared` whose holder is one of the quantized `layouts`, now in place."""
    taken = {target: source for target, source in shared.items() if source in layouts and target not in layouts}
    for target, source in taken.items():
        replace_module(model, target, SharedLinear(source, model.get_submodule(source)))
    forget_ties(model, [f"{target}{_WEIGHT}" for target in taken])


def forget_ties(model: Any, names: Sequence[str]) -> None:
    """Take these parameters out of what transformers ties: they are no longer there."""
    if not names:
        return
    for prefix, module in model.named_modules():
        ties = getattr(module, "all_tied_weights_keys", None)
        if ties is not None:
            start = f"{prefix}." if prefix else ""
            gone = {name.removeprefix(start) for name in names if name.startswith(start)}
            module.all_tied_weights_keys = {name: source for name, source in ties.items() if name not in gone}
            if module._tied_weights_keys:  # a pattern of modules would match what replaced them
                module._tied_weights_keys = dict(module.all_tied_weights_keys)
