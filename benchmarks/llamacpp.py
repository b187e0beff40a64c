"""Who writes faster on a CPU, bitquilt or llama.cpp? A random 1.1B Llama, the same threads, one run.

    pip install llama-cpp-python gguf      # builds llama.cpp for this processor; some 15 minutes on two cores
    python -m benchmarks.llamacpp          # makes 2.2 GB of bf16, then each format of both; needs 12 GB of disk
    python -m benchmarks.llamacpp --threads 2 --bits 2 --types Q2_K --keep folder

Each bitquilt width is measured beside the llama.cpp types nearest in true bits per weight, in turns; best of the turns.
llama.cpp stores the head in Q6_K (8.2 bits less than ours, which stays bf16). IQ2_XS cannot be made without an
importance matrix, which llama.cpp's API takes as a C++ object only.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import bitquilt
from benchmarks.common import OUTPUT, markdown_table, stamp
from benchmarks.memory import SHAPE, VOCABULARY, make_model
from bitquilt.evaluation.loading import as_model
from bitquilt.integrations.decoding import Decoder
from bitquilt.ops import kernels

TYPES = {"BF16": 32, "Q4_0": 2, "Q3_K_M": 12, "Q2_K": 10}  # llama_ftype
RIVALS = {2: ("Q2_K",), 3: ("Q3_K_M",), 4: ("Q4_0",)}
TOKENS, TURNS = 24, 3


def rivals() -> tuple[Any, Any]:
    """llama_cpp and gguf, or an exit that says how to get them."""
    try:
        return importlib.import_module("llama_cpp"), importlib.import_module("gguf")
    except ImportError as error:
        raise SystemExit(f"{error.name} is missing; pip install llama-cpp-python gguf") from None


def use_plain_buffers(llama_cpp: Any) -> None:
    """llama.cpp's weights as they are in the file; its Python class has no argument for that."""
    default = llama_cpp.llama_model_default_params

    def plain() -> Any:
        parameters = default()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_model_default_params = llama_cpp.llama_cpp.llama_model_default_params = plain


def write_gguf(model: Path, path: Path, gguf: Any) -> None:
    """The random Llama as GGUF in fp16. The rows of query and key stay as they are: random ones need no reordering."""
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(SHAPE["hidden_size"] // SHAPE["num_attention_heads"])
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    outer = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name = key.removesuffix(".weight")
                if name not in outer:
                    _, _, block, inner = name.split(".", 3)
                    name = f"blk.{block}.{names[inner]}"
                else:
                    name = outer[name]
                value = tensors.get_tensor(key)
                writer.add_tensor(f"{name}.weight", (value.float() if value.dim() == 1 else value.half()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(source: Path, path: Path, kind: str, llama_cpp: Any) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = TYPES[kind]
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(parameters))
    if failed:
        raise SystemExit(f"llama.cpp could not make {kind} of {source}")


def typical(step: Callable[[], Any]) -> float:
    """Seconds of one step, the median of TOKENS."""
    times = []
    for _ in range(TOKENS):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return sorted(times)[TOKENS // 2]


@contextlib.contextmanager
def llama(path: Path, threads: int, llama_cpp: Any) -> Iterator[Callable[[], Any]]:
    model = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    model.eval([1, 2, 3])
    yield lambda: model.eval([7])
    model.close()


def ours(folder: Path) -> tuple[Callable[[], Any], int]:
    model = as_model(folder, "cpu", "auto")
    decoder = Decoder.of(model, 1024)
    assert decoder is not None
    assert decoder.begin(torch.tensor([1, 2, 3])) is not None
    read = sum(f.stat().st_size for f in folder.glob("*.safetensors")) - 2 * VOCABULARY * SHAPE["hidden_size"]
    return lambda: decoder.step(7), read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--types", nargs="*", choices=sorted(TYPES), help="instead of the nearest")
    parser.add_argument(
        "--plain-buffers", action="store_true", help="llama.cpp without repacking and AMX (built by gcc 12 those crash)"
    )
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--keep", type=Path, help="folder for the models, used again by the next run")
    arguments = parser.parse_args()
    llama_cpp, gguf = rivals()
    if arguments.plain_buffers:
        use_plain_buffers(llama_cpp)
    torch.set_num_threads(arguments.threads)
    folder = arguments.keep or Path(tempfile.mkdtemp(dir=OUTPUT.parent))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        rows = compare(folder, arguments, llama_cpp, gguf)
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder)
    table = markdown_table(("model", "MB read per token", "tokens/s", "times llama.cpp", "share of bandwidth"), rows)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "llamacpp.json").write_text(json.dumps({"stamp": stamp(), "rows": rows}, indent=1))
    print(table)


def compare(folder: Path, arguments: argparse.Namespace, llama_cpp: Any, gguf: Any) -> list[dict[str, Any]]:
    source, plain = folder / "model", folder / "f16.gguf"
    if not (source / "config.json").exists():
        source.mkdir(exist_ok=True)
        make_model(source, arguments.layers)
    rows: list[dict[str, Any]] = []
    for bits in arguments.bits:
        small = folder / f"bitquilt-{bits}"
        if not (small / "config.json").exists():
            bitquilt.quantize(str(source), "rtn", out=str(small), bits=bits, group_size=128)
        kinds = arguments.types if arguments.types is not None else RIVALS[bits]
        for kind in kinds:
            if not (folder / f"{kind}.gguf").exists():
                if not plain.exists():
                    write_gguf(source, plain, gguf)
                quantize_gguf(plain, folder / f"{kind}.gguf", kind, llama_cpp)
        step, read = ours(small)
        best, theirs, limit = float("inf"), dict.fromkeys(kinds, float("inf")), 0.0
        for _ in range(TURNS):
            limit = max(limit, kernels.read_bandwidth(2**30, arguments.threads, 1))
            best = min(best, typical(step))
            for kind in kinds:
                with llama(folder / f"{kind}.gguf", arguments.threads, llama_cpp) as theirs_step:
                    theirs[kind] = min(theirs[kind], typical(theirs_step))
        rows.append({"model": f"bitquilt {bits} bits", "MB read per token": read / 1e6, "tokens/s": 1 / best,
                     "share of bandwidth": read / best / limit})  # fmt: skip
        for kind, seconds in theirs.items():
            size = (folder / f"{kind}.gguf").stat().st_size
            rows.append({"model": f"llama.cpp {kind}", "MB read per token": size / 1e6, "tokens/s": 1 / seconds,
                         "share of bandwidth": size / seconds / limit})  # fmt: skip
            rows[-1 - len(theirs)].setdefault("times llama.cpp", seconds / best)
        print(json.dumps(rows[-1 - len(theirs) :]), file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
