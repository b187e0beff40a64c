"""`ExportedSize(...).of(layouts)`: the bytes of the folder that `bitquilt export` makes of a plan, exactly.

`settings` and `half_type` are what an export takes from the model besides its weights.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn

from bitquilt.core.types import Layout
from bitquilt.engines.engine import Container, Engine, ModelSettings
from bitquilt.engines.gguf_engine import GgufEngine, GgufTensor
from bitquilt.model.checkpoint import Checkpoint
from bitquilt.model.config import without_quantization
from bitquilt.model.structure import Skeleton
from bitquilt.model.tensor_info import TensorInfo
from bitquilt.ops.block_types import BLOCK_TYPES
from bitquilt.planning.folder_size import Sizes, Stored, file_bytes, json_bytes, layout_tensors, spelled


def settings(skeleton: Skeleton, quantized: Collection[str], changed: Mapping[str, Any] | None = None) -> ModelSettings:
    """Return what config.json is made of; `quantized`: paths of layers, `changed`: entries that differ in our own."""
    known = skeleton.model.config.to_dict()
    known.pop("_name_or_path", None)
    stated = {**without_quantization(skeleton.checkpoint.config), **(changed or {})}
    plain = tuple(
        name
        for name, module in skeleton.model.named_modules()
        if isinstance(module, nn.Linear) and name not in quantized and f"{name}.weight" in skeleton.parameters.values()
    )
    return ModelSettings(stated, without_quantization(known), plain)


def half_type(checkpoint: Checkpoint, quantized: Collection[str]) -> torch.dtype | None:
    """Return the 16-bit type of a model's tensors outside the layers `quantized`; None for a model in 32 bits."""
    kinds = {info.dtype for name, info in checkpoint.tensors.items() if name.rpartition(".")[0] not in quantized}
    return torch.bfloat16 if "BF16" in kinds else torch.float16 if "F16" in kinds else None


def gguf_entries(
    held: Mapping[str, Container], layouts: Mapping[str, Layout], plain: Mapping[str, TensorInfo]
) -> list[GgufTensor]:
    """Return the tensors of a GGUF file: the layers `held`, and those of `plain` that belong to none of them."""
    types = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    layers = [
        GgufTensor(f"{path}.weight", (layouts[path].out_features, layouts[path].in_features), BLOCK_TYPES[form.kind])
        for path, form in held.items()
    ]
    inside = {name for path, layout in layouts.items() for name, *_ in layout_tensors(path, layout)}
    rest = [GgufTensor(n, info.shape, None, types[info.dtype]) for n, info in plain.items() if n not in inside]
    return layers + rest


@dataclass(frozen=True, eq=False)
class ExportedSize:
    """Exports of a model to an engine. `sizes`: our own folder; `changed`: entries of config.json that differ from the
    source's."""

    skeleton: Skeleton
    engine: Engine
    sizes: Sizes
    changed: Mapping[str, Any]

    def of(self, layouts: Mapping[str, Layout], held: Mapping[str, Container]) -> int:
        """Return the bytes of the whole folder with layers of the forms `held`."""
        if isinstance(self.engine, GgufEngine):
            return self._gguf_bytes(layouts, held)
        dtype = half_type(self.skeleton.checkpoint, layouts) or torch.float16
        total, tensors, count = 0, 0, len(self.sizes.files)
        weight_map: dict[str, str] = {}
        for number, (inside, kept) in enumerate(self.sizes.files, start=1):
            stored: list[Stored] = list(kept)
            for path in inside:
                specs = self.engine.layer_specs(layouts[path], dtype, held[path])
                stored += [(f"{path}.{key}", spelled(spec), spec.shape, spec.nbytes) for key, spec in specs.items()]
            total += file_bytes(stored, self.engine.metadata)
            tensors += sum(nbytes for *_, nbytes in stored)
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            weight_map |= {name: file for name, *_ in stored}
        index = {"metadata": {"total_size": tensors}, "weight_map": weight_map}
        config = self.engine.config(self._settings(tuple(layouts)), held)
        return total + json_bytes(index) + json_bytes(config) + self._companions

    def _gguf_bytes(self, layouts: Mapping[str, Layout], held: Mapping[str, Container]) -> int:
        assert isinstance(self.engine, GgufEngine)
        kept = {name: self.skeleton.checkpoint.tensors[name] for _, found in self.sizes.files for name, *_ in found}
        entries = gguf_entries(held, layouts, kept)
        file = self.engine.file(self._settings(tuple(layouts)), self.skeleton.checkpoint.folder)
        if not self._gguf_head:
            self._gguf_head.append(file.head_bytes(entries))
        return file.nbytes(entries, self._gguf_head[0])

    @cached_property
    def _gguf_head(self) -> list[int]:
        """Bytes that precede the tensors, once they are known."""
        return []

    @cache  # noqa: B019 - one planner, one set of layers
    def _settings(self, quantized: tuple[str, ...]) -> ModelSettings:
        return settings(self.skeleton, quantized, self.changed)

    @cached_property
    def _companions(self) -> int:
        return sum(self.skeleton.checkpoint.companion_bytes().values())
