"""The model's own forward pass around its blocks: `BlockCalls.start` runs it up to the first, `finish` from the last.

`learn_calls` runs it with its blocks listening instead of computing and returns `BlockCalls`, which call the blocks
later as the model does: with its masks, rotary tables and positions, which differ between the blocks of some models,
and with what some blocks receive of the tokens besides the hidden states (per-layer inputs, the embedding, token ids),
which is kept in more columns of the hidden states (`calls/columns.py`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from bitquilt.errors import UserError
from bitquilt.model.structure import Skeleton, stack_starts, vocabulary_size
from bitquilt.stream.calls.columns import SMALL_SHAPES, Columns, TokenTensor, check_exact, lives, token_tensor
from bitquilt.stream.calls.crossing import Crossing, learn_closing
from bitquilt.stream.calls.recording import (
    Call,
    Extras,
    Heard,
    arguments,
    check_order,
    learn_extras,
    listen,
    names_of,
    run_model,
    shaken,
    wrap_output,
)
from bitquilt.stream.calls.shared_states import SharedStates, is_shared, learn_shared
from bitquilt.stream.devices import to_device

_PLAIN = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum)
_ENCODED = -1  # the number of the encoder's output until the others are counted
_NO_COLUMNS = Columns(TokenTensor(0, 1, (), torch.float32), (), ())
_SENTENCE = "this architecture cannot be streamed block by block"


@dataclass(frozen=True)
class _Carried:
    """Stands in a recorded call for carried tensor `number`."""

    number: int


class _Shared:
    """Stands in a recorded call for the mapping of `SharedStates`."""


@dataclass(frozen=True, eq=False)
class _Roles:
    """Which values of the calls come from the tokens: `places` of carried tensors (block, value) -> number."""

    columns: Columns
    places: Mapping[tuple[int, int], int]
    shared: SharedStates | None
    crossing: Crossing | None


@dataclass(frozen=True, eq=False)
class BlockCalls:
    """How a model calls its blocks: `by_shape`, with which arguments for inputs `[batch, tokens]`, block by block.

    `extras`: what each block returns after the hidden states; None if it returns a tensor, not a tuple.
    """

    skeleton: Skeleton
    device: torch.device
    extras: Sequence[Extras]
    by_shape: Mapping[tuple[int, ...], Sequence[Call]]
    roles: _Roles

    def width(self, i: int) -> int:
        """Columns before block i: of hidden states, and of what blocks receive besides."""
        return self.roles.columns.width(i)

    def start(self, ids: Tensor, *, gradient: bool = False) -> Tensor:
        """Return what the first block reads for ids `[batch, tokens]`: `[batch, tokens, width]`.

        Needs the outer weights in memory. `gradient`: keep the graph from what requires a gradient.
        """
        places, crossing = self.roles.places, self.roles.crossing
        heard = listen(self.skeleton, ids, self.extras, last=None if places else 0, gradient=gradient)
        carried: dict[int, Tensor] = {}
        for (i, j), number in places.items():
            carried.setdefault(number, heard.leaves(i)[j])
        if crossing is not None:
            carried[crossing.waiting] = heard.inputs[crossing.start]
        return self.roles.columns.pack(0, heard.inputs[0], carried)

    def run(self, i: int, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Call block i on `hidden` `[batch, tokens, width]` -> what block i + 1 reads, on the device of the calls."""
        columns, shared = self.roles.columns, self.roles.shared
        args, kwargs = self.by_shape[tuple(hidden.shape[:2])][i]
        own, carried = columns.unpack(i, hidden.to(self.device))
        mapping = None if shared is None else shared.given(i, carried)
        if self.roles.places or shared is not None:

            def fill(leaf: Any) -> Any:
                if isinstance(leaf, _Carried):
                    return carried[leaf.number]
                return mapping if isinstance(leaf, _Shared) else leaf

            args, kwargs = tree_map(fill, (args, kwargs))
        output = block(own, *args, **kwargs)
        if shared is not None:
            carried |= shared.taken(i, mapping)
        own = output if isinstance(output, Tensor) else output[0]
        if self.roles.crossing is not None:
            own = self.roles.crossing.after(i, own, carried)
        return columns.pack(i + 1, own, carried)

    def finish(self, ids: Tensor, hidden: Tensor, *, gradient: bool = False) -> Tensor:
        """Return the model's output, logits if it has a head, when its last block returns `hidden`.

        Needs the outer weights in memory. `gradient`: keep the graph from `hidden` to the output.
        """
        count = len(self.skeleton.blocks)
        last, _ = self.roles.columns.unpack(count, hidden)

        def returning(i: int, *_: Any, **__: Any) -> Any:
            return wrap_output(last, self.extras[i])

        output = run_model(self.skeleton, ids, {i: partial(returning, i) for i in range(count)}, gradient)
        logits = getattr(output, "logits", None)
        result: Tensor = logits if logits is not None else output[0]
        return result


def learn_calls(skeleton: Skeleton, batches: Iterable[Tensor], device: torch.device) -> BlockCalls:
    """Learn how the blocks are called for token ids shaped like those of `batches` `[batch, tokens]`.

    Needs the outer weights in memory and loads the first block. Arguments are put on `device`. Raises UserError for a
    model that needs more than token ids, does not run each block once, in order, or gives them something that depends
    on other blocks, or state that they fill.
    """
    extras: Sequence[Extras] = ()
    roles: _Roles | None = None
    found: dict[tuple[int, ...], Sequence[Call]] = {}
    for ids in batches:
        if roles is None:
            extras = learn_extras(skeleton, ids)
            check_order(skeleton, ids, extras)
            roles = _learn_roles(skeleton, ids, extras, device)
        if (shape := tuple(ids.shape)) not in found:
            found[shape] = to_device(_record_calls(skeleton, ids, extras, roles), device)
    assert roles is not None
    return BlockCalls(skeleton, device, extras, found, roles)


def _learn_roles(skeleton: Skeleton, ids: Tensor, extras: Sequence[Extras], device: torch.device) -> _Roles:
    """Find what the blocks receive of the tokens. Raises UserError where that is not a value per token."""
    heard, other = listen(skeleton, ids, extras), listen(skeleton, _others(ids), extras)
    for path, call in zip(skeleton.blocks, heard.calls, strict=True):
        _refuse_state(path, call)
    numbers: dict[int, int] = {}  # one per tensor: a model may hand the same one to many blocks
    places: dict[tuple[int, int], int] = {}
    changed, closed, encoded = _changed(skeleton, ids, extras)
    for i, path in enumerate(skeleton.blocks):
        leaves = zip(heard.leaves(i), other.leaves(i), changed.leaves(i), names_of(heard.calls[i]), strict=True)
        for j, (leaf, at_other, at_changed, name) in enumerate(leaves):
            if not _equal(leaf, at_changed):
                if encoded is None or not _equal(at_changed, encoded):
                    raise _of_other_blocks(path, name)
                places[i, j] = _ENCODED
            elif not _equal(leaf, at_other):
                places[i, j] = numbers.setdefault(id(leaf), len(numbers))
    crossing = None
    if closed is not None:
        start = stack_starts(skeleton.blocks)[1]
        if not _equal(heard.inputs[start], changed.inputs[start]):
            raise _of_other_blocks(skeleton.blocks[start], "hidden_states")
        crossing = Crossing(start, closed.to(device), len(numbers), len(numbers) + 1)
        places = {place: crossing.encoded if k == _ENCODED else k for place, k in places.items()}
    shares = any(is_shared(leaf) for leaf in heard.leaves(0))
    standard = heard.inputs[0].dim() == 3 and heard.inputs[0].shape[:2] == ids.shape
    if standard and not places and not shares:
        hidden = TokenTensor(0, 1, tuple(heard.inputs[0].shape[2:]), heard.inputs[0].dtype)
        return _Roles(Columns(hidden, (), ((),) * (len(skeleton.blocks) + 1)), {}, None, None)
    return _with_columns(skeleton, heard, extras, _Roles(_NO_COLUMNS, places, None, crossing), shares)


def _changed(
    skeleton: Skeleton, ids: Tensor, extras: Sequence[Extras]
) -> tuple[Heard, nn.Sequential | None, Tensor | None]:
    """Return a pass in which all blocks change their inputs, what closes an encoder, and its output in that pass."""
    starts = stack_starts(skeleton.blocks)
    if len(starts) == 1:
        return listen(skeleton, ids, extras, passing=shaken), None, None
    closed, heard, encoded = learn_closing(skeleton, ids, extras, starts[1])
    return heard, closed, encoded


def _with_columns(skeleton: Skeleton, heard: Heard, extras: Sequence[Extras], roles: _Roles, shares: bool) -> _Roles:
    """Give all that depends on the tokens its columns, from the block that makes it to the last that reads it."""
    vocabulary, count, crossing = vocabulary_size(skeleton.model), len(skeleton.blocks), roles.crossing
    small = [
        listen(skeleton, torch.arange(rows * length).view(rows, length) % vocabulary, extras)
        for rows, length in SMALL_SHAPES
    ]
    hidden = _token_tensor(skeleton.blocks[0], "hidden_states", [one.inputs[0] for one in small])
    carried: dict[int, TokenTensor] = {}
    made, read = dict[int, int](), dict[int, int]()
    for (i, j), number in roles.places.items():
        name = names_of(heard.calls[i])[j]
        carried[number] = _token_tensor(skeleton.blocks[i], name, [one.leaves(i)[j] for one in small])
        try:
            check_exact(name, heard.leaves(i)[j])
        except ValueError as error:
            raise UserError(f"block {skeleton.blocks[i]} receives {name!r}: {error}") from None
        made[number], read[number] = 0, i
    if crossing is not None:
        path, start = skeleton.blocks[crossing.start], crossing.start
        waiting = _token_tensor(path, "hidden_states", [one.inputs[start] for one in small])
        if waiting != hidden or crossing.encoded not in carried:
            raise UserError(f"the encoder and the decoder of {type(skeleton.model).__name__} do not fit: {_SENTENCE}")
        carried[crossing.waiting], made[crossing.waiting], read[crossing.waiting] = waiting, 0, start - 1
        made[crossing.encoded] = start
    shared = None
    if shares:
        shared, tensors = learn_shared(skeleton, small, len(carried))
        carried |= dict(enumerate(tensors, start=len(carried)))
        for i in range(count):
            for number in (k for entry in shared.writes[i].values() for k in entry):
                made[number], read[number] = i + 1, -1
            read |= {k: i for entry in shared.reads[i].values() for k in entry}
    order = range(len(carried))
    alive = lives([made[k] for k in order], [read[k] for k in order], count)
    return _Roles(Columns(hidden, tuple(carried[k] for k in order), alive), roles.places, shared, crossing)


def _record_calls(skeleton: Skeleton, ids: Tensor, extras: Sequence[Extras], roles: _Roles) -> list[Call]:
    """Return a call per block, with places kept for what the columns hold. UserError if more depends on the tokens."""
    heard = listen(skeleton, ids, extras)
    if _receives_extras(heard, extras):  # a table of positions, say: it follows the shape
        extras = learn_extras(skeleton, ids)
        heard = listen(skeleton, ids, extras)
    again = listen(skeleton, _others(ids), extras)
    calls: list[Call] = []
    for i, path in enumerate(skeleton.blocks):
        leaves, spec = tree_flatten(heard.calls[i])
        names, others = names_of(heard.calls[i]), again.leaves(i)
        for j, leaf in enumerate(leaves):
            if (i, j) in roles.places:
                leaves[j] = _Carried(roles.places[i, j])
            elif is_shared(leaf):
                leaves[j] = _Shared()
            elif not _equal(leaf, others[j]):
                raise _not_per_token(path, names[j])
        calls.append(tree_unflatten(leaves, spec))
    return calls


def _receives_extras(heard: Heard, extras: Sequence[Extras]) -> bool:
    """Whether a block receives a tensor that an earlier block returned besides the hidden states."""
    returned = {id(leaf) for leaf in tree_leaves(list(extras)) if isinstance(leaf, Tensor)}
    return any(id(leaf) in returned for i in range(len(heard.calls)) for leaf in heard.leaves(i))


def _token_tensor(path: str, name: str, small: Sequence[Tensor]) -> TokenTensor:
    found = token_tensor(small)
    if found is None:
        raise _not_per_token(path, name)
    return found


def _of_other_blocks(path: str, name: str) -> UserError:
    return UserError(
        f"block {path} receives {name!r}, which depends on what other blocks return besides the hidden states: "
        f"{_SENTENCE}"
    )


def _others(ids: Tensor) -> Tensor:
    """Other token ids in the same shape: the model's own, in another order and of other numbers."""
    moved, half = ids.flip(0, 1).roll(1, 1), ids.shape[1] // 2
    return torch.cat([moved[:, :half], moved[:, :half], moved[:, 2 * half :]], dim=1)


def _not_per_token(path: str, name: str) -> UserError:
    return UserError(
        f"block {path} receives {name!r}, which depends on the tokens but has no value per token: {_SENTENCE}"
    )


def _refuse_state(path: str, call: Call) -> None:
    """Raise UserError for an argument that a block could fill, such as a cache: the next call would find it filled."""
    for key, value in arguments(call).items():
        if (kind := _state_in(value)) is not None:
            raise UserError(
                f"block {path} receives {key!r}, which holds {kind}: state that one call leaves for the next. Its "
                f"results would depend on the batches before, so {_SENTENCE}"
            )


def _state_in(value: Any) -> str | None:
    """Name the part of nested `value` that is not plain: an object, or an empty list or dict to be filled."""
    if value is None or isinstance(value, _PLAIN) or is_shared(value):
        return None
    if isinstance(value, (list, dict)) and not value:
        return f"an empty {type(value).__name__}"
    if isinstance(value, (list, tuple, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return next((kind for part in parts if (kind := _state_in(part)) is not None), None)
    return f"a {type(value).__name__}"


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return True
