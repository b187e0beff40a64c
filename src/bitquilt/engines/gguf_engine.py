"""GGUF files for llama.cpp, Ollama and LM Studio: `GGUF`, and `GgufFile`, the one file that an export writes.

Layers in llama.cpp's own blocks (`--for gguf`) are taken over as they are. Uniform steps of up to 7 bits in groups of a
multiple of 32 columns go to Q4_1, Q5_1 and Q8_0.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitquilt.core.packing import TensorSpec
from bitquilt.core.types import Layout, QuantizedWeight
from bitquilt.engines.affine import affine, integers
from bitquilt.engines.engine import Container, Engine, ModelSettings
from bitquilt.engines.gguf_model import ARCHITECTURES, GgufModel, array, library
from bitquilt.ops.block_types import BLOCK_TYPES, BlockScales, BlockType, file_bytes, write_heads

_PAD = 32  # bytes to which tensors are aligned
_UNIFORM = {4: "q4_1", 5: "q5_1", 7: "q8_0"}


@dataclass(frozen=True)
class GgufEngine(Engine):
    """An engine whose export is one GGUF file."""

    def container(self, layout: Layout, middle: bool = False) -> Container:
        """Return the layer's own block type, or the smallest that holds its uniform steps; see `Engine.container`."""
        forms = [form for form, _ in layout.segments]
        if len(forms) == 1 and forms[0].grid in BLOCK_TYPES and layout.ordering == "identity" and not layout.outliers:
            kind = BLOCK_TYPES[forms[0].grid]
            if layout.in_features % kind.columns:
                raise ValueError(
                    f"its {layout.in_features} inputs are no multiple of 32, the smallest block of {self.title}; leave "
                    "the layer out with --skip"
                )
            return Container(kind.bits, kind.columns, kind=kind.name)
        Engine.container(self, layout, middle)  # refuses what is not uniform
        own = max(form.bits for form in forms)
        kind_name = next((name for bits, name in _UNIFORM.items() if own <= bits), None)
        if kind_name is None:
            raise ValueError(f"its uniform steps have {own} bits, {self.title} holds 7; quantize with --for gguf")
        return Container(BLOCK_TYPES[kind_name].bits, 32, kind=kind_name)

    def converted(self, weight: QuantizedWeight, held: Container, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the rows of the layer as they stand in a file, in the order of our rows."""
        kind = BLOCK_TYPES[held.kind]
        if weight.segments[0].format.grid == held.kind:
            return {"weight": file_bytes(weight.segments[0].codes, weight.segments[0].scale, kind)}
        steps = affine(weight, 32)
        if kind.low:
            codes, d, low = steps.codes, steps.scale.half(), steps.bias.half()
        else:
            wide, scale, zero = integers(steps)
            codes, d, low = (wide - zero.repeat_interleave(32, dim=1) + 128).to(torch.uint8), scale.half(), None
        ones = torch.ones(d.shape, dtype=torch.int16)
        return {"weight": file_bytes(codes, write_heads(BlockScales(d, ones, low), kind), kind)}

    def file(self, model: ModelSettings, folder: Path) -> "GgufFile":
        """The file of a model whose tokenizer is in `folder`."""
        return GgufFile(GgufModel(model, folder))


def _decode(stored: Mapping[str, Tensor], held: Container) -> Tensor:
    """The weight fp32 `[out, in]` as `gguf` reads it."""
    gguf = library()
    return torch.from_numpy(gguf.dequantize(stored["weight"].numpy(), BLOCK_TYPES[held.kind].ggml))


def _specs(shape: tuple[int, int], held: Container, dtype: torch.dtype) -> dict[str, TensorSpec]:
    kind = BLOCK_TYPES[held.kind]
    return {"weight": TensorSpec((shape[0], shape[1] // kind.columns * kind.block_bytes), torch.uint8)}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file. `name` as in the source, `shape` `[out, in]` or `[n]`; `kind`: its blocks, None where it is
    of `dtype` instead."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType | None
    dtype: torch.dtype = torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes in the file without padding."""
        count = torch.Size(self.shape).numel()
        if self.kind is not None:
            return count // self.kind.columns * self.kind.block_bytes
        return count * (4 if len(self.shape) == 1 else self.dtype.itemsize)


@dataclass(frozen=True)
class GgufFile:
    """The file of `model`."""

    model: GgufModel

    def write(self, path: Path, entries: Sequence[GgufTensor], tensors: Iterator[Tensor] | None) -> None:
        """Write the settings and the `tensors` of `entries`, which come one by one; None: what precedes them."""
        gguf = library()
        writer = gguf.GGUFWriter(path, self.model.architecture)
        self.model.write_settings(writer)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        divisors = self.model.rotary_divisors
        if divisors is not None:
            writer.add_tensor_info("rope_freqs.weight", divisors.shape, np.dtype(np.float32), divisors.nbytes)
        for entry in entries:
            kind, wide = self._type(entry)
            shape = (*entry.shape[:-1], entry.nbytes // (torch.Size(entry.shape[:-1]).numel() * wide.itemsize))
            writer.add_tensor_info(self.model.name(entry.name), shape, wide, entry.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None and tensors is not None:
            writer.write_tensor_data(array(divisors))
        for entry, tensor in zip(entries, tensors or (), strict=tensors is not None):
            ready = self.model.ordered if entry.kind is not None else self.model.plain
            writer.write_tensor_data(array(ready(entry.name, tensor)))
        writer.close()

    def _type(self, entry: GgufTensor) -> tuple[object, np.dtype[Any]]:
        """The type of a tensor in the file, and that of the array that holds it."""
        kinds = library().GGMLQuantizationType
        if entry.kind is not None:
            return kinds(entry.kind.ggml), np.dtype(np.uint8)
        if len(entry.shape) == 1 or entry.dtype == torch.float32:
            return kinds.F32, np.dtype(np.float32)
        half = entry.dtype == torch.float16
        return (kinds.F16, np.dtype(np.float16)) if half else (kinds.BF16, np.dtype(np.uint8))

    def nbytes(self, entries: Sequence[GgufTensor], head: int | None = None) -> int:
        """Bytes of the file; `head`: bytes that precede the tensors, where they are known."""
        divisors = self.model.rotary_divisors
        sizes = [*(entry.nbytes for entry in entries), 0 if divisors is None else divisors.nbytes]
        return (head or self.head_bytes(entries)) + sum(-(-size // _PAD) * _PAD for size in sizes)

    def head_bytes(self, entries: Sequence[GgufTensor]) -> int:
        """Bytes that precede the tensors: they depend on names and shapes, not on types."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "head.gguf"
            self.write(path, entries, None)
            return -(-os.path.getsize(path) // _PAD) * _PAD


GGUF = GgufEngine(
    title="GGUF",
    bits=(2, 3, 4, 5, 6, 8),
    group_sizes=(32,),
    families=tuple(sorted(ARCHITECTURES)),
    windows=("gemma2", "gemma3_text", "phi3"),
    zeros="free",
    alike="none",
    tables=True,
    zero_rule="blocks",
    tensors=lambda weight, held, dtype: {},
    decode=_decode,
    specs=_specs,
    config=lambda model, layers: {},
    metadata="",
)
