"""Checkpoints on disk: `open_checkpoint` returns a `Checkpoint`, whose tensors are read on demand."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitquilt.core.json_files import read_json
from bitquilt.errors import UserError
from bitquilt.model.config import QUANT_METHOD, ModelConfig, read_config, refuse_endless
from bitquilt.model.encoded.recognize import recognize
from bitquilt.model.encoded.source_format import SourceFormat
from bitquilt.model.encoded.stated_format import SIDE_FILES, read_stated
from bitquilt.model.hashes import file_sha256
from bitquilt.model.safety import check_inside, refuse_hub_kernels
from bitquilt.model.tensor_info import TensorInfo

_SINGLE = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NEVER_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".lock"}
# These describe the source, not the quantized model.
_OWN_FILES = ("config.json", INDEX_NAME, "plan.json", "report.json", "evaluation.json", "README.md", *SIDE_FILES)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DOWNLOADED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder of safetensors with a config.json; no tensor is in memory until `read`.

    `tensors` are those of the model in full precision. Where another tool quantized it, `source` says how the files
    hold them, and they are decoded as they are read.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    source: SourceFormat = field(default_factory=SourceFormat, kw_only=True)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors by name, each a copy of its own. Raises UserError for a damaged file."""
        asked, encoded = list(names), self.source.weights
        infos = {name: self.tensors[name] for name in asked if name not in encoded}
        for name in asked:
            if name in encoded:
                infos |= {part: encoded[name].infos[role] for role, part in encoded[name].names.items()}
        stored = _read_stored(infos)
        found = {}
        for name in asked:
            if name in encoded:
                parts = {role: stored.pop(part) for role, part in encoded[name].names.items()}
                found[name] = self._decoded(name, parts)
            else:
                found[name] = stored[name]
        return found

    def _decoded(self, name: str, parts: dict[str, Tensor]) -> Tensor:
        try:
            decoded = self.source.weights[name].encoding.decode(parts)
        except UserError as error:
            raise UserError(f"{name} in {self.folder}: {error}") from None
        except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:  # shapes that do not fit
            raise UserError(
                f"{name} in {self.folder} cannot be decoded: its tensors do not fit together ({error}); download the "
                "model again"
            ) from None
        return decoded.to(DTYPES[self.tensors[name].dtype]).contiguous()

    def refuse_undecodable(self) -> None:
        """Raise UserError if the weights are quantized in a way that cannot be decoded."""
        if self.source.refusal is not None:
            raise UserError(f"{self.name}: {self.source.refusal}")

    @property
    def model_config(self) -> ModelConfig:
        """The sizes that config.json states."""
        return read_config(self.config)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, decoded ones included."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as the files hold them."""
        return self.nbytes + self.source.nbytes - sum(self.tensors[name].nbytes for name in self.source.weights)

    @property
    def weights(self) -> int:
        """Number of stored values, the model's parameters."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    def companions(self) -> list[Path]:
        """Small files of the model that are copied to the output: tokenizer, generation settings, custom code."""
        return sorted(path for path in self.folder.iterdir() if path.is_file() and is_companion(path.name))

    def companion_bytes(self) -> dict[str, int]:
        """Bytes of the companions by name."""
        return {path.name: path.stat().st_size for path in self.companions()}

    def fingerprint(self) -> str:
        """sha256 over the config and the hash of every file of weights."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        files = {info.file for info in self.tensors.values()}
        files |= {info.file for weight in self.source.weights.values() for info in weight.infos.values()}
        if self.source.weights:
            files |= {self.folder / name for name in SIDE_FILES if (self.folder / name).is_file()}
        for file in sorted(files):
            digest.update(f"{file.name}:{file_sha256(file)}".encode())
        return digest.hexdigest()

    def companion_hashes(self) -> dict[str, str]:
        """sha256 of the companions by name."""
        return {path.name: file_sha256(path) for path in self.companions()}


def is_companion(name: str) -> bool:
    """Whether a file of this name in a model's folder is copied to the output."""
    return Path(name).suffix not in _NEVER_COPIED and name not in _OWN_FILES and not name.startswith(".")


def open_checkpoint(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a local folder, or download the safetensors and small files of a hub id such as `org/name` first.

    Raises UserError if there is no such folder or repository, no config.json, no safetensors (pickled weights are
    refused), or if a file is truncated, an indexed tensor is missing, a file is outside the folder, two files hold
    different values of one tensor, or the config asks for code from the hub.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(str(source), revision)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UserError(f"{folder} has no config.json: wanted a Hugging Face model folder")
    check_inside(folder, (path for path in folder.iterdir() if _is_read(path)))
    config = _read_object(config_path)
    refuse_hub_kernels(config, config_path)
    stored = _tensor_table(folder)
    refuse_endless(config, len(stored), config_path)
    tensors, encoded = read_format(folder, config, stored)
    return Checkpoint(folder, str(source), config, tensors, source=encoded)


def read_format(
    folder: Path, config: Mapping[str, Any], tensors: dict[str, TensorInfo]
) -> tuple[dict[str, TensorInfo], SourceFormat]:
    """Return the tensors of the model in full precision, and how the files of `folder` hold them."""
    if read_config(config).quantized_by == QUANT_METHOD:
        return tensors, SourceFormat()
    return recognize(tensors, read_stated(folder, config))


def _download(source: str, revision: str | None) -> Path:
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"no folder at {source!r}, and it is not a hub id (org/name); give the path of a model folder")
    # late: half a second to import, for hub ids only
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                source, revision=revision, allow_patterns=DOWNLOADED, endpoint=os.environ.get("HF_ENDPOINT")
            )
        )
    except RepositoryNotFoundError:
        raise UserError(
            f"{source!r} is neither a folder nor a hub repository (private ones need `hf auth login`)"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(f"no folder at {source!r}, and downloading it from the hub failed: {error}") from None


def _is_read(path: Path) -> bool:
    """Whether a run may read this entry of a model's folder, or copy it."""
    return path.suffix == ".safetensors" or path.name in _OWN_FILES or is_companion(path.name)


def _tensor_table(folder: Path) -> dict[str, TensorInfo]:
    """Return the model's tensors: those of the index's files, else of model.safetensors, else of all files."""
    index_path, single = folder / INDEX_NAME, folder / _SINGLE
    indexed = _weight_map(index_path) if index_path.is_file() else None
    if indexed is not None:
        files = sorted({folder / file for file in indexed.values()})
        check_inside(folder, files)
        _refuse_second_model(single, files)
    else:  # transformers' own name first: adapters and copies in other formats may be in the folder too
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        _refuse_without_safetensors(folder)
    table: dict[str, TensorInfo] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{index_path.name} names {file.name}, which is not in {folder}; download it again")
        for name, info in _headers(file).items():
            if name in table:
                _refuse_two_values(name, table[name].file, name, file)
            table[name] = info
    if indexed is not None and (missing := sorted(indexed.keys() - table.keys())):
        raise UserError(f"{index_path.name} names tensor {missing[0]}, which is in none of the files of {folder}")
    return table


def _weight_map(path: Path) -> dict[str, str]:
    found = _read_object(path).get("weight_map")
    if not isinstance(found, dict):
        raise UserError(f"{path} has no weight_map: the file is damaged; download it again")
    for name, file in found.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise UserError(f"{path} gives {file!r} for {name}; wanted the name of a .safetensors file")
    return found


def _headers(file: Path) -> dict[str, TensorInfo]:
    found = {}
    with _open(file) as handle:
        for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            part = handle.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            found[name] = TensorInfo(file, shape, dtype, torch.Size(shape).numel() * _itemsize(dtype))
    return found


def _read_stored(infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Read tensors as the files hold them, each file opened once."""
    by_file: dict[Path, list[str]] = {}
    for name, info in infos.items():
        by_file.setdefault(info.file, []).append(name)
    found: dict[str, Tensor] = {}
    for file, members in by_file.items():
        with _open(file) as handle:
            for name in members:
                found[name] = handle.get_tensor(name).clone()
    return found


def _refuse_second_model(single: Path, files: list[Path]) -> None:
    """Raise UserError for a model.safetensors next to an index of other files: transformers would read the former."""
    if single.is_file() and single not in files:
        raise UserError(
            f"{single.parent} holds two models: {single.name}, and {len(files)} files that {INDEX_NAME} names, such as "
            f"{files[0].name}; remove the one that is out of date"
        )


def refuse_two_sources(checkpoint: Checkpoint, parameters: Mapping[str, str]) -> None:
    """Raise UserError if two tensors with different values fill one parameter; `parameters`: its name by tensor."""
    first: dict[str, str] = {}
    for source, name in parameters.items():
        # of a model on the hub, headers are all there is
        if name in first and (file := checkpoint.tensors[source].file).is_file():
            (one,), (other,) = (checkpoint.read([each]).values() for each in (first[name], source))
            _refuse_different(one, other, first[name], checkpoint.tensors[first[name]].file, source, file)
        first[name] = source


def _refuse_two_values(name: str, file: Path, other_name: str, other_file: Path) -> None:
    """Raise UserError unless both tensors are the same. They are read, because copies of one tensor are harmless."""
    with _open(file) as one, _open(other_file) as two:
        values, others = one.get_tensor(name), two.get_tensor(other_name)
    _refuse_different(values, others, name, file, other_name, other_file)


def _refuse_different(one: Tensor, other: Tensor, name: str, file: Path, other_name: str, other_file: Path) -> None:
    if one.dtype != other.dtype or not torch.equal(one, other):
        raise UserError(
            f"{file.parent} holds two values of one parameter: tensor {name} in {file.name} and tensor {other_name} in "
            f"{other_file.name}; remove the one that is out of date"
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; wanted a JSON object")
    return value


def _refuse_without_safetensors(folder: Path) -> None:
    pickled = [path.name for pattern in _PICKLED for path in folder.glob(pattern)]
    if pickled:
        raise UserError(
            f"{folder} has pickled weights only ({pickled[0]}), which run code when they are loaded; convert first: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
        )
    # Pickled files of a repository are not downloaded, so the folder does not show whether there are any.
    raise UserError(
        f"{folder} has no .safetensors file; wanted a Hugging Face model with safetensors weights. Pickled ones, which "
        "run code when they are loaded, are not downloaded from the hub; convert first: "
        "AutoModelForCausalLM.from_pretrained(name).save_pretrained(new_folder) writes safetensors"
    )


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or truncated ({error}); download or copy it again") from None


def _itemsize(dtype: str) -> int:
    bits = int("".join(c for c in dtype.split("_")[0] if c.isdigit()) or 8)
    return max(1, bits // 8)
