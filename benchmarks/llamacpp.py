"""Who writes faster on a CPU, bitquilt or llama.cpp? A random 1.1B Llama, the same threads, one run.

    CC=clang-19 CXX=clang++-19 pip install llama-cpp-python gguf    # builds llama.cpp for this processor: 5 minutes
    python -m benchmarks.llamacpp --keep folder --make   # 2.2 GB of bf16, then each format of both: 7 GB, 20 minutes
    python -m benchmarks.llamacpp --keep folder          # then a minute or two each time

llama.cpp runs in a process of its own (`benchmarks.llamacpp_step` says why), with repacked weights and AMX where its
types have them; `--plain-buffers` does without both.

Each llama.cpp type is measured beside the bitquilt format nearest to it in true bits per weight of the layers, in
turns; the best of the turns. llama.cpp keeps the head in 6.6 bits: ours is measured twice, as `--head-bits 6` stores it
and in bf16, as it is.
"""

import argparse
import ctypes
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import bitquilt
from benchmarks.common import OUTPUT, markdown_table, stamp
from benchmarks.memory import SHAPE, VOCABULARY, make_model
from bitquilt.evaluation.loading import as_model
from bitquilt.integrations.decoding import Decoder
from bitquilt.models.checkpoint import open_checkpoint
from bitquilt.models.linear import QuantizedLinear
from bitquilt.ops import kernels

TYPES = {"Q4_0": 2, "Q3_K_M": 12, "Q2_K": 10, "IQ2_XS": 20}  # llama_ftype
# The format of ours nearest in bits per weight of the layers: bits, group size.
NEAREST = {"IQ2_XS": (2, 64), "Q2_K": (3, 128), "Q3_K_M": (4, 128), "Q4_0": (4, 32)}
HEAD_BITS = 6
PROMPT, TOKENS, TURNS = 16, 24, 3


def rivals() -> tuple[Any, Any]:
    """llama_cpp and gguf, or an exit that says how to get them."""
    try:
        return importlib.import_module("llama_cpp"), importlib.import_module("gguf")
    except ImportError as error:
        raise SystemExit(f"{error.name} is missing; pip install llama-cpp-python gguf") from None


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


def quantize_gguf(source: Path, path: Path, kind: str, llama_cpp: Any, gguf: Any) -> None:
    """llama.cpp's own quantization; every weight equally important, which IQ2_XS wants to be told."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = TYPES[kind]
    kept = []
    if kind.startswith("IQ"):
        for tensor in gguf.GGUFReader(source).tensors:
            if len(tensor.shape) == 2:
                ones = (ctypes.c_float * int(tensor.shape[0]))(*([1.0] * int(tensor.shape[0])))
                kept.append(llama_cpp.llama_model_imatrix_data(tensor.name.encode(), ones, len(ones)))
        kept.append(llama_cpp.llama_model_imatrix_data(None, None, 0))
        parameters.imatrix = (llama_cpp.llama_model_imatrix_data * len(kept))(*kept)
    unfinished = path.with_suffix(".unfinished")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(unfinished).encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp could not make {kind} of {source}")
    unfinished.rename(path)


def sizes_of_gguf(path: Path, gguf: Any) -> tuple[float, int]:
    """Bits per weight of the layers, and bytes that a token reads: the layers and the head."""
    layers = weights = head = 0
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) == 2 and tensor.name.startswith("blk."):
            layers, weights = layers + int(tensor.n_bytes), weights + int(tensor.n_elements)
        elif tensor.name == "output.weight":
            head = int(tensor.n_bytes)
    return 8 * layers / weights, layers + head


def typical(step: Callable[[], Any]) -> float:
    """Seconds of one step, the median of TOKENS."""
    times = []
    for _ in range(TOKENS):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return sorted(times)[TOKENS // 2]


class Theirs:
    """llama.cpp after a prompt, in a process of its own."""

    def __init__(self, path: Path, threads: int, plain: bool) -> None:
        command = [sys.executable, "-m", "benchmarks.llamacpp_step", str(path), *map(str, (threads, PROMPT, TOKENS))]
        command += ["--plain-buffers"] if plain else []
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self) -> float:
        """Of one token, the median of some; its threads have stopped waiting for more when this returns."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"llama.cpp ended with {self._process.wait()}")
        time.sleep(0.5)
        return float(answer)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


class Ours:
    """A quantized model after a prompt; `heads` are decoders that share its layers."""

    def __init__(self, folder: Path, source: Path) -> None:
        model = as_model(folder, "cpu", "auto")
        small = model.lm_head
        layers = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m is not small]
        self.layer_bytes = sum(t.numel() * t.itemsize for m in layers for t in m.buffers())
        self.bits = 8 * self.layer_bytes / sum(m.in_features * m.out_features for m in layers)
        self.heads = {f"head {HEAD_BITS} bits": sum(t.numel() * t.itemsize for t in small.buffers())}
        self.decoders = [self._begin(model)]
        head = torch.nn.Linear(small.in_features, small.out_features, bias=False, device="meta")
        weight = open_checkpoint(source).read(["lm_head.weight"])["lm_head.weight"].to(torch.bfloat16)
        head.weight = torch.nn.Parameter(weight, requires_grad=False)
        model.lm_head = head
        self.heads["head bf16"] = 2 * weight.numel()
        self.decoders.append(self._begin(model))

    @staticmethod
    def _begin(model: Any) -> Decoder:
        decoder = Decoder(model, 1024)
        assert decoder.begin(torch.arange(3, 3 + PROMPT)) is not None
        return decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", nargs="*", choices=sorted(TYPES), default=list(NEAREST))
    parser.add_argument("--plain-buffers", action="store_true", help="llama.cpp without repacking and AMX")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--keep", type=Path, help="folder for the models, used again by the next run")
    parser.add_argument("--make", action="store_true", help="only make the models")
    arguments = parser.parse_args()
    llama_cpp, gguf = rivals()
    torch.set_num_threads(arguments.threads)
    folder = arguments.keep or Path(tempfile.mkdtemp(dir=OUTPUT.parent))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for kind in arguments.types:
            make(folder, kind, arguments.layers, llama_cpp, gguf)
        if arguments.make:
            return
        rows: list[dict[str, Any]] = []
        for kind in arguments.types:
            rows += compare(folder, kind, arguments.threads, arguments.plain_buffers, gguf)
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder)
    table = markdown_table(("model", "bpw", "MB read per token", "tokens/s", "times llama.cpp", "share"), rows)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "llamacpp.json").write_text(json.dumps({"stamp": stamp(), "rows": rows}, indent=1))
    print(table)


def make(folder: Path, kind: str, layers: int, llama_cpp: Any, gguf: Any) -> None:
    """Whatever is missing for one comparison."""
    source, plain = folder / "model", folder / "f16.gguf"
    if not (source / "config.json").exists():
        source.mkdir(exist_ok=True)
        make_model(source, layers)
    bits, group_size = NEAREST[kind]
    out = str(ours_at(folder, kind))
    bitquilt.quantize(str(source), "rtn", out=out, bits=bits, group_size=group_size, head_bits=HEAD_BITS)
    if not (folder / f"{kind}.gguf").exists():
        if not plain.exists():
            write_gguf(source, plain, gguf)
        quantize_gguf(plain, folder / f"{kind}.gguf", kind, llama_cpp, gguf)


def ours_at(folder: Path, kind: str) -> Path:
    return folder / "bitquilt-{}-{}-head-{}".format(*NEAREST[kind], HEAD_BITS)


def compare(folder: Path, kind: str, threads: int, plain: bool, gguf: Any) -> list[dict[str, Any]]:
    ours = Ours(ours_at(folder, kind), folder / "model")
    rival = Theirs(folder / f"{kind}.gguf", threads, plain)
    theirs, limit = float("inf"), 0.0
    best = [float("inf")] * len(ours.decoders)
    for _ in range(TURNS):
        limit = max(limit, kernels.read_bandwidth(2**30, threads, 1))
        theirs = min(theirs, rival.seconds())
        for i, decoder in enumerate(ours.decoders):
            best[i] = min(best[i], typical(lambda decoder=decoder: decoder.step(7)))  # type: ignore[misc]
    rival.close()
    bits, read = sizes_of_gguf(folder / f"{kind}.gguf", gguf)
    rows = [{"model": f"llama.cpp {kind}", "bpw": bits, "MB read per token": read / 1e6, "tokens/s": 1 / theirs,
             "share": read / theirs / limit}]  # fmt: skip
    for (name, head), seconds in zip(ours.heads.items(), best, strict=True):
        read = ours.layer_bytes + head
        rows.append({"model": "bitquilt {} bits, groups of {}, {}".format(*NEAREST[kind], name), "bpw": ours.bits,
                     "MB read per token": read / 1e6, "tokens/s": 1 / seconds, "times llama.cpp": theirs / seconds,
                     "share": read / seconds / limit})  # fmt: skip
    print(json.dumps(rows), file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
