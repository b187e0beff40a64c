"""`SplitExperts`: the experts of a mixture as linear layers of their own, named as most checkpoints store them.

transformers holds the experts of a block in one module with 3-D parameters. `split_experts` puts a `SplitExperts` in
its place, with layers `experts.3.gate_proj`, `experts.3.up_proj` and `experts.3.down_proj`, so that an expert is
quantized, budgeted and listed like any other layer. A `SplitExperts` can hold a projection in either form: `join` makes
it one parameter again, under transformers' name, which its loading rules fill from whatever the checkpoint stores.
"""

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitquilt.errors import UserError
from bitquilt.model.linear import replace_module

_GATE, _UP, _DOWN = "gate_proj", "up_proj", "down_proj"
_GATE_UP = "gate_up_proj"
# What `use_experts_implementation` of transformers 5 notes on a module about its parameters.
_TRAITS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_LLAMA4 = ("transformers.models.llama4.modeling_llama4", "Llama4TextExperts")
_OWN = frozenset(vars(nn.Module())) | {"config"}  # copying a block would copy the whole config with each module

Rows = tuple[int, Tensor, Tensor]
"""An expert, the tokens that are routed to it, ascending, and which of each token's choices it is."""


@dataclass(frozen=True)
class _Form:
    """How a module stores its experts: number, whether `[in, out]`, whether gated, and gate and up in turns.

    `sorted_inputs`: it receives the tokens once for each expert, zero where they are not routed there (Llama 4).
    """

    count: int
    transposed: bool
    gated: bool = True
    interleaved: bool = False
    sorted_inputs: bool = False

    @property
    def stacked(self) -> dict[str, tuple[str, ...]]:
        """The layers that each 3-D parameter holds."""
        return {_GATE_UP if self.gated else _UP: (_GATE, _UP) if self.gated else (_UP,), _DOWN: (_DOWN,)}

    def rows(self, name: str, layer: str, length: int) -> slice:
        """The outputs of `layer` among the `length` outputs of the parameter `name`."""
        if name != _GATE_UP:
            return slice(None)
        second, half = layer == _UP, length // 2
        return slice(int(second), None, 2) if self.interleaved else slice(half * second, half * (1 + second))


class SplitExperts(nn.Module):
    """Experts of one block. Input: hidden states `[tokens, in]`, chosen experts and their weights `[tokens, chosen]`.

    Children "0", "1", ... hold the layers of each expert; `gate_up_proj` (`up_proj` without gates) and `down_proj` are
    parameters while they are not split. Everything else, such as biases and a norm behind each expert, keeps its name.
    """

    def __init__(self, experts: nn.Module, form: _Form) -> None:
        """`experts`: transformers' module, whose parameters, buffers and settings are taken over."""
        super().__init__()
        self.form = form
        self.apply_gate: Callable[[Any, Tensor], Tensor] = getattr(type(experts), "_apply_gate", _plain_gate)
        self.__dict__.update({name: value for name, value in vars(experts).items() if name not in _OWN})
        for name, parameter in experts.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in experts.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in experts._non_persistent_buffers_set)
        for name, module in experts.named_children():
            self.add_module(name, module)

    @property
    def inner(self) -> int:
        """Columns of the down-projections."""
        if _DOWN in self._parameters:
            return self.get_parameter(_DOWN).shape[1 if self.form.transposed else 2]
        found: int = self._expert(0)[_DOWN].in_features  # type: ignore[assignment]
        return found

    def split(self, names: Iterable[str] | None = None) -> Self:
        """Make views of these 3-D parameters the weights of layers, one for each expert; None means all."""
        for name, layers in self.form.stacked.items():
            stacked = self._parameters.get(name)
            if stacked is None or (names is not None and name not in names):
                continue
            del self._parameters[name]
            for i in range(self.form.count):
                # one expert: [out, in]
                weight = stacked.data[i].t() if self.form.transposed else stacked.data[i]
                for layer in layers:
                    self._expert(i)[layer] = _linear(weight[self.form.rows(name, layer, len(weight))])
        return self

    def join(self) -> Self:
        """Make empty 3-D parameters of the layers that are split but not quantized."""
        for name, layers in self.form.stacked.items():
            first = self._expert(0)[layers[0]] if name not in self._parameters else None
            if type(first) is not nn.Linear:
                continue
            out, width = first.weight.shape
            shape = (width, out * len(layers)) if self.form.transposed else (out * len(layers), width)
            empty = torch.empty((self.form.count, *shape), device="meta", dtype=first.weight.dtype)
            for i in range(self.form.count):
                for layer in layers:
                    del self._expert(i)[layer]
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        return self

    def expert_layers(self) -> dict[str, tuple[int, str]]:
        """Return expert and kind of each split layer, by path in this module."""
        kinds = [layer for layers in self.form.stacked.values() for layer in layers]
        return {f"{i}.{k}": (i, k) for i in range(self.form.count) for k in kinds if k in self._expert(i)}

    def hidden(self, i: int, x: Tensor) -> Tensor:
        """Return what the down-projection of expert i reads, `[n, inner]`, for inputs x `[n, in]`."""
        (name, layers), _ = self.form.stacked.items()
        if name in self._parameters:
            stacked = self._bias(name, i, self._stacked_product(name, i, x))
            return self.apply_gate(self, stacked) if self.form.gated else self._activated(stacked)
        parts = [self._expert(i)[layer](x) for layer in layers]
        if not self.form.gated:
            return self._activated(self._bias(name, i, parts[0]))
        both = torch.stack(parts, -1).flatten(-2) if self.form.interleaved else torch.cat(parts, -1)
        return self.apply_gate(self, self._bias(name, i, both))

    def expert(self, i: int, x: Tensor) -> Tensor:
        """Return the output `[n, in]` of expert i for inputs x `[n, in]`."""
        inner = self.hidden(i, x)
        product = self._stacked_product(_DOWN, i, inner) if _DOWN in self._parameters else self._expert(i)[_DOWN](inner)
        output = self._bias(_DOWN, i, product)
        norm = getattr(self, "post_expert_norm", None)
        return output if norm is None else norm(output)

    def routed(self, chosen: Tensor) -> Iterator[Rows]:
        """Yield every expert that `chosen` `[tokens, k]` names. Numbers beyond the experts mean none."""
        flat = chosen.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat.clamp_max(self.form.count), minlength=self.form.count).tolist()
        start = 0
        for i, count in enumerate(counts[: self.form.count]):
            if count:
                places = order[start : start + count]
                yield i, places // chosen.shape[-1], places % chosen.shape[-1]
            start += count

    def forward(self, hidden_states: Tensor, chosen: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Return the weighted sum `[tokens, in]` of the chosen experts' outputs."""
        output = torch.zeros_like(hidden_states)
        if chosen is None or weights is None:  # Llama 4's: zeros stay zeros
            for i, tokens in self.rows_by_expert(hidden_states):
                output = output.index_add(0, tokens, self.expert(i, hidden_states[tokens]).to(output.dtype))
            return output
        for i, tokens, places in self.routed(chosen):
            weighted = self.expert(i, hidden_states[tokens]) * weights[tokens, places, None]
            output = output.index_add(0, tokens, weighted.to(output.dtype))
        return output

    def rows_by_expert(self, hidden_states: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield expert and rows that are not zero, of inputs that are sorted by expert."""
        each = len(hidden_states) // self.form.count
        used = hidden_states.detach().ne(0).any(dim=-1).view(self.form.count, each)
        for i in range(self.form.count):
            if len(rows := used[i].nonzero().squeeze(1)):
                yield i, rows + i * each

    def _expert(self, i: int) -> nn.ModuleDict:
        if str(i) not in self._modules:
            self.add_module(str(i), nn.ModuleDict())
        return self._modules[str(i)]  # type: ignore[return-value]

    def _stacked_product(self, name: str, i: int, x: Tensor) -> Tensor:
        weight = self.get_parameter(name)[i]
        return x @ weight if self.form.transposed else x @ weight.t()

    def _bias(self, name: str, i: int, output: Tensor) -> Tensor:
        bias = self._parameters.get(f"{name}_bias")
        return output if bias is None else output + bias[i].to(output.dtype)

    def _activated(self, x: Tensor) -> Tensor:
        found: Tensor = self.act_fn(x)  # type: ignore[operator]
        return found


def split_experts(model: nn.Module, only: Container[str] | None = None) -> None:
    """Put a `SplitExperts` in the place of every module of experts that fits, or of those with layers in `only`.

    `only`: paths of layers; a projection that has none of them stays a 3-D parameter.
    """
    for path, module in list(model.named_modules()):
        form = _form(module)
        if form is None:
            continue
        names = [n for n, layers in form.stacked.items() if only is None or f"{path}.0.{layers[0]}" in only]
        if names:
            replace_module(model, path, SplitExperts(module, form).split(names))


def stacked_parameters(model: nn.Module) -> dict[str, str]:
    """Return the 3-D parameters that `split_experts` splits: their path -> the path of the first weight in each."""
    return {
        f"{path}.{name}": f"{path}.0.{layers[0]}.weight"
        for path, module in model.named_modules()
        if (form := _form(module)) is not None
        for name, layers in form.stacked.items()
    }


def experts_of(block: nn.Module) -> dict[str, SplitExperts]:
    """Return the split experts of a block by path."""
    return {path: module for path, module in block.named_modules() if isinstance(module, SplitExperts)}


def expert_paths(block: nn.Module) -> set[str]:
    """Return the paths of all layers of split experts in a block."""
    return {f"{path}.{name}" for path, experts in experts_of(block).items() for name in experts.expert_layers()}


def refuse_parts(block: nn.Module, path: str, chosen: Container[str]) -> None:
    """Raise UserError unless `chosen` (paths in the block at `path`) has all experts of a projection or none.

    Those that stay in 16 bits stay in the tensor that transformers loads them into, which holds all of them.
    """
    for home, experts in experts_of(block).items():
        for layers in experts.form.stacked.values():
            names = [f"{home}.{i}.{layer}" for i in range(experts.form.count) for layer in layers]
            left = [name for name in names if name not in chosen]
            if left and len(left) < len(names):
                raise UserError(
                    f"--skip leaves out {path}.{left[0]}, but not all experts with it: {', '.join(layers)} of the "
                    f"{experts.form.count} experts of {path}.{home} are quantized together or not at all; give "
                    + " and ".join(f"--skip '{path}.{home}.*.{layer}'" for layer in layers)
                )


def _form(module: nn.Module) -> _Form | None:
    """Return how the module stores its experts, or None for any other module."""
    traits = {name: vars(module).get(name) for name in _TRAITS}
    if (type(module).__module__, type(module).__name__) == _LLAMA4:
        traits = {"has_gate": True, "has_bias": False, "is_transposed": True, "is_concatenated": True}
    if None in traits.values() or isinstance(module, SplitExperts):
        return None
    gated, transposed = bool(traits["has_gate"]), bool(traits["is_transposed"])
    stacked = [module._parameters.get(name) for name in (_GATE_UP if gated else _UP, _DOWN)]
    if any(parameter is None or parameter.dim() != 3 for parameter in stacked):
        return None
    count = len(stacked[0])  # type: ignore[arg-type]
    return _Form(count, transposed, gated, not traits["is_concatenated"], vars(module).get("has_gate") is None)


def _plain_gate(experts: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    found: Tensor = experts.act_fn(gate) * up
    return found


def _linear(weight: Tensor) -> nn.Linear:
    """A linear layer around this weight; nn.Linear would make and fill one of its own."""
    found = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(found)
    found.out_features, found.in_features = weight.shape
    found.weight = nn.Parameter(weight, requires_grad=False)
    found.register_parameter("bias", None)
    return found
