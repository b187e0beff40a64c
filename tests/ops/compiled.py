"""Compile the GPU kernels for an H100 or H200 (sm_90) without one: `python -m tests.ops.compiled` prints what came out.

A program of its own, because kernels imported under Triton's interpreter cannot be compiled in the same process.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitquilt.ops.gpu.activation_tiles import Tile
from bitquilt.ops.gpu.decoder_kernels import Heads, attend_kernel
from bitquilt.ops.gpu.dequantize_kernel import dense_kernel, outlier_kernel
from bitquilt.ops.gpu.matmul_kernel import product_kernel
from bitquilt.ops.gpu.unpack_codes import has_ptx, plane_sizes

POINTERS = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}
TARGET = GPUTarget("cuda", 90, 32)


def product(
    segments: list[tuple[int, int, int, bool, int]],
    dtype: str = "bf16",
    *,
    tile: tuple[int, int, int] = (16, 1, 8),
    warps: int = 4,
    stages: int = 4,
    gather: bool = False,
    outliers: bool = False,
    shared: bool = False,
    bias: bool = False,
) -> Any:
    """`segments`: (grid, bits, group, flag, READ); `tile`: rows, tokens, stack."""
    forms = tuple((*s, has_ptx(s[1], dtype)) for s in segments)
    x = POINTERS[dtype]
    codes = tuple(
        tuple(f"*i{size}" for size in plane_sizes(s[1])) if s[4] == 2 else ("*i32",) * (s[1] if s[4] > 2 else 1)
        for s in segments
    )
    looks_up = [s[4] > 2 and has_ptx(s[1], dtype) for s in segments]
    scales = tuple(
        "*i32" if look else "*u8" if s[0] == 2 else "*fp16" for s, look in zip(segments, looks_up, strict=True)
    )
    zeros = tuple("*fp16" if s[0] == 1 or (s[0] == 0 and s[1] == 1) else "*u8" for s in segments)
    integers = dict.fromkeys(("n_rows", "n_tokens", "in_features", "chunks", "parts"), "i32")
    signature = {
        "x": x, "plain_x": x, "runs": "*i32", "codes": codes, "scales": scales, "zeros": zeros,
        "sizes": tuple(("i32",) * 7 for _ in segments), "outliers": ("*fp16", "*i16", "*i32"), "bias": x, "out": x,
        "partial": "*fp32", "counters": "*i32", **integers,
    }  # fmt: skip
    given = {"runs": gather, "outliers": outliers, "bias": bias, "partial": shared, "counters": shared}
    missing = [name for name, there in given.items() if not there]
    signature = {name: kind for name, kind in signature.items() if name not in missing}
    constants = {"FORMS": forms, "TILE": Tile(*tile, stages, gather, False), **dict.fromkeys(missing)}
    return build(product_kernel, signature, constants, warps, stages)


def dense(segments: list[tuple[int, int, int, bool, int]], dtype: str) -> Any:
    """`segments`: (grid, bits, group, flag, 1 in planes or 2 in quads)."""
    scales = tuple("*u8" if s[0] == 2 else "*fp16" for s in segments)
    zeros = tuple("*fp16" if s[0] == 1 or (s[0] == 0 and s[1] == 1) else "*u8" for s in segments)
    signature = {
        "out": POINTERS[dtype], "channels": "*i32", "codes": ("*u8",) * len(segments), "scales": scales,
        "zeros": zeros, "sizes": tuple(("i32",) * 7 for _ in segments), "n_rows": "i32", "in_features": "i32",
    }  # fmt: skip
    return build(dense_kernel, signature, {"FORMS": tuple(segments), "BN": 32}, 4, 3)


def outlier(dtype: str) -> Any:
    signature = {"out": POINTERS[dtype], "values": "*fp16", "columns": "*i16", "pointers": "*i32", "in_features": "i32"}
    return build(outlier_kernel, signature, {}, 4, 3)


def attention(dtype: str = "bf16") -> Any:
    """Of LLaMA-7B's heads."""
    x = POINTERS[dtype]
    signature = {
        "projected": (x,) * 3, "norms": (x,) * 2, "rotary": (x, x, "*i64"), "cache": (x,) * 2, "out": x,
        "partial": "*fp32", "counters": "*i32", "length": "i32", "scaling": "fp32", "epsilon": "fp32",
    }  # fmt: skip
    return build(attend_kernel, signature, {"HEADS": Heads(1, 128, 64, 64, 8, 8, True)}, 4, 3)


def build(kernel: Any, signature: dict[str, Any], constants: dict[str, Any], warps: int, stages: int) -> Any:
    """Pointers and sizes are multiples of 16, as those of ordinary layers."""
    names = kernel.arg_names
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(names):
        kind = signature.get(name)
        if isinstance(kind, tuple):
            for j, inner in enumerate(kind):
                places = [(i, j, k) for k in range(len(inner))] if isinstance(inner, tuple) else [(i, j)]
                # of sizes: start, width and the row's are multiples; counts of groups and chunks are anything
                attributes |= {p: [["tt.divisibility", 16]] for p in places if name != "sizes" or p[2] in (0, 1, 2)}
        elif kind is not None and (kind.startswith("*") or name in ("in_features", "n_rows")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    full = {name: signature.get(name, "constexpr") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=full, constexprs=places, attrs=attributes)
    return triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": stages})


def resources(compiled: Any) -> dict[str, int]:
    """Registers, spilled bytes and shared memory, and how many instructions of some kinds, over the whole kernel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
        code = subprocess.run([tools / "nvdisasm", file.name], check=True, capture_output=True, text=True).stdout
    words = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", code, flags=re.MULTILINE)
    kinds = ("HMMA", "HGMMA", "LDGSTS", "LDG", "LDS", "LDSM", "STS", "LOP3", "HFMA2", "FFMA", "SHF", "I2F", "PRMT",
             "BAR", "IMAD", "SHFL")  # fmt: skip
    counts = {kind: sum(w.split(".")[0] == kind for w in words) for kind in kinds}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "local": int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "instructions": len(words),
        **counts,
    }


INTEGER = {"LOP3", "SHF", "PRMT", "IADD3", "LEA", "ISETP", "SEL", "PLOP3", "VIADD", "VIMNMX", "SGXT", "BMSK", "IABS"}


def inner_loop(compiled: Any, weights: int) -> tuple[float, float]:
    """Instructions per weight in the longest loop of a kernel, all and those of the integer pipe; `weights`: of a tile,
    per thread and pass."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = subprocess.run([tools / "nvdisasm", file.name], check=True, capture_output=True, text=True).stdout
    labels: dict[str, int] = {}
    words: list[str] = []
    longest: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\S+):", line):
            labels[label[1]] = len(words)
        if found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)(.*)", line):
            words.append(found[1])
            target = re.search(r"(\.L\w+)", found[2]) if found[1] == "BRA" else None
            if target and target[1] in labels and len(words) - labels[target[1]] > len(longest):
                longest = words[labels[target[1]] :]
    return len(longest) / weights, sum(word in INTEGER for word in longest) / weights


def every() -> dict[str, Any]:
    """One of each kind: name -> what compiles it."""
    two = [(0, 2, 128, False, 2)]
    mixed = [(0, 1, 128, False, 2), (0, 2, 128, False, 2), (0, 3, 128, False, 1)]
    return {
        "2 bits, 1 token": lambda: product(two, tile=(32, 1, 8)),
        "3 bits as stored": lambda: product([(0, 3, 128, False, 1)], tile=(32, 1, 8)),
        "3 bits, 1 token": lambda: product([(0, 3, 128, False, 2)], tile=(32, 1, 8)),
        "4 bits, 1 token": lambda: product([(0, 4, 128, False, 2)], tile=(32, 1, 8)),
        "5 bits, 1 token": lambda: product([(0, 5, 128, False, 2)], tile=(32, 1, 8)),
        "2 bits, 16 tokens": lambda: product(two, tile=(256, 16, 1), shared=True),
        "3 bits, 16 tokens": lambda: product([(0, 3, 128, False, 2)], tile=(256, 16, 1)),
        "mixed, everything": lambda: product(
            mixed, "fp16", stages=2, gather=True, outliers=True, shared=True, bias=True
        ),
        "64 tokens": lambda: product(two, tile=(128, 64, 1), warps=8, stages=3),
        "codebook as stored": lambda: product([(1, 3, 1, False, 1)], tile=(32, 1, 8)),
        "codebook, 2 bits": lambda: product([(1, 2, 1, False, 3)], tile=(256, 8, 1), stages=3),
        "codebook": lambda: product([(1, 3, 1, False, 3)], tile=(256, 8, 1), stages=3),
        "codebook, 4 bits": lambda: product([(1, 4, 1, False, 3)], tile=(256, 8, 1), stages=3),
        "codebook, odd width": lambda: product([(1, 4, 1, False, 4)], "fp16", tile=(256, 16, 1), stages=3),
        "codebook and mx": lambda: product([(1, 3, 1, False, 0), (2, 4, 32, False, 2), (2, 6, 32, True, 0)]),
        "groups of 32": lambda: product([(0, 2, 32, False, 2), (0, 5, 24, True, 0)]),
        "eight bits": lambda: product([(0, 8, 128, True, 2), (0, 7, 0, False, 1)]),
        "fp32": lambda: product([(0, 2, 128, False, 2), (1, 2, 0, True, 0)], "fp32"),
        "dense": lambda: dense(
            [(0, 3, 128, False, 1), (1, 3, 1, True, 2), (2, 6, 32, False, 0), (0, 3, 24, True, 0)], "bf16"
        ),
        "outliers": lambda: outlier("bf16"),
        "attention": attention,
    }


# Weights of a tile per thread and pass through the loop: 256 rows and chunks, 128 columns, 4 warps.
TILE = 256 * 128 // 128


def measured(compiled: Any) -> dict[str, Any]:
    """`resources` and `inner_loop`, which means something where a tile is `TILE`."""
    whole, integer = inner_loop(compiled, TILE)
    return resources(compiled) | {"per_weight": round(whole, 2), "integer_per_weight": round(integer, 2)}


if __name__ == "__main__":
    chosen = set(sys.argv[1:])
    print(json.dumps({name: measured(c()) for name, c in every().items() if not chosen or name in chosen}))
