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

import bitquilt
from benchmarks.common import OUTPUT, markdown_table, stamp
from benchmarks.gguf_files import bits_per_weight, block_layers, bytes_read, quantize_gguf, rivals, write_gguf
from benchmarks.memory import make_model
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.linear import QuantizedLinear
from bitquilt.ops import cpu_kernels
from bitquilt.report.evaluation.loading import as_model
from bitquilt.serve.cpu_decoder import CpuDecoder

TYPES = {"Q4_0": 2, "Q3_K_M": 12, "Q2_K": 10, "IQ2_XS": 20}  # llama_ftype
# The format of ours nearest in bits per weight of the layers: bits, group size.
NEAREST = {"IQ2_XS": (2, 64), "Q2_K": (3, 128), "Q3_K_M": (4, 128), "Q4_0": (4, 32)}
HEAD_BITS = 6
PROMPT, TOKENS, TURNS = 16, 24, 3


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
    def _begin(model: Any) -> CpuDecoder:
        decoder = CpuDecoder(model, 1024)
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
    out = ours_at(folder, kind)
    if not out.exists():
        bitquilt.quantize(str(source), "rtn", out=out, bits=bits, group_size=group_size, head_bits=HEAD_BITS)
    if not (folder / f"{kind}.gguf").exists():
        if not plain.exists():
            write_gguf(source, plain, gguf)
        # every weight equally important: IQ2_XS wants to be told
        same = {t.name: [1.0] * int(t.shape[0]) for t in block_layers(plain, gguf)} if kind.startswith("IQ") else None
        quantize_gguf(plain, folder / f"{kind}.gguf", TYPES[kind], llama_cpp, same)


def ours_at(folder: Path, kind: str) -> Path:
    return folder / "bitquilt-{}-{}-head-{}".format(*NEAREST[kind], HEAD_BITS)


def compare(folder: Path, kind: str, threads: int, plain: bool, gguf: Any) -> list[dict[str, Any]]:
    ours = Ours(ours_at(folder, kind), folder / "model")
    rival = Theirs(folder / f"{kind}.gguf", threads, plain)
    theirs, limit = float("inf"), 0.0
    best = [float("inf")] * len(ours.decoders)
    for _ in range(TURNS):
        limit = max(limit, cpu_kernels.read_bandwidth(2**30, threads, 1))
        theirs = min(theirs, rival.seconds())
        for i, decoder in enumerate(ours.decoders):
            best[i] = min(best[i], typical(lambda decoder=decoder: decoder.step(7)))  # type: ignore[misc]
    rival.close()
    file = folder / f"{kind}.gguf"
    bits, read = bits_per_weight(file, gguf), bytes_read(file, gguf)
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
