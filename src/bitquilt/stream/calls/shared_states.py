"""`SharedStates`: keys and values that a block leaves for later blocks in a mapping which all of them receive.

transformers fills a `KVSharingDict` this way in Gemma 3n and 4, whose last blocks attend with the keys and values of
earlier ones. `learn_shared` runs the blocks without weights, on the meta device, to see which of them write and read
which entry; `SharedStates.given` and `taken` then fill the mapping before a block and empty it afterwards.
"""

import copy
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from bitquilt.errors import UserError
from bitquilt.model.structure import Skeleton
from bitquilt.stream.calls.columns import TokenTensor, token_tensor
from bitquilt.stream.calls.recording import Heard
from bitquilt.stream.devices import to_device

Entries = Mapping[Any, tuple[int, ...]]
"""Key in the mapping -> numbers of the carried tensors of its entry."""
_META = torch.device("meta")


def is_shared(value: object) -> bool:
    """Whether an argument is an empty mapping that blocks fill for each other."""
    return isinstance(value, UserDict) and not value


@dataclass(frozen=True)
class SharedStates:
    """The mapping's class, and by block the entries that it reads and writes."""

    kind: type
    reads: tuple[Entries, ...]
    writes: tuple[Entries, ...]

    def given(self, i: int, carried: Mapping[int, Tensor]) -> Any:
        """Return the mapping that block i receives."""
        mapping = self.kind()
        for key, numbers in self.reads[i].items():
            mapping[key] = tuple(carried[k] for k in numbers)
        return mapping

    def taken(self, i: int, mapping: Any) -> dict[int, Tensor]:
        """Return the carried tensors, by number, that block i left in the mapping."""
        return {k: t for key, numbers in self.writes[i].items() for k, t in zip(numbers, mapping[key], strict=True)}


class _WatchedState(UserDict[Any, Any]):
    """A mapping that keeps the keys that are read and written."""

    def __init__(self, *args: Any) -> None:
        self.read, self.written = dict[Any, None](), dict[Any, None]()
        super().__init__(*args)

    def __getitem__(self, key: Any) -> Any:
        self.read.setdefault(key)
        return super().__getitem__(key)

    def __setitem__(self, key: Any, item: Any) -> None:
        self.written.setdefault(key)
        super().__setitem__(key, item)


@dataclass(eq=False)
class _Seen:
    """What one pass on the meta device shows: keys read by block, and entries written by block."""

    reads: list[tuple[Any, ...]]
    writes: list[dict[Any, tuple[Tensor, ...]]]


def learn_shared(skeleton: Skeleton, small: Sequence[Heard], first: int) -> tuple[SharedStates, list[TokenTensor]]:
    """Return how blocks share, and their carried tensors, which are numbered from `first`.

    `small`: how the model calls its blocks for ids of `SMALL_SHAPES`. Raises UserError where it cannot be seen.
    """
    kind = next(type(leaf) for leaf in small[0].leaves(0) if is_shared(leaf))
    seen = [_pass_through(skeleton, heard) for heard in small]
    tensors: list[TokenTensor] = []
    latest: dict[Any, tuple[int, ...]] = {}
    reads: list[Entries] = []
    writes: list[Entries] = []
    for i, path in enumerate(skeleton.blocks):
        reads.append({key: latest[key] for key in seen[0].reads[i] if key in latest})
        written: dict[Any, tuple[int, ...]] = {}
        for key in seen[0].writes[i]:
            numbers = []
            for pair in zip(*(one.writes[i][key] for one in seen), strict=True):
                if (tensor := token_tensor(pair)) is None:
                    raise _unseen(path, kind, f"its entry {key!r} has no axis of tokens")
                numbers.append(first + len(tensors))
                tensors.append(tensor)
            written[key] = tuple(numbers)
        latest |= written
        writes.append(written)
    return SharedStates(kind, tuple(reads), tuple(writes)), tensors


def _pass_through(skeleton: Skeleton, heard: Heard) -> _Seen:
    """Run the blocks on the meta device, each with the mapping as those before it left it."""
    found, entries = _Seen([], []), dict[Any, Any]()
    hidden = heard.inputs[0].to(_META)
    for path, call in zip(skeleton.blocks, heard.calls, strict=True):
        mapping = _WatchedState()
        mapping.data |= entries
        args, kwargs = tree_map(lambda leaf, m=mapping: m if is_shared(leaf) else leaf, to_device(call, _META))
        block = copy.deepcopy(skeleton.model.get_submodule(path)).to(_META)
        try:
            with torch.no_grad():
                output = block(hidden, *args, **kwargs)
        except Exception as error:
            raise _unseen(path, _WatchedState, f"{type(error).__name__}: {error}") from error
        hidden = output if isinstance(output, Tensor) else output[0]
        entries = dict(mapping.data)
        written = {key: tuple(entries[key]) for key in mapping.written}
        if not all(isinstance(t, Tensor) for t in _flat(written)):
            raise _unseen(path, _WatchedState, "it holds more than tensors")
        found.reads.append(tuple(mapping.read))
        found.writes.append(written)
    return found


def _flat(entries: Mapping[Any, tuple[Any, ...]]) -> Iterator[Any]:
    return (item for entry in entries.values() for item in entry)


def _unseen(path: str, kind: type, reason: str) -> UserError:
    return UserError(
        f"block {path} receives a mapping ({kind.__name__}) that blocks fill for later ones, and what it leaves there "
        f"cannot be carried on ({reason}): this architecture cannot be streamed block by block"
    )
