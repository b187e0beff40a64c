"""Models as transformers builds them: `empty_model`, `source_names` of stored tensors, `load_tensors`, and
`load_pretrained` for a whole model.

Importing this file imports transformers' model code, which takes three seconds: import it only where a model is built.
"""

import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bitquilt.errors import UserError
from bitquilt.model.checkpoint import DTYPES, INDEX_NAME, Checkpoint
from bitquilt.model.config import without_quantization
from bitquilt.model.transformers_logging import quiet_transformers


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the model of `checkpoint` without weights, computing in float32; buffers are real.

    Raises UserError if the config names no known model, or none can be built from it.
    """
    config = load_config(checkpoint)
    switch_cache_off(config)
    build = _model_class(config)
    with init_empty_weights(include_buffers=False), _EmptyOnMeta(), quiet_transformers(), _mistakes_of(checkpoint):
        model: PreTrainedModel = build(config, torch.float32)
    return model.eval().requires_grad_(False)


def load_config(checkpoint: Checkpoint) -> Any:
    """Return the model's config object without quantization settings: a skeleton loads its layers itself."""
    values = without_quantization(checkpoint.config)
    if "model_type" not in values:
        raise UserError(f"{checkpoint.folder}/config.json has no model_type: wanted a transformers model")
    if not _knows(values["model_type"]):
        raise UserError(
            f"transformers {transformers.__version__} does not know this model: model_type is {values['model_type']!r} "
            f"in {checkpoint.folder}/config.json"
        )
    names = list(checkpoint.model_config.architectures)  # transformers 5.16 refuses a config with damaged names
    with _mistakes_of(checkpoint):
        return AutoConfig.for_model(**_with_infinities({**values, "architectures": names or None}))


def _knows(model_type: object) -> bool:
    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def _with_infinities(values: dict[str, Any]) -> dict[str, Any]:
    """Decode the numbers that JSON has no word for, `{"__float__": "Infinity"}`, as transformers writes them."""
    decode: Callable[[dict[str, Any]], dict[str, Any]] | None
    decode = getattr(PreTrainedConfig, "_decode_special_floats", None)
    return values if decode is None else decode(values)


def switch_cache_off(config: Any) -> None:
    """Set `use_cache` to False in a config and in those of its parts: models with several read their text config's."""
    config.use_cache = False
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            switch_cache_off(part)


@contextmanager
def _mistakes_of(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what a family's code raises over a config's values, from KeyError to ZeroDivisionError, into UserError."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"no model can be built from {checkpoint.folder}/config.json ({reason})") from error


def source_names(model: PreTrainedModel, names: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """Map a checkpoint's names to (the model's name, whether the tensor is split, stacked or otherwise converted).

    transformers' own rules for old names, missing prefixes and stacked experts apply.
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
    """Return the parameters that neither the tensors `found` (the model's own names) nor a tie to one of them fill."""
    tied = model.all_tied_weights_keys
    filled = {*found, *tied, *(source for target, source in tied.items() if target in found)}
    return [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in filled and not _is_optional(model, name)
    ]


def compute_parameter(model: PreTrainedModel, name: str) -> bool:
    """Give a parameter on the meta device the value that transformers computes where checkpoints have none.

    Such are the sinusoidal positions of Marian. Return False for a parameter that a checkpoint must have.
    """
    parent, _, own = name.rpartition(".")
    module = model.get_submodule(parent)
    if not _is_optional(model, name) or any(not p.is_meta for p in module.parameters(recurse=False)):
        return False
    value = torch.empty_like(module.get_parameter(own), device="cpu")
    module.register_parameter(own, torch.nn.Parameter(value, requires_grad=False))
    model._init_weights(module)
    return True


def _is_optional(model: PreTrainedModel, name: str) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def load_tensors(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Load checkpoint tensors into `model`, converted as the family requires."""
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
    # the tensors put in are asked for gradients by default, which costs a third of a backward pass and their size again
    model.requires_grad_(False)


_FILLS = frozenset({torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_})
_INIT = "torch.nn.init"


def load_pretrained(kind: Any, checkpoint: Checkpoint, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Return what `kind.from_pretrained` makes of exactly the files that `checkpoint` reads.

    Pickled weights are never opened, and the folder's own code does not run unless it is trusted. Raises UserError for
    a model type that only such code knows.
    """
    if checkpoint.config.get("auto_map"):
        if trust_remote_code:
            kind = AutoModelForCausalLM  # chooses the folder's class
        elif not _knows(name := checkpoint.config.get("model_type")):
            raise UserError(
                f"{checkpoint.name} has model type {name!r}, which only Python code of its own knows, and that was not "
                "run; read the code, then pass --trust-remote-code (trust_remote_code=True)"
            )
    if not checkpoint.model_config.quantized_by:
        checkpoint.refuse_undecodable()
    if checkpoint.source.weights:
        return _load_decoded(kind, checkpoint, options)
    options = {"use_safetensors": True, **options}
    with _as_transformers_names_it(checkpoint) as folder, _load_errors(checkpoint):
        return kind.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)


@dataclass(frozen=True, eq=False)
class _OnDemand:
    """A tensor of `checkpoint` that is read, and decoded, when transformers slices it."""

    checkpoint: Checkpoint
    name: str

    def __getitem__(self, _: Any) -> Tensor:
        return self.checkpoint.read([self.name])[self.name]


def _load_decoded(kind: Any, checkpoint: Checkpoint, options: dict[str, Any]) -> Any:
    """Return the model of a checkpoint that another tool quantized, from the weights that a run reads too."""
    config = load_config(checkpoint)
    if kind is AutoModelForCausalLM:
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise UserError(f"{checkpoint.name} is not a causal language model: its config is {type(config).__name__}")
        kind = AutoModelForCausalLM._model_mapping[type(config)]
    if options.get("dtype") == "auto":
        options["dtype"] = DTYPES[checkpoint.tensors[next(iter(checkpoint.source.weights))].dtype]
    state = {name: _OnDemand(checkpoint, name) for name in checkpoint.tensors}
    loaded = kind.from_pretrained(None, config=config, state_dict=state, **options)
    if (checkpoint.folder / "generation_config.json").is_file() and kind.can_generate():
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return loaded


@contextmanager
def _load_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what transformers raises over a damaged config, index or generation_config.json into UserError.

    It reads these files without checks, so a wrong kind of value raises whatever the code that meets it raises.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{checkpoint.name} does not load ({type(error).__name__}: {reason[0]}): a file there is damaged, or an "
            "option does not fit the model; copy or quantize it again"
        ) from error


@contextmanager
def _as_transformers_names_it(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yield the folder, or one of links with an index where the weights have names that transformers does not know."""
    files = {info.file for info in checkpoint.tensors.values()}
    if (checkpoint.folder / INDEX_NAME).is_file() or {file.name for file in files} == {"model.safetensors"}:
        yield checkpoint.folder
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in {*files, checkpoint.folder / "config.json", *checkpoint.companions()}:
            (folder / file.name).symlink_to(file.absolute())
        weight_map = {name: info.file.name for name, info in checkpoint.tensors.items()}
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        yield folder


class _EmptyOnMeta(TorchFunctionMode):
    """Within the block, `torch.empty` makes tensors on the meta device, and filling them does nothing.

    accelerate makes each parameter and then frees it. The freed pages are between small tensors that stay and are never
    reused: 16 GiB of address space for 80 blocks of a 1.1B Llama's shape, which a limit refuses. Random numbers for the
    empty parameters of 80 blocks took 1.1 s.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FILLS or getattr(func, "__module__", None) == _INIT:
            filled = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def class_of(names: Iterable[str], *, generates: bool = False) -> Any:
    """Return the class that loads a folder with these `architectures`: the first that transformers has.

    AutoModelForCausalLM stands in for an unknown one and, where the model has to be one that `generates` text, for one
    without logits of the next token.
    """
    kind = architecture(names)
    if kind is None or (generates and not kind.can_generate()):
        return AutoModelForCausalLM
    return kind


def architecture(names: Iterable[str]) -> Any:
    """Return the first of these model classes that transformers has, or None."""
    found = (getattr(transformers, name, None) for name in names if isinstance(name, str))
    return next((kind for kind in found if kind is not None), None)


def _model_class(config: Any) -> Any:
    names = getattr(config, "architectures", None)
    kind = architecture(names if isinstance(names, list | tuple) else ())
    if kind is not None:
        return lambda config, dtype: kind._from_config(config, dtype=dtype)
    for auto in (AutoModelForCausalLM, AutoModel):
        if type(config) in auto._model_mapping:
            return lambda config, dtype, auto=auto: auto.from_config(config, dtype=dtype)
    raise UserError(f"no transformers model class for config {type(config).__name__} (architectures: {names})")
