"""`import bitquilt` teaches transformers the checkpoint format: `AutoModelForCausalLM.from_pretrained(dir)` works.

Without the import transformers logs a warning and fills the layers with random numbers: there is no way for a
checkpoint to ask for the package that reads it.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitquilt.errors import UserError
from bitquilt.models.checkpoint import open_checkpoint
from bitquilt.models.config import QUANT_METHOD, read_layouts
from bitquilt.models.linear import replace_linears
from bitquilt.packing import tensor_specs


@register_quantization_config(QUANT_METHOD)
class BitquiltConfig(QuantizationConfigMixin):
    """The `quantization_config` entry of config.json, kept as it was read."""

    def __init__(self, **entry: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.entry = {**entry, "quant_method": QUANT_METHOD}

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes."""
        return dict(self.entry)

    def to_diff_dict(self) -> dict[str, Any]:
        """What the config prints."""
        return self.to_dict()


@register_quantizer(QUANT_METHOD)
class BitquiltQuantizer(HfQuantizer):
    """Puts empty `QuantizedLinear` modules in place before transformers loads the tensors."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        layouts = read_layouts({"quantization_config": self.quantization_config.to_dict()})
        _check_files(kwargs.get("checkpoint_files"), layouts)
        try:
            replace_linears(model, layouts, model.dtype)
        except ValueError as error:
            raise UserError(str(error)) from None

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


def _check_files(files: Any, layouts: Any) -> None:
    """Every stored tensor present, with the shape and type config.json implies: transformers would only warn."""
    if not files:
        return
    stored = open_checkpoint(Path(files[0]).parent).tensors
    names = {
        "U8": "uint8",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
        "I16": "int16",
        "I32": "int32",
    }
    for path, layout in layouts.items():
        for key, spec in tensor_specs(layout).items():
            info = stored.get(f"{path}.{key}")
            wanted = f"{list(spec.shape)} {str(spec.dtype).removeprefix('torch.')}"
            if info is None:
                raise UserError(f"tensor {path}.{key} is missing in the checkpoint; config.json wants {wanted}")
            got = f"{list(info.shape)} {names.get(info.dtype, info.dtype)}"
            if got != wanted:
                raise UserError(f"tensor {path}.{key} is {got} in the checkpoint; config.json wants {wanted}")
