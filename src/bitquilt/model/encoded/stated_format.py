"""`StatedFormat` is what a model's folder says about its quantization: `read_stated` reads every place for it.

Headers decide whether a model is quantized. These settings answer what headers leave open.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Beside config.json: ModelOpt, AutoGPTQ, AutoAWQ.
SIDE_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_QUANTIZED = ("quant_algo", "bits", "w_bit")
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class StatedFormat:
    """`settings` as config.json or, if it has none, the file `by_file` states them; `dtype` of the decoded weights."""

    settings: Mapping[str, Any]
    dtype: str = "BF16"
    by_file: str | None = None

    @property
    def name(self) -> str | None:
        """The format by its most exact name."""
        found = (self.settings.get(key) for key in ("format", "quant_algo", "quant_method"))
        return next((text for text in found if isinstance(text, str)), None)

    @property
    def layout(self) -> str:
        """How a GPTQ folder is laid out: "gptq", "gptq_v2", or something that cannot be read; "" if nothing says."""
        asked = (self.settings.get(key) for key in ("checkpoint_format", "packing_format", "format"))
        found = next((text for text in asked if isinstance(text, str)), "")
        if self.settings.get("is_marlin_format"):
            return "marlin"
        return {"auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq"}.get(found, found)

    @property
    def block(self) -> tuple[int | None, int | None]:
        """Rows and columns that share a scale, where they are stated."""
        weights = next((group for group in self._groups.values()), {})
        for found in (self.settings.get("weight_block_size"), weights.get("block_structure")):
            if isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
                return found[0], found[1]
        return None, _positive(self.settings.get("group_size")) or _positive(weights.get("group_size"))

    def bits(self) -> int | None:
        """Bits of a code, where one number is stated."""
        return _width(self.settings.get("bits")) or _width(self.settings.get("w_bit"))

    def of_module(self, path: str) -> tuple[int | None, int | None]:
        """Bits and group size that compressed-tensors states for a module."""
        group = self._group_of(path)
        return _width(group.get("num_bits")), _positive(group.get("group_size"))

    def wants_zeros(self, path: str) -> bool:
        """Whether compressed-tensors states that a module has zeros."""
        return self._group_of(path).get("symmetric") is False

    def _group_of(self, path: str) -> dict[str, Any]:
        """The settings of a module's weights; its own name goes before its class."""
        groups = self._groups
        named = (group for targets, group in groups.items() if any(_names(target, path) for target in targets))
        return next(named, next((group for targets, group in groups.items() if "Linear" in targets), {}))

    @property
    def _groups(self) -> dict[tuple[str, ...], dict[str, Any]]:
        """Settings of the weights by their targets."""
        found, groups = {}, self.settings.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            if isinstance(weights, dict):
                targets = group.get("targets")
                names = targets if isinstance(targets, list) else ["Linear"]
                found[tuple(name for name in names if isinstance(name, str))] = weights
        return found


def read_stated(folder: Path, config: Mapping[str, Any]) -> StatedFormat:
    """Return what config.json and the files next to it say; a file that is not JSON is ignored."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    places = [part.get(key) for part in (config, text) for key in ("quantization_config", "compression_config")]
    stated = next((place for place in places if isinstance(place, dict) and place), None)
    asked = (part.get(key) for part in (config, text) for key in ("dtype", "torch_dtype"))
    dtype = next((_DTYPES[name] for name in asked if isinstance(name, str) and name in _DTYPES), "BF16")
    by_file, settings = None, dict(stated or {})
    for name in SIDE_FILES:
        found = _object(folder / name)
        found = found["quantization"] if isinstance(found.get("quantization"), dict) else found
        if any(found.get(key) is not None for key in _QUANTIZED):
            by_file = by_file or (name if stated is None else None)
            settings = {**found, **settings}
    return StatedFormat(settings, dtype, by_file)


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _names(target: str, path: str) -> bool:
    try:
        return target == path or (target.startswith("re:") and re.match(target[3:], path) is not None)
    except re.error:
        return False


def _positive(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _width(value: object) -> int | None:
    return value if type(value) is int and 1 <= value <= 8 else None
