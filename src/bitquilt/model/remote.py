"""Headers of a model on the hub: `open_headers` returns a `Checkpoint` that can be planned but not read.

It fetches config.json, the safetensors headers (by range requests) and the list of files with their sizes.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from bitquilt.core.json_files import read_json
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import DOWNLOADED, Checkpoint, is_companion, open_checkpoint, read_format
from bitquilt.model.config import refuse_endless
from bitquilt.model.encoded.stated_format import SIDE_FILES
from bitquilt.model.safety import refuse_hub_kernels
from bitquilt.model.tensor_info import TensorInfo


@dataclass(frozen=True, eq=False)
class RemoteCheckpoint(Checkpoint):
    """A `Checkpoint` whose folder has no weights; the hub lists `companion_sizes`."""

    companion_sizes: dict[str, int]

    def companion_bytes(self) -> dict[str, int]:
        """Bytes of the companions by name."""
        return self.companion_sizes


def open_headers(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a local folder, or the headers of a hub id such as `org/name`.

    Raises UserError as `open_checkpoint` does, and for a repository without safetensors.
    """
    name = str(source)
    if Path(source).is_dir() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return open_checkpoint(source)
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
        SafetensorsParsingError,
    )
    from huggingface_hub.hf_api import RepoFile

    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        api = HfApi(endpoint=endpoint)
        config = Path(hf_hub_download(name, "config.json", revision=revision, endpoint=endpoint))
        metadata = api.get_safetensors_metadata(name, revision=revision)
        listed = [f for f in api.list_repo_tree(name, revision=revision) if isinstance(f, RepoFile)]
        for side_file in {f.path for f in listed} & set(SIDE_FILES):
            hf_hub_download(name, side_file, revision=revision, endpoint=endpoint)
    except RepositoryNotFoundError:
        raise UserError(
            f"{name!r} is neither a folder nor a hub repository (private ones need `hf auth login`)"
        ) from None
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise UserError(
            f"{name} has no readable safetensors on the hub ({error}); wanted a model saved as such"
        ) from None
    except LocalEntryNotFoundError as error:
        raise UserError(f"no folder at {name!r}, and asking the hub for it failed: {error}") from None
    except EntryNotFoundError:
        raise UserError(f"{name} has no config.json on the hub: wanted a Hugging Face model") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"no folder at {name!r}, and asking the hub for it failed: {error}") from None
    tensors = {
        tensor: TensorInfo(Path(file), tuple(info.shape), info.dtype, info.data_offsets[1] - info.data_offsets[0])
        for file, header in metadata.files_metadata.items()
        for tensor, info in header.tensors.items()
    }
    try:
        values = read_json(config)
    except ValueError as error:
        raise UserError(f"config.json of {name} is not JSON: {error}") from None
    refuse_hub_kernels(values, config)
    refuse_endless(values, len(tensors), f"config.json of {name}")
    companions = {f.path: f.size for f in listed if _fetched(f.path) and is_companion(f.path)}
    seen, source_format = read_format(config.parent, values, tensors)
    return RemoteCheckpoint(config.parent, name, values, seen, companions, source=source_format)


def _fetched(path: str) -> bool:
    return "/" not in path and any(Path(path).match(pattern) for pattern in DOWNLOADED)
