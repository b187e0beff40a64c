"""transformers' quantizer for the checkpoint format: `BitquiltConfig` and `BitquiltQuantizer`.

Importing this file registers both, so that `AutoModelForCausalLM.from_pretrained(dir)` works after `import bitquilt`.
Without the import transformers would log a warning and fill the layers with random numbers. A guard in config.json
makes it stop instead (`GUARD` in `model/config.py`); the quantizer removes the guard.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitquilt.core.packing import tensor_specs
from bitquilt.core.types import Layout
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import Checkpoint, open_checkpoint, refuse_two_sources
from bitquilt.model.config import GUARDED, QUANT_METHOD, layouts_of_entry
from bitquilt.model.experts import split_experts
from bitquilt.model.linear import QuantizedLinear, check_values
from bitquilt.model.replace import guard_resizing, replace_layers, replaced_weights
from bitquilt.ops import gpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TORCH_NAMES = {
    "U8": "uint8",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "I16": "int16",
    "I32": "int32",
    "F8_E4M3": "float8_e4m3fn",
}


@register_quantization_config(QUANT_METHOD)
class BitquiltConfig(QuantizationConfigMixin):
    """The `quantization_config` entry of config.json, unchanged."""

    def __init__(self, **entry: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.entry = {**entry, "quant_method": QUANT_METHOD}

    def to_dict(self) -> dict[str, Any]:
        """The entry that `save_pretrained` writes."""
        return dict(self.entry)

    def to_diff_dict(self) -> dict[str, Any]:
        """The entry that the config prints."""
        return self.to_dict()


@register_quantizer(QUANT_METHOD)
class BitquiltQuantizer(HfQuantizer):
    """Put empty `QuantizedLinear` modules in place before transformers loads the tensors."""

    requires_calibration = True
    _files: "_Files | None" = None  # from before until after the weights are loaded

    def update_attn_implementation(self, config: Any) -> Any:
        """Remove the guard: transformers from 5.18 on shows the config to its quantizer here, then looks for files."""
        vars(config).pop(GUARDED, None)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """Remove the guard, in transformers up to 5.17."""
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        layouts = layouts_of_entry(self.quantization_config.to_dict())
        own = {_own_name(name, model): layout for name, layout in layouts.items()}
        split_experts(model, own)
        self._files = _check_files(kwargs.get("checkpoint_files"), layouts, model)
        try:
            replace_layers(model, own, model.dtype)
        except ValueError as error:
            raise UserError(str(error)) from None

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        files, self._files = self._files, None  # the model keeps this quantizer
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                held = {key: value for key, value in module.named_buffers(recurse=False) if not value.is_meta}
                if absent := tensor_specs(module.layout).keys() - held.keys():  # offloaded by `device_map`
                    held |= {} if files is None else files.values(name, absent)
                if files is not None or not absent:
                    check_values(held, module.layout, name)
        guard_resizing(model)
        for module in model.modules():  # they were loaded onto the GPU, not moved there
            if isinstance(module, QuantizedLinear) and module.get_buffer("codes_0").is_cuda and gpu.in_use():
                module.arrange()
        return model

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """`save_pretrained` writes the same tensors back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The codes are fixed; gradients reach the inputs."""
        return False

    @property
    def is_compileable(self) -> bool:
        """One op per layer, with a shape function."""
        return True


def _own_name(path: str, model: "PreTrainedModel") -> str:
    """Return the model's own path for a layer of the checkpoint: a base model has no `model.` prefix where its causal
    LM has one."""
    base = model.base_model_prefix
    if path.startswith(f"{base}.") and not hasattr(model, base):
        return path.removeprefix(f"{base}.")
    if not path.startswith(f"{base}.") and hasattr(model, base) and hasattr(model.base_model, path.split(".")[0]):
        return f"{base}.{path}"
    return path


@dataclass(frozen=True)
class _Files:
    """The names that the tensors of quantized layers have in a checkpoint, by the layer's own path and the part."""

    checkpoint: Checkpoint
    names: Mapping[tuple[str, str], str]

    def values(self, path: str, parts: Iterable[str]) -> dict[str, Tensor]:
        """Read those parts of a layer whose values are checked: all but codes."""
        names = {part: self.names[path, part] for part in parts if not part.startswith("codes_")}
        read = self.checkpoint.read(names.values())
        return {part: read[name] for part, name in names.items()}


def _check_files(files: Sequence[str] | None, layouts: Mapping[str, Layout], model: "PreTrainedModel") -> _Files | None:
    """Return where the files hold the tensors of quantized layers; None for a model without files.

    Raises UserError for a missing tensor, or one of a quantized layer with a wrong shape or type: transformers would
    only warn, and fill the gap with random numbers.
    """
    # late: this file is imported while transformers itself is, before its models
    from bitquilt.model.transformers_model import architecture, missing_parameters, source_names

    if not files:
        return None
    linked = Path(files[0]).resolve().parent  # `load_pretrained` may have made a folder of links
    checkpoint = open_checkpoint(linked if (linked / "config.json").is_file() else Path(files[0]).parent)
    found_at = _check_packed(checkpoint, layouts, model)
    if type(model) is not architecture(checkpoint.model_config.architectures):
        return found_at  # another head, such as one for classification, may begin at random
    quantized = replaced_weights({_own_name(path, model): layout for path, layout in layouts.items()})
    names = source_names(model, checkpoint.tensors)
    refuse_two_sources(checkpoint, {source: name for source, (name, converted) in names.items() if not converted})
    found = {name for name, _ in names.values()}
    if missing := missing_parameters(model, found | quantized):
        raise UserError(f"tensor {missing[0]} is missing in the checkpoint; copy or quantize it again")
    return found_at


def _check_packed(checkpoint: Checkpoint, layouts: Mapping[str, Layout], model: "PreTrainedModel") -> _Files:
    """Compare the tensors of quantized layers with what config.json implies; return their names in the files.

    A base model may have been saved, and `save_pretrained` writes some families under older names than their own.
    """
    from bitquilt.model.transformers_model import source_names  # late, as in `_check_files`

    base, stored = f"{model.base_model_prefix}.", checkpoint.tensors
    renamed = {own: name for name, (own, _) in source_names(model, stored).items()}
    names: dict[tuple[str, str], str] = {}
    for path, layout in layouts.items():
        for key, spec in tensor_specs(layout).items():
            name = f"{path}.{key}"
            at = next((n for n in _written(name, base) if n in stored), renamed.get(name))
            wanted = f"{list(spec.shape)} {str(spec.dtype).removeprefix('torch.')}"
            if at is None:
                raise UserError(f"tensor {name} is missing in the checkpoint; config.json wants {wanted}")
            info = stored[at]
            names[_own_name(path, model), key] = at
            got = f"{list(info.shape)} {_TORCH_NAMES.get(info.dtype, info.dtype)}"
            if got != wanted:
                raise UserError(f"tensor {name} is {got} in the checkpoint; config.json wants {wanted}")
    keys = {home: {*tensor_specs(layouts[path]), "bias"} for path in layouts for home in _written(path, base)}
    for name in checkpoint.tensors:
        home, _, key = name.rpartition(".")
        if home in keys and key not in keys[home]:
            raise UserError(
                f"tensor {name} is in the checkpoint, but config.json names no such part of {home}; copy or quantize "
                "it again"
            )
    return _Files(checkpoint, names)


def _written(name: str, base: str) -> tuple[str, str, str]:
    """The names that a layer or tensor may have in the file: with and without the prefix of the base model."""
    return name, f"{base}{name}", name.removeprefix(base)
