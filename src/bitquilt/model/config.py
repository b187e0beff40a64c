"""What does config.json say about a quantized model? quantization_config(layouts) and read_layouts(config)."""

from collections.abc import Mapping
from typing import Any

from bitquilt._version import __version__
from bitquilt.core.packing import layout_from_json, layout_to_json, storage_bits
from bitquilt.core.types import Layout
from bitquilt.errors import UserError

QUANT_METHOD = "bitquilt"
FORMAT_VERSION = 1


def quantization_config(layouts: Mapping[str, Layout]) -> dict[str, Any]:
    """The `quantization_config` entry: enough to rebuild every quantized module's shapes."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "bitquilt_version": __version__,
        "nominal_bits": total_nominal_bits(layouts),
        "bpw": total_bpw(layouts),
        "modules": {name: layout_to_json(layout) for name, layout in layouts.items()},
    }


def read_layouts(config: Mapping[str, Any]) -> dict[str, Layout]:
    """Layouts by module path from a config.json's content.

    Raises UserError if the entry is not ours, is of a newer format, or is damaged.
    """
    entry = config.get("quantization_config")
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or method != QUANT_METHOD:
        raise UserError(f"config.json names quantization method {method!r}; wanted {QUANT_METHOD!r}")
    version = entry.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"the checkpoint has format version {version}, this bitquilt {__version__} reads up to {FORMAT_VERSION}; "
            "upgrade bitquilt"
        )
    modules = entry.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise UserError("config.json lists no quantized modules: the file is damaged")
    try:
        return {name: layout_from_json(value, name) for name, value in modules.items()}
    except ValueError as error:
        raise UserError(f"config.json is damaged: {error}") from None


def total_bpw(layouts: Mapping[str, Layout]) -> float:
    """True bits per weight over all quantized layers."""
    return sum(map(storage_bits, layouts.values())) / _weights(layouts)


def total_nominal_bits(layouts: Mapping[str, Layout]) -> float:
    """Mean code width over all quantized layers: the papers' average."""
    spent = sum(layout.nominal_bits * layout.in_features * layout.out_features for layout in layouts.values())
    return spent / _weights(layouts)


def _weights(layouts: Mapping[str, Layout]) -> int:
    return sum(layout.in_features * layout.out_features for layout in layouts.values())
