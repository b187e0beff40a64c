"""The structure of a model: `open_skeleton` builds it without weights, `find_blocks` and `linear_layers` inspect it.

Parts are found by inspection, not from a list of families. In a `Skeleton` parameters are on the meta device and
buffers are real; a block's weights are read from the checkpoint when its turn comes and dropped afterwards.
"""

import copy
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitquilt.core.packing import tensor_specs
from bitquilt.core.types import Layout
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import Checkpoint, refuse_two_sources
from bitquilt.model.config import ModelConfig, config_of
from bitquilt.model.encoded.recognize import FLOATS
from bitquilt.model.experts import experts_of, split_experts, stacked_parameters
from bitquilt.model.linear import QuantizedLinear, is_linear, linear_weight, replace_module
from bitquilt.model.replace import replace_layers
from bitquilt.model.shared_layers import SharedLinear
from bitquilt.model.transformers_logging import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HOST = torch.device("cpu")
_FEW_WEIGHTS = 1000


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model without weights, and where its weights are stored.

    `blocks`: dotted paths of the repeated blocks, in order. `sources`: checkpoint names of each block's tensors, by
    path; under "" those of the rest. `parameters`: checkpoint name -> the model's own name, for tensors that are loaded
    unchanged (some families store tensors split or stacked). `experts`: checkpoint name -> the own name of the first
    weight that it fills, for tensors of experts, which are loaded stacked and then split.
    """

    model: "PreTrainedModel"
    checkpoint: Checkpoint
    config: ModelConfig
    blocks: tuple[str, ...]
    sources: Mapping[str, Sequence[str]]
    parameters: Mapping[str, str]
    experts: Mapping[str, str] = field(default_factory=dict)

    def load(self, path: str, tensors: dict[str, Tensor] | None = None) -> nn.Module:
        """Load the block at `path`, or with "" everything outside the blocks, into the model.

        `tensors`: the block's tensors if they were read already. Floating tensors get the model's dtype. Raises
        UserError for a parameter without a value.
        """
        from bitquilt.model.transformers_model import compute_parameter, load_tensors

        module = self.model.get_submodule(path)
        experts = experts_of(module).values() if path else ()
        for each in experts:
            each.join()
        load_tensors(self.model, self.checkpoint.read(self.sources[path]) if tensors is None else tensors)
        if path:
            self._fill_shared(path, module)
        else:
            missing = set(self.model.state_dict()) - set(self.parameters.values())
            with quiet_transformers():  # a tied tensor stored twice with two values stays two tensors
                self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        inside = () if path else self.blocks
        for name, parameter in (*module.named_parameters(), *module.named_buffers()):
            if parameter.is_meta and not name.startswith(tuple(f"{b}." for b in inside)):
                full = f"{path}.{name}".strip(".")
                if compute_parameter(self.model, full):
                    continue
                raise UserError(f"tensor {full} is missing in {self.checkpoint.folder}: the checkpoint is incomplete")
        for each in experts:
            each.split()
        return module

    @contextmanager
    def resident(
        self, path: str, device: torch.device = _HOST, tensors: dict[str, Tensor] | None = None
    ) -> Iterator[nn.Module]:
        """Hold the weights of the block at `path` on `device`, or with "" those outside the blocks on the host.

        They are released on exit, also after an error. The yielded block is a copy of the empty one: references to the
        model's own modules never hold weights. `tensors` and errors as in `load`.
        """
        if not path:
            try:
                yield self.load("")
            finally:
                self._release_outer()
            return
        empty = self.model.get_submodule(path)
        replace_module(self.model, path, copy.deepcopy(empty))
        try:
            yield self.load(path, tensors).to(device)
        finally:
            replace_module(self.model, path, empty)

    def _fill_shared(self, path: str, module: nn.Module) -> None:
        """Read what the block at `path` shares with another block, under whose name it is stored."""
        ties, stored = self.model.all_tied_weights_keys, {own: source for source, own in self.parameters.items()}
        wanted = {
            f"{path}.{name}": stored[ties[f"{path}.{name}"]]
            for name, parameter in module.named_parameters()
            if parameter.is_meta and ties.get(f"{path}.{name}") in stored
        }
        values = self.checkpoint.read(wanted.values()) if wanted else {}
        for name, source in wanted.items():
            replace_parameter(self.model, name, values[source].to(self.model.dtype))
        for shared in (m for m in module.modules() if isinstance(m, SharedLinear)):
            layout = shared.holder.layout
            tensors = {key: f"{shared.source}.{key}" for key in tensor_specs(layout)}
            found = self.checkpoint.read(tensors.values())
            shared.hold(QuantizedLinear.from_tensors({key: found[name] for key, name in tensors.items()}, layout))

    def kept_sources(self, path: str, replaced: Container[str]) -> list[str]:
        """Return the checkpoint names of the tensors at `path` but for those of the parameters in `replaced`."""
        own = (self.parameters, self.experts)
        return [name for name in self.sources[path] if not any(part.get(name) in replaced for part in own)]

    def without(self, replaced: Container[str]) -> "Skeleton":
        """Return the same model with the parameters in `replaced` left out of its sources, so that none is read."""
        return replace(self, sources={path: self.kept_sources(path, replaced) for path in self.sources})

    def _release_outer(self) -> None:
        inside = tuple(f"{block}." for block in self.blocks)
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if not name.startswith(inside) and not parameter.is_meta:
                replace_parameter(self.model, name, torch.empty_like(parameter, device="meta"))


def open_skeleton(
    checkpoint: Checkpoint, layouts: Mapping[str, Layout] | None = None, blocks: str | None = None
) -> Skeleton:
    """Build the model of `checkpoint` without weights, computing in float32, with quantized layers for `layouts`.

    `blocks`: the path of their ModuleList, None to find it.
    Raises UserError if the config names no known model or the model has no blocks with linear layers.
    """
    from bitquilt.model.transformers_model import empty_model, missing_parameters, source_names

    checkpoint.refuse_undecodable()
    model = empty_model(checkpoint)
    if layouts:
        split_experts(model, layouts)
        replace_layers(model, layouts)
    found = find_blocks(model, blocks)
    sources: dict[str, list[str]] = {path: [] for path in (*found, "")}
    parameters: dict[str, str] = {}
    names = source_names(model, checkpoint.tensors)
    if missing := missing_parameters(model, {name for name, _ in names.values()}):
        raise UserError(
            f"tensor {missing[0]} is missing in {checkpoint.folder}: the checkpoint is incomplete, "
            f"{len(missing)} of the model's tensors are in none of its files"
        )
    depths = {path.count(".") + 1 for path in found}
    for source, (name, converted) in names.items():
        parts = name.split(".")
        home = next((path for depth in depths if (path := ".".join(parts[:depth])) in sources), "")
        sources[home].append(source)
        if not converted:
            parameters[source] = name
    if not layouts:
        _refuse_codes(model, checkpoint, parameters)
    refuse_two_sources(checkpoint, parameters)
    experts = {} if layouts else _split(model, found, {source: name for source, (name, _) in names.items()})
    unchanged = {source: name for source, name in parameters.items() if source not in experts}
    return Skeleton(model, checkpoint, config_of(model), found, sources, unchanged, experts)


def _split(model: nn.Module, blocks: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    """Split the experts of the blocks. Return for each tensor of experts the first weight that it fills; `names`: own
    name of every stored tensor."""
    firsts: dict[str, str] = {}
    for path in blocks:
        block = model.get_submodule(path)
        firsts |= {f"{path}.{name}": f"{path}.{first}" for name, first in stacked_parameters(block).items()}
        split_experts(block)
    return {source: firsts[name] for source, name in names.items() if name in firsts}


def _refuse_codes(model: nn.Module, checkpoint: Checkpoint, parameters: Mapping[str, str]) -> None:
    """Raise UserError for a parameter that is stored as integers or fp8, which full-precision weights never are."""
    floating = {name for name, value in model.named_parameters(remove_duplicate=False) if value.is_floating_point()}
    for source, name in parameters.items():
        if name in floating and (dtype := checkpoint.tensors[source].dtype) not in FLOATS:
            raise UserError(
                f"tensor {source} in {checkpoint.folder} is {dtype}: the model is quantized, and nothing says how to "
                "decode it; give the full-precision model"
            )


def vocabulary_size(model: "PreTrainedModel") -> int:
    """Return the number of rows of the token embedding. Raises UserError if the model has none: it reads no tokens."""
    try:
        table = model.get_input_embeddings()
        return int(getattr(table, "num_embeddings", None) or table.weight.shape[0])
    except (AttributeError, NotImplementedError):
        raise UserError(f"{type(model).__name__} has no table of token embeddings: wanted a language model") from None


def find_blocks(model: nn.Module, chosen: str | None = None) -> tuple[str, ...]:
    """Return the paths of the repeated blocks: the members of the outermost ModuleList with most linear weights.

    The language model's own are meant: in a model with a vision tower, whose blocks may be larger, only the text
    decoder is searched, and in a quantized model what is quantized. An encoder-decoder has two such lists, the
    encoder's first. `chosen`: the path of the ModuleList to take instead. Raises UserError if that is none, or if no
    ModuleList has members with linear layers.
    """
    lists, decoder = _block_lists(model), _path_of_part(model, "get_decoder")
    if chosen is not None and chosen not in lists:
        known = ", ".join(lists) or "none"
        raise UserError(f"blocks is {chosen!r}; the lists of blocks in {type(model).__name__} are: {known}")
    quantized = [path for path in lists if any(map(_is_quantized, model.get_submodule(path).modules()))]
    own = [path for path in lists if path.startswith(f"{decoder}.")]
    lists = {path: lists[path] for path in ([chosen] if chosen else quantized or own or lists)}
    if not lists:
        raise UserError(
            f"{type(model).__name__} has no blocks (a ModuleList of modules with nn.Linear): nothing to quantize"
        )
    stacks = [lists]
    if chosen is None and is_encoder_decoder(model):
        parts = (_path_of_part(model, "get_encoder"), decoder)
        both = [{p: size for p, size in _block_lists(model).items() if p.startswith(f"{part}.")} for part in parts]
        stacks = both if all(both) else stacks
    best = [max(found, key=lambda path: found[path]) for found in stacks]
    return tuple(f"{path}.{i}" for path in best for i in range(len(model.get_submodule(path))))  # type: ignore[arg-type]


def stack_starts(blocks: Sequence[str]) -> tuple[int, ...]:
    """Return the numbers of the blocks that begin a list: 0, and in an encoder-decoder the decoder's first."""
    parents = [path.rpartition(".")[0] for path in blocks]
    return tuple(i for i, parent in enumerate(parents) if i == 0 or parent != parents[i - 1])


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder whose output its decoder reads."""
    return config_of(model).encoder_decoder


def find_towers(model: nn.Module, blocks: Sequence[str]) -> tuple[str, ...]:
    """Return the paths of the parts with blocks of their own that hold none of `blocks`, such as a vision tower."""
    firsts = [blocks[i] for i in stack_starts(blocks)]

    def holds(path: str) -> bool:
        return any(first.startswith(f"{path}.") for first in firsts)

    parts = (path.split(".") for path in _block_lists(model) if not holds(path))
    prefixes = ([".".join(names[: i + 1]) for i in range(len(names))] for names in parts)
    return tuple(dict.fromkeys(next(p for p in longer if not holds(p)) for longer in prefixes))


def _block_lists(model: nn.Module) -> dict[str, int]:
    """Return the number of entries in the linear layers of each outermost ModuleList that has any, by path."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in found):
            continue
        size = sum(p.numel() for m in module.modules() if is_linear(m) or _is_quantized(m) for p in _tensors(m))
        if size:
            found[path] = size
    return found


def _path_of_part(model: nn.Module, getter: str) -> str:
    """Return the path of what transformers returns as the text decoder or the encoder; "" for other modules."""
    named: Callable[[], object] | None = getattr(model, getter, None)
    part = None if named is None else named()
    return next((path for path, module in model.named_modules() if module is part), "")


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """Return the block's linear layers by path inside the block, in the model's order."""
    return {path: module for path, module in block.named_modules() if is_linear(module)}


def gates(linears: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of a block's linear layers that stay in 16 bits: few bytes, but errors that matter.

    Layers of one output row; and those no larger than a sixteenth of the block's largest that choose experts, by their
    name, or have fewer than 1000 weights.
    """
    sizes = {name: linear_weight(module).shape for name, module in linears.items()}
    largest = max((shape.numel() for shape in sizes.values()), default=0)
    small = {name for name, shape in sizes.items() if 16 * shape.numel() <= largest}
    few = {name for name in small if sizes[name].numel() < _FEW_WEIGHTS or _chooses_experts(name)}
    return few | {name for name, shape in sizes.items() if shape[0] == 1}


def _chooses_experts(name: str) -> bool:
    return any(part == "gate" or "router" in part for part in name.split("."))


def replace_parameter(root: nn.Module, path: str, value: Tensor) -> None:
    """Set the parameter at the dotted `path`."""
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent).register_parameter(name, nn.Parameter(value, requires_grad=False))


def _is_quantized(module: nn.Module) -> bool:
    return hasattr(module, "layout")


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
