"""Which parts of a model repeat, and which of them can be quantized? Found by looking, not from a list of families.

A model here is a skeleton: parameters on the meta device, buffers real. A block's weights are read from the
checkpoint when its turn comes and dropped afterwards.
"""

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from bitquilt.errors import UserError
from bitquilt.models.checkpoint import Checkpoint
from bitquilt.models.embedding import replace_layers
from bitquilt.models.linear import is_linear, replace_module
from bitquilt.types import Layout


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model without weights, and where they are.

    `blocks`: dotted paths of the repeated blocks, in order. `sources`: checkpoint names of each block's tensors, by
    path; under "" those of the rest. `parameters`: checkpoint name -> the model's own name, where a tensor goes in
    unchanged (it does not where a family stores tensors split or stacked).
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    blocks: tuple[str, ...]
    sources: dict[str, list[str]]
    parameters: dict[str, str]

    def load(self, path: str, tensors: dict[str, Tensor] | None = None) -> nn.Module:
        """Read the tensors of the block at `path`, or with "" of everything outside the blocks, into the model.

        `tensors`: what was read of it already.
        Floating tensors become the model's dtype. Raises UserError naming a parameter that stays without value.
        """
        load_tensors(self.model, self.checkpoint.read(self.sources[path]) if tensors is None else tensors)
        module = self.model.get_submodule(path)
        if not path:
            missing = set(self.model.state_dict()) - set(self.parameters.values())
            with quiet_transformers():  # what is stored twice with two values stays two tensors
                self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        inside = () if path else self.blocks
        for name, parameter in (*module.named_parameters(), *module.named_buffers()):
            if parameter.is_meta and not name.startswith(tuple(f"{b}." for b in inside)):
                full = f"{path}.{name}".strip(".")
                raise UserError(f"tensor {full} is missing in {self.checkpoint.folder}: the checkpoint is incomplete")
        return module

    def template(self, path: str) -> nn.Module:
        """The empty block, to put back with `reset` when its weights are no longer needed; a copy takes its place.

        The copy gets the weights: whoever still holds the model's first modules holds nothing then.
        """
        empty = self.model.get_submodule(path)
        replace_module(self.model, path, copy.deepcopy(empty))
        return empty

    def reset(self, path: str, template: nn.Module) -> None:
        """Drop the block's weights."""
        replace_module(self.model, path, template)

    def release_outer(self) -> None:
        """Drop the weights outside the blocks."""
        inside = tuple(f"{block}." for block in self.blocks)
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if not name.startswith(inside) and not parameter.is_meta:
                replace_parameter(self.model, name, torch.empty_like(parameter, device="meta"))


def open_skeleton(checkpoint: Checkpoint, layouts: Mapping[str, Layout] | None = None) -> Skeleton:
    """Build the model of `checkpoint` without weights, computing in float32; `layouts` puts quantized layers in.

    Raises UserError if the config names no known model or the model has no blocks with linear layers.
    """
    config = load_config(checkpoint)
    config.use_cache = False
    build = _model_class(config)
    with init_empty_weights(include_buffers=False), _EmptyOnMeta(), quiet_transformers(), _mistakes_of(checkpoint):
        model = build(config, torch.float32)
    model.eval().requires_grad_(False)
    if layouts:
        replace_layers(model, layouts)
    blocks = find_blocks(model)
    sources: dict[str, list[str]] = {path: [] for path in (*blocks, "")}
    parameters: dict[str, str] = {}
    names = source_names(model, checkpoint.tensors)
    if missing := missing_parameters(model, {name for name, _ in names.values()}):
        raise UserError(
            f"tensor {missing[0]} is missing in {checkpoint.folder}: the checkpoint is incomplete, "
            f"{len(missing)} of the model's tensors are in none of its files"
        )
    for source, (name, converted) in names.items():
        home = next((block for block in blocks if name.startswith(f"{block}.")), "")
        sources[home].append(source)
        if not converted:
            parameters[source] = name
    return Skeleton(model, checkpoint, blocks, sources, parameters)


def load_config(checkpoint: Checkpoint) -> Any:
    """The model's config object, without any quantization settings (a skeleton loads its layers itself)."""
    values = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    if "model_type" not in values:
        raise UserError(f"{checkpoint.folder}/config.json has no model_type: wanted a transformers model")
    if values["model_type"] not in CONFIG_MAPPING:
        raise UserError(
            f"transformers {transformers.__version__} does not know this model: model_type is {values['model_type']!r} "
            f"in {checkpoint.folder}/config.json"
        )
    with _mistakes_of(checkpoint):
        return AutoConfig.for_model(**values)


@contextmanager
def _mistakes_of(checkpoint: Checkpoint) -> Iterator[None]:
    """What a family's own code raises over a config's values: anything at all, from KeyError to ZeroDivisionError."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"no model can be built from {checkpoint.folder}/config.json ({reason})") from error


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the token embedding. Raises UserError if the model has none: it reads no tokens."""
    try:
        table = model.get_input_embeddings()
        return int(getattr(table, "num_embeddings", None) or table.weight.shape[0])
    except (AttributeError, NotImplementedError):
        raise UserError(f"{type(model).__name__} has no table of token embeddings: wanted a language model") from None


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the repeated blocks: the members of the outermost ModuleList that holds most linear weights.

    Raises UserError if no ModuleList has members with linear layers.
    """
    best: tuple[int, tuple[str, ...]] = (0, ())
    inside: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in inside):
            continue
        size = sum(p.numel() for m in module.modules() if is_linear(m) or _is_quantized(m) for p in _tensors(m))
        if size:
            inside.append(path)
            best = max(best, (size, tuple(f"{path}.{i}" for i in range(len(module)))), key=lambda item: item[0])
    if not best[1]:
        raise UserError(
            f"{type(model).__name__} has no blocks (a ModuleList of modules with nn.Linear): nothing to quantize"
        )
    return best[1]


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """The block's linear layers by path inside the block, in the model's order."""
    return {path: module for path, module in block.named_modules() if is_linear(module)}


def source_names(model: PreTrainedModel, names: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """Checkpoint name -> (the model's name for it, whether it is split, stacked or otherwise converted on the way).

    transformers' own rules for old names, missing prefixes and stacked experts are applied.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    own = dict(model.state_dict())
    prefix = model.base_model_prefix
    found = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if renamed not in own and name in own:
            renamed, pattern = name, None
        found[name] = (renamed, pattern is not None)
    return found


def missing_parameters(model: PreTrainedModel, found: Collection[str]) -> list[str]:
    """The parameters that none of the tensors `found` (the model's own names) fills, nor a tie to one of them."""
    tied = model.all_tied_weights_keys
    filled = {*found, *tied, *(source for target, source in tied.items() if target in found)}
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in filled and not any(re.search(pattern, name) for pattern in optional)
    ]


def load_tensors(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Put checkpoint tensors into `model`, converted as the family demands."""
    mapping = get_model_conversion_mapping(model)
    load_config = LoadStateDictConfig(weight_mapping=mapping, dtype=model.dtype)
    with quiet_transformers():
        info, _ = convert_and_load_state_dict_in_model(model, tensors, load_config, None)
    if info.mismatched_keys:
        name, *shapes = next(iter(info.mismatched_keys))
        raise UserError(f"tensor {name} has shape {shapes[0]}, the model of this config wants {shapes[1]}")
    if info.conversion_errors:
        name, reason = next(iter(info.conversion_errors.items()))
        raise UserError(f"tensor {name} could not be converted: {reason}")


def replace_parameter(root: nn.Module, path: str, value: Tensor) -> None:
    """Set the parameter at the dotted `path`."""
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent).register_parameter(name, nn.Parameter(value, requires_grad=False))


_FILLS = frozenset({torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_})


class _EmptyOnMeta(TorchFunctionMode):
    """Within the block, `torch.empty`, from which parameters are made, takes no memory, and filling it no time.

    accelerate makes each parameter first and frees it then; between the small tensors that stay the freed pages are
    never handed out again: 16 GiB of address space for 80 blocks of a 1.1B Llama's shape, which a limit refuses.
    Random numbers for the empty parameters of 80 blocks took 0.4 s.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FILLS and args[0].is_meta:
            return args[0]
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class quiet_transformers:
    """Within the block, transformers logs errors only and draws no progress bars of its own."""

    def __enter__(self) -> None:
        self._level = transformers_logging.get_verbosity()
        self._bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self._level)
        if self._bars:
            transformers_logging.enable_progress_bar()


def architecture(names: Iterable[str] | None) -> Any:
    """The first model class of config.json's `architectures` that transformers has, or None."""
    return next((kind for name in names or () if (kind := getattr(transformers, name, None)) is not None), None)


def _model_class(config: Any) -> Any:
    names = getattr(config, "architectures", None)
    kind = architecture(names)
    if kind is not None:
        return lambda config, dtype: kind._from_config(config, dtype=dtype)
    for auto in (AutoModelForCausalLM, AutoModel):
        if type(config) in auto._model_mapping:
            return lambda config, dtype, auto=auto: auto.from_config(config, dtype=dtype)
    raise UserError(f"no transformers model class for config {type(config).__name__} (architectures: {names})")


def _is_quantized(module: nn.Module) -> bool:
    return hasattr(module, "layout")


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
