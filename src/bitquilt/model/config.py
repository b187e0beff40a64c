"""Everything that config.json says: `read_config` returns a `ModelConfig`, `read_layouts` the quantized layers.

`config_of` reads a loaded model instead of a file, `with_quantization` adds the entry of a quantized model, and
`total_bpw` and `total_nominal_bits` average over its layers. What another tool says about its quantization is read by
`encoded/stated_format.py`; no other file looks a setting up by its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitquilt._version import __version__
from bitquilt.core.packing import layout_from_json, layout_to_json, storage_bits
from bitquilt.core.types import Layout
from bitquilt.errors import UserError

QUANT_METHOD = "bitquilt"
FORMAT_VERSION = 1
_ENTRY = "quantization_config"
# The name of the weights' file in config.json, a setting of transformers. A name that is no .safetensors file makes
# `from_pretrained` stop with an error that quotes it; our own quantizer removes the setting before it is read.
GUARDED = "transformers_weights"
GUARD = (
    "these weights were quantized by bitquilt and only it can load them. Install bitquilt and run `import bitquilt` "
    "before from_pretrained, or call bitquilt.load"
)
_EARLIER_ENTRY = "compression_config"  # of compressed-tensors
_WINDOWED = "sliding_attention"
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# No size of a model is larger, and torch takes no sizes above 2^63.
_MOST = 2**40
# Layers that share their weights, as ALBERT's 12 to 48, have no tensors of their own.
_SHARED = 1000


@dataclass(frozen=True)
class ModelConfig:
    """A language model as its config describes it; sizes are 0 or None where the config does not state them.

    `architectures` are transformers' class names; `encoder_decoder`: whether a decoder reads an encoder's output.
    `windows` has an entry per layer: how many tokens its attention reaches back, or None without a limit. `bos` is the
    token that starts a text. `quantized_by` is the tool that quantized the model, None for full precision.
    """

    architectures: tuple[str, ...]
    encoder_decoder: bool
    hidden_size: int
    vocabulary: int | None
    context_length: int | None
    windows: tuple[int | None, ...]
    key_value_heads: int
    head_size: int
    bos: int | None
    quantized_by: str | None

    def cache_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Bytes of the keys and values of one sequence. A layer with a sliding window keeps no more than the window."""
        kept = sum(tokens if window is None else min(tokens, window) for window in self.windows)
        return 2 * itemsize * self.key_value_heads * self.head_size * kept


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """Read the content of a config.json; a model with several parts is read by its `text_config`."""
    nested = values.get("text_config")
    text = nested if isinstance(nested, dict) else values
    width = _number(text, "hidden_size", "n_embd", "d_model")
    heads = _number(text, "num_attention_heads", "n_head")
    names, bos = values.get("architectures"), values.get("bos_token_id")
    return ModelConfig(
        architectures=tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else (),
        encoder_decoder=values.get("is_encoder_decoder") is True,
        hidden_size=width,
        vocabulary=_number(text, "vocab_size") or None,
        context_length=_number(text, "max_position_embeddings", "n_positions", "max_seq_len") or None,
        windows=_windows(text),
        key_value_heads=_number(text, "num_key_value_heads") or heads,
        head_size=_number(text, "head_dim") or width // max(1, heads),
        bos=bos if isinstance(bos, int) else None,
        quantized_by=_quantized_by(values.get(_ENTRY) or text.get(_ENTRY) or values.get(_EARLIER_ENTRY)),
    )


def config_of(model: Any) -> ModelConfig:
    """Read the config of a loaded transformers model; a module without one states nothing."""
    config = getattr(model, "config", None)
    return read_config({} if config is None else config.to_dict())


def with_quantization(values: Mapping[str, Any], layouts: Mapping[str, Layout]) -> dict[str, Any]:
    """Add the `quantization_config` entry: enough to rebuild every quantized module's shapes.

    Also add the guard against programs that do not know the format: transformers would only warn about an unknown
    `quant_method`, and fill the layers with random numbers.
    """
    entry = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "bitquilt_version": __version__,
        "nominal_bits": total_nominal_bits(layouts),
        "bpw": total_bpw(layouts),
        "modules": {name: layout_to_json(layout) for name, layout in layouts.items()},
    }
    return {**without_quantization(values), GUARDED: GUARD, _ENTRY: entry}


def without_quantization(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what says how a model was quantized, also from the configs of its parts."""
    kept = {key: value for key, value in values.items() if key not in (_ENTRY, _EARLIER_ENTRY, GUARDED)}
    return {
        key: without_quantization(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in kept.items()
    }


def read_layouts(values: Mapping[str, Any]) -> dict[str, Layout]:
    """Return the layouts by module path that a config.json holds.

    Raises UserError if bitquilt did not quantize the model, or if the entry is of a newer format or damaged.
    """
    return layouts_of_entry(values.get(_ENTRY))


def layouts_of_entry(entry: object) -> dict[str, Layout]:
    """Return the layouts that a `quantization_config` entry holds; see `read_layouts`."""
    if not isinstance(entry, dict) or entry.get("quant_method") != QUANT_METHOD:
        raise UserError(f"config.json names quantization method {_quantized_by(entry)!r}; wanted {QUANT_METHOD!r}")
    version = entry.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"the checkpoint has format version {version}, this bitquilt {__version__} reads up to {FORMAT_VERSION}; "
            "upgrade bitquilt"
        )
    modules = entry.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise UserError("config.json lists no quantized modules: the file is damaged; copy or quantize it again")
    try:
        return {name: layout_from_json(value, name) for name, value in modules.items()}
    except ValueError as error:
        raise UserError(f"config.json is damaged: {error}; copy or quantize it again") from None


def total_bpw(layouts: Mapping[str, Layout]) -> float:
    """True bits per weight over all quantized layers."""
    return sum(map(storage_bits, layouts.values())) / _weights(layouts)


def total_nominal_bits(layouts: Mapping[str, Layout]) -> float:
    """Mean code width over all quantized layers, which is the average that papers report."""
    spent = sum(layout.nominal_bits * layout.in_features * layout.out_features for layout in layouts.values())
    return spent / _weights(layouts)


def _number(text: Mapping[str, Any], *names: str) -> int:
    """The first of the settings `names` that is a positive whole number, else 0."""
    found = (text.get(name) for name in names)
    return next((value for value in found if type(value) is int and 0 < value < _MOST), 0)


def refuse_endless(values: Mapping[str, Any], tensors: int, where: object) -> None:
    """Raise UserError for far more layers than the checkpoint has `tensors`: building them would not end."""
    nested = values.get("text_config")
    for name in _LAYERS:
        layers = (nested if isinstance(nested, dict) else values).get(name)
        if isinstance(layers, int) and layers > _SHARED + tensors:
            raise UserError(
                f"{where}: {name} is {layers:.3g}, and the checkpoint holds {tensors} tensors: the file is damaged; "
                "copy or download it again"
                if layers < _MOST
                else f"{where}: {name} is not a number of layers: the file is damaged; copy or download it again"
            )


def _windows(text: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The attention window of every layer. Without `layer_types` Qwen's families window their last layers and only on
    request, all others every layer: the rule of transformers' own cache."""
    layers = _number(text, *_LAYERS)
    window = _number(text, "sliding_window") or None
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and kinds:
        return tuple(window if kind == _WINDOWED else None for kind in kinds)
    first = 0
    if str(text.get("model_type")).startswith("qwen"):
        first = _number(text, "max_window_layers") if text.get("use_sliding_window") else layers
    return tuple(window if layer >= first else None for layer in range(layers))


def _quantized_by(entry: object) -> str | None:
    if not entry:
        return None
    return str(entry.get("quant_method", "unknown") if isinstance(entry, dict) else entry)


def _weights(layouts: Mapping[str, Layout]) -> int:
    return sum(layout.in_features * layout.out_features for layout in layouts.values())
