"""GGUF files by llama.cpp's own quantizer, of Llama models in a folder: what the benchmarks against it share.

pip install llama-cpp-python gguf      # not dependencies of ours
"""

import ctypes
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

_INNER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_OUTER = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}


def rivals() -> tuple[Any, Any]:
    """llama_cpp and gguf, or an exit that says how to get them."""
    try:
        return importlib.import_module("llama_cpp"), importlib.import_module("gguf")
    except ImportError as error:
        raise SystemExit(f"{error.name} is missing; pip install llama-cpp-python gguf") from None


def tensor_name(path: str) -> str:
    """A module's path in transformers' Llama as GGUF calls its weight."""
    if path in _OUTER:
        return f"{_OUTER[path]}.weight"
    _, _, block, inner = path.split(".", 3)
    return f"blk.{block}.{_INNER[inner]}.weight"


def write_gguf(model: Path, path: Path, gguf: Any) -> None:
    """The Llama in folder `model` as GGUF in fp16, without its tokenizer.

    The rows of query and key stay in transformers' order: types round each row for itself. To write text with it, a
    trained model's would have to be reordered.
    """
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                value = tensors.get_tensor(key)
                name = tensor_name(key.removesuffix(".weight"))
                writer.add_tensor(name, (value.float() if value.dim() == 1 else value.half()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(
    source: Path, path: Path, ftype: int, llama_cpp: Any, importance: Mapping[str, list[float]] | None = None
) -> None:
    """llama.cpp's own quantization to the file type `ftype` (llama_ftype), with an importance matrix: by tensor name,
    the mean square of each input."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = ftype
    if importance is not None:
        kept = []
        for name, values in importance.items():
            held = (ctypes.c_float * len(values))(*values)
            kept.append(llama_cpp.llama_model_imatrix_data(name.encode(), held, len(held)))
        kept.append(llama_cpp.llama_model_imatrix_data(None, None, 0))
        parameters.imatrix = (llama_cpp.llama_model_imatrix_data * len(kept))(*kept)
    unfinished = path.with_suffix(".unfinished")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(unfinished).encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp could not make type {ftype} of {source}")
    unfinished.rename(path)


def block_layers(path: Path, gguf: Any) -> list[Any]:
    """The matrices of a file's blocks."""
    found = gguf.GGUFReader(path).tensors
    return [tensor for tensor in found if len(tensor.shape) == 2 and tensor.name.startswith("blk.")]


def bits_per_weight(path: Path, gguf: Any) -> float:
    """True bits per weight of the blocks' matrices."""
    layers = block_layers(path, gguf)
    return 8 * sum(int(t.n_bytes) for t in layers) / sum(int(t.n_elements) for t in layers)


def bytes_read(path: Path, gguf: Any) -> int:
    """What a token reads of a model with a head of its own: the blocks' matrices and the head."""
    head = [t for t in gguf.GGUFReader(path).tensors if t.name == "output.weight"]
    return sum(int(t.n_bytes) for t in [*block_layers(path, gguf), *head])
