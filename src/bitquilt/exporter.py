"""`export` writes a checkpoint in the files of another engine, and compares every weight with the checkpoint's."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from bitquilt.core.packing import not_finite, unpack
from bitquilt.core.types import Layout
from bitquilt.engines.engine import Container, Engine
from bitquilt.engines.gguf_engine import GgufEngine
from bitquilt.engines.known import engine_named
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import INDEX_NAME, Checkpoint, open_checkpoint
from bitquilt.model.config import QUANT_METHOD, read_layouts
from bitquilt.model.linear import QuantizedLinear, check_values
from bitquilt.model.structure import Skeleton, open_skeleton
from bitquilt.model.ties import tied_layers
from bitquilt.ops.bits import unpack_bits
from bitquilt.planning.exported_size import gguf_entries, half_type, settings
from bitquilt.planning.folder_size import layout_tensors
from bitquilt.report.facts import check_hashes, read_facts
from bitquilt.report.run_facts import section
from bitquilt.stream.workdir import write_json
from bitquilt.stream.writer import check_output, check_room, publish, reserved


@dataclass(frozen=True)
class Difference:
    """The largest difference of a weight in the layer `layer`; `relative`: its share of the layer's largest weight."""

    absolute: float
    relative: float
    layer: str


@dataclass(frozen=True)
class Exported:
    """A finished export. `layers`: the form of each by path; `wider`: layers whose codes take more bits than before.

    `window`: the sliding window that the model has and the engine ignores, so that longer texts differ; else None.
    `bytes`: all files. `difference`: the largest between a weight that the engine reads and the checkpoint's.
    """

    folder: Path
    engine: str
    layers: Mapping[str, Container]
    wider: tuple[str, ...]
    window: int | None
    bytes: int
    difference: Difference


@dataclass(frozen=True, eq=False)
class _Source:
    """A checkpoint that the engine can hold: its layers by path as they are, and as they will be."""

    skeleton: Skeleton
    layouts: Mapping[str, Layout]
    held: Mapping[str, Container]

    @property
    def checkpoint(self) -> Checkpoint:
        return self.skeleton.checkpoint


def export(folder: str | Path, out: str | Path, to: str = "mlx") -> Exported:
    """Write the checkpoint in `folder`, or of a hub id, to the new folder `out` for the engine `to`.

    Every layer is read back as the engine reads it and compared with the checkpoint's. Raises UserError for a
    checkpoint that the engine cannot hold, before anything is written, and VerificationError for files whose hashes
    differ from `report.json`.
    """
    engine = engine_named(to)
    out = Path(out)
    staging = out.with_name(f".{out.name}.export")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; give another output folder, or move it away")
    check_output(out, staging)
    source = _checked(open_checkpoint(folder), engine)
    check_room(out, staging, source.checkpoint.nbytes)
    with reserved(out):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            if isinstance(engine, GgufEngine):
                difference = _write_gguf(source, engine, staging)
            else:
                difference = _write(source, engine, staging)
            size = sum(path.stat().st_size for path in staging.iterdir())
            publish(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    wider = tuple(
        path for path, held in source.held.items() if any(f.bits < held.bits for f, _ in source.layouts[path].segments)
    )
    windows = [w for w in source.skeleton.config.windows if w is not None]
    known = engine.windows is None or source.checkpoint.config["model_type"] in engine.windows
    ignored = None if known else min(windows, default=None)
    return Exported(out, to, source.held, wider, ignored, size, difference)


def _checked(checkpoint: Checkpoint, engine: Engine) -> _Source:
    """Examine everything that can be known without decoding a weight; raise as `export` does."""
    if (method := checkpoint.model_config.quantized_by) != QUANT_METHOD:
        state = "in full precision" if method is None else f"quantized by {method}"
        raise UserError(f"{checkpoint.name} is {state}; give a checkpoint that `bitquilt quantize` wrote")
    layouts = read_layouts(checkpoint.config)
    engine.check_family(checkpoint.config.get("model_type"))
    for path, layout in layouts.items():
        _check_headers(checkpoint, path, layout)
    skeleton = open_skeleton(checkpoint, layouts)
    inside = tuple(f"{block}." for block in skeleton.blocks)
    tables = [path for path in layouts if not path.startswith(inside)]
    middle = [path for path, layout in layouts.items() if engine.zeros != "free" and _middle(checkpoint, path, layout)]
    shapes = {path: (layout.out_features, layout.in_features) for path, layout in layouts.items()}
    held = engine.containers(layouts, middle, tied_layers(skeleton.model, shapes), tables)
    facts = read_facts(str(checkpoint.folder))
    if section(facts.run.stored, "files"):
        check_hashes(facts)
    return _Source(skeleton, layouts, held)


def _middle(checkpoint: Checkpoint, path: str, layout: Layout) -> bool:
    """Whether all zeros of a layer are half its range."""
    for i, (form, _) in enumerate(layout.segments):
        if form.grid != "uniform" or form.symmetric or form.bits == 1:
            return False
        name = f"{path}.zero_{i}"
        zeros = unpack_bits(checkpoint.read([name])[name], form.bits, layout.out_features)
        if bool((zeros != 2 ** (form.bits - 1)).any()):
            return False
    return True


def _check_headers(checkpoint: Checkpoint, path: str, layout: Layout) -> None:
    for name, dtype, shape, _ in layout_tensors(path, layout):
        info = checkpoint.tensors.get(name)
        got = "missing" if info is None else f"{list(info.shape)} {info.dtype}"
        if got != (wanted := f"{list(shape)} {dtype}"):
            again = "copy or quantize the checkpoint again"
            raise UserError(f"tensor {name} is {got}; config.json wants {wanted}; {again}")


def _write(source: _Source, engine: Engine, folder: Path) -> Difference:
    """Write all files of the export, one of weights at a time, and return the largest difference of a weight."""
    checkpoint, worst = source.checkpoint, Difference(0.0, 0.0, next(iter(source.held)))
    owner = {name: path for path, layout in source.layouts.items() for name, *_ in layout_tensors(path, layout)}
    files: dict[Path, list[str]] = {}  # in what stands for them: layers by path, other tensors by name
    for name, info in checkpoint.tensors.items():
        files.setdefault(info.file, []).append(owner.get(name, name))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(files.values(), start=1):
        written: dict[str, Tensor] = {}
        for name in dict.fromkeys(names):
            if name in source.held:
                tensors, difference = _converted(source, engine, name)
                written |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
                worst = max(worst, difference, key=lambda each: each.relative)
            else:
                written |= checkpoint.read([name])
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(written, folder / file, metadata={"format": engine.metadata})
        weight_map |= dict.fromkeys(written, file)
        total += sum(tensor.nbytes for tensor in written.values())
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", engine.config(settings(source.skeleton, source.layouts), source.held))
    for companion in checkpoint.companions():
        shutil.copyfile(companion, folder / companion.name)
    return worst


def _write_gguf(source: _Source, engine: GgufEngine, folder: Path) -> Difference:
    """Write the one file of an export to GGUF, a tensor at a time, and return the largest difference of a weight."""
    checkpoint = source.checkpoint
    found: list[Difference] = []
    entries = gguf_entries(source.held, source.layouts, checkpoint.tensors)

    def tensors() -> Iterator[Tensor]:
        for entry in entries:
            path = entry.name.removesuffix(".weight")
            if path in source.held:
                made, difference = _converted(source, engine, path)
                found.append(difference)
                yield made["weight"]
            else:
                yield checkpoint.read([entry.name])[entry.name]

    file = engine.file(settings(source.skeleton, source.layouts), checkpoint.folder)
    file.write(folder / "model.gguf", entries, tensors())
    return max(found, key=lambda each: each.relative)


def _converted(source: _Source, engine: Engine, path: str) -> tuple[dict[str, Tensor], Difference]:
    """Tensors of a layer by name, and their largest difference from the checkpoint's."""
    layout, held = source.layouts[path], source.held[path]
    found = source.checkpoint.read(name for name, *_ in layout_tensors(path, layout))
    stored = {name.removeprefix(f"{path}."): tensor for name, tensor in found.items()}
    check_values(stored, layout, path)
    dtype = half_type(source.checkpoint, source.layouts) or stored["scale_0"].dtype
    tensors = engine.converted(unpack(stored, layout, path), held, dtype)
    if bad := not_finite(tensors):
        raise UserError(f"{path}.{bad[0]} leaves the range of {dtype}, the type of the model; leave the layer out")
    ours = QuantizedLinear.from_tensors(stored, layout).dequantize()
    apart = float((engine.decode(tensors, held) - ours).abs().max())
    return tensors, Difference(apart, apart / max(float(ours.abs().max()), 1e-30), path)
