"""`Sizes(skeleton, ...).of(layouts)`: the bytes of an output folder, exactly, from headers alone.

Every file is predicted in the form in which `writer.assemble` writes it. Safetensors headers are spelled out, since
their offsets have more digits in larger files. report.json holds times, which cannot be predicted: it gets a reserve
and is padded with blanks to fill it, so that the folder takes exactly what was promised. `folder_bytes` does the same
for a finished folder.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitquilt.core.packing import TensorSpec, tensor_specs
from bitquilt.core.types import Layout
from bitquilt.model.config import read_layouts, with_quantization
from bitquilt.model.replace import table_path
from bitquilt.model.structure import Skeleton
from bitquilt.model.tensor_info import TensorInfo
from bitquilt.stream.writer import rest_shards

# The order of types in which safetensors writes tensors, the last one first; tensors of one type go by name.
_TYPES = "BOOL F4 F6_E2M3 F6_E3M2 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64"
_RANK = {name: i for i, name in enumerate(_TYPES.split())}
_SPELLED = {
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint32: "U32",
    torch.int64: "I64",
}
# A layer in report.json is a dozen numbers of up to 24 characters with their names, and room for an event.
_REPORT_BYTES, _REPORT_LAYER_BYTES = 12_288, 640
_MOST_PARTS = 7  # of a table: one for each width from 2 to 8

Stored = tuple[str, str, tuple[int, ...], int]
"""Name, type in the spelling of safetensors, shape and bytes of a tensor."""


@dataclass(frozen=True)
class FolderSize:
    """Bytes of an output folder: `tensors` is the safetensors files, `small` the other files, `report` the reserve
    for report.json."""

    tensors: int
    small: int
    report: int

    @property
    def total(self) -> int:
        """The whole folder."""
        return self.tensors + self.small + self.report


def file_bytes(tensors: Iterable[Stored], form: str = "pt") -> int:
    """Bytes of a safetensors file written by this package, which names the format `form`."""
    header: dict[str, Any] = {"__metadata__": {"format": form}}
    offset = 0
    for name, dtype, shape, nbytes in sorted(tensors, key=lambda t: (-_RANK[t[1]], t[0].encode())):
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-text // 8) * 8 + offset


def layout_tensors(name: str, layout: Layout) -> list[Stored]:
    """Stored tensors of the layer `name`."""
    specs = tensor_specs(layout)
    return [(f"{name}.{key}", spelled(spec), spec.shape, spec.nbytes) for key, spec in specs.items()]


def spelled(spec: TensorSpec) -> str:
    """Type of a tensor in the spelling of safetensors."""
    return _SPELLED[spec.dtype]


class Sizes:
    """The parts of a folder's size that do not depend on the plan, added up once; `of` adds the rest."""

    def __init__(
        self,
        skeleton: Skeleton,
        layers: Sequence[str],
        *,
        plan_text: int,
        digits: int,
        tables: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """`layers`: paths that are quantized, those of `tables` in parts left out. `plan_text`: bytes of plan.json, of
        which `digits` are bits of groups, which the report repeats. `config`: entries of config.json that differ from
        those of the source."""
        self._config = {**skeleton.checkpoint.config, **(config or {})}
        infos = skeleton.checkpoint.tensors
        replaced = {f"{name}.weight" for name in (*layers, *tables)}
        self.files: list[tuple[list[str], list[Stored]]] = []  # layers, tensors copied into their file
        for path in skeleton.blocks:
            inside = [name for name in layers if name.startswith(f"{path}.")]
            self.files.append((inside, [_stored(s, infos[s]) for s in skeleton.kept_sources(path, replaced)]))
        blocks = tuple(f"{path}." for path in skeleton.blocks)
        whole = [name for name in (*layers, *tables) if not name.startswith(blocks)]
        self.files += [([name], []) for name in whole]  # head, embedding
        self._tables = frozenset(tables)
        for names in rest_shards(skeleton, replaced):
            self.files.append(([], [_stored(name, infos[name]) for name in names]))
        self._copied = [file_bytes(kept) if not inside else 0 for inside, kept in self.files]
        self._small = plan_text + sum(skeleton.checkpoint.companion_bytes().values())
        reported = [*layers, *(name for name in tables for _ in range(_MOST_PARTS))]
        self.report = _REPORT_BYTES + digits + sum(map(len, reported)) + _REPORT_LAYER_BYTES * len(reported)

    def of(self, layouts: Mapping[str, Layout]) -> FolderSize:
        """Return the size of the folder with these layouts of all layers."""
        parts: dict[str, list[str]] = {name: [] for name in self._tables}
        for name, layout in layouts.items():
            if layout.of_rows:
                parts[table_path(name)].append(name)
        total = 0
        weight_map: dict[str, str] = {}
        for number, ((inside, kept), copied) in enumerate(zip(self.files, self._copied, strict=True), start=1):
            stored = kept
            size = copied
            if inside:
                own = [name for path in inside for name in parts.get(path, [path])]
                stored = [*kept, *(item for name in own for item in layout_tensors(name, layouts[name]))]
                size = file_bytes(stored)
            total += size
            shard = f"model-{number:05d}-of-{len(self.files):05d}.safetensors"
            # the order of the entries does not change the length
            weight_map |= {item[0]: shard for item in stored}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        config = with_quantization(self._config, layouts)
        return FolderSize(total, self._small + json_bytes(index) + json_bytes(config), self.report)


def folder_bytes(skeleton: Skeleton, folder: Path, plan: Mapping[str, Any]) -> int:
    """Promised bytes of the finished checkpoint in `folder`, including its report."""
    config = json.loads((folder / "config.json").read_text())
    return promised_bytes(skeleton, read_layouts(config), plan, config)


def promised_bytes(
    skeleton: Skeleton, layouts: Mapping[str, Layout], plan: Mapping[str, Any], config: Mapping[str, Any]
) -> int:
    """Bytes of the folder with these layouts and this plan.json; `config`: see `Sizes`."""
    layers = [name for name, layout in layouts.items() if not layout.of_rows]
    tables = list(dict.fromkeys(table_path(name) for name, layout in layouts.items() if layout.of_rows))
    sizes = Sizes(skeleton, layers, plan_text=json_bytes(plan), digits=_digits(plan), tables=tables, config=config)
    return sizes.of(layouts).total


def _digits(plan: Mapping[str, Any]) -> int:
    return sum(len(entry["bits"]) for entry in plan["layers"].values())


def json_bytes(value: Any) -> int:
    """Bytes of a value in the form in which `workdir.write_json` writes it, indented by one blank.

    The indents are counted, because Python's encoder is ten times slower with an indent and a search over 560 layers
    asks eight times.
    """
    return len(json.dumps(value, separators=(",", ": "))) + _indents(value, 0) + 1


def _indents(value: Any, depth: int) -> int:
    """Characters of the line breaks before each item and before the closing bracket, each with its indent."""
    if not isinstance(value, (Mapping, list, tuple)) or not value:
        return 0
    items = value.values() if isinstance(value, Mapping) else value
    inside = sum(_indents(item, depth + 1) for item in items if isinstance(item, (Mapping, list, tuple)))
    return len(value) * (2 + depth) + 1 + depth + inside


def _stored(name: str, info: TensorInfo) -> Stored:
    return name, info.dtype, info.shape, info.nbytes
