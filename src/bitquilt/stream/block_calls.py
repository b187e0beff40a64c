"""The model's own forward pass around its blocks: `embed` runs it up to the first, `BlockCalls.finish` from the last.

`learn_calls` runs it with its blocks listening instead of computing and returns `BlockCalls`, which call the blocks
later as the model does: with its masks, rotary tables and positions, which differ between the blocks of some models.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitquilt.errors import UserError
from bitquilt.model.structure import Skeleton
from bitquilt.stream.devices import to_device

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments that a block receives besides the hidden states."""

_PLAIN = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum)


@dataclass(frozen=True, eq=False)
class BlockCalls:
    """How a model calls its blocks: `by_shape`, with which arguments for inputs `[batch, tokens]`, block by block.

    `extras`: what a block returns after the hidden states; None if it returns a tensor, not a tuple.
    """

    skeleton: Skeleton
    device: torch.device
    extras: tuple[Any, ...] | None
    by_shape: Mapping[tuple[int, ...], Sequence[Call]]

    def run(self, i: int, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Call block i on `hidden` `[batch, tokens, width]` -> the same shape, on the device of the calls."""
        args, kwargs = self.by_shape[tuple(hidden.shape[:2])][i]
        output = block(hidden.to(self.device), *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def finish(self, ids: Tensor, hidden: Tensor, *, gradient: bool = False) -> Tensor:
        """Return the model's output, logits if it has a head, when its last block returns `hidden`.

        Needs the outer weights in memory. `gradient`: keep the graph from `hidden` to the output.
        """

        def returning(*_: Any, **__: Any) -> Any:
            return _wrap(hidden, self.extras)

        blocks = range(len(self.skeleton.blocks))
        output = _run(self.skeleton, ids, dict.fromkeys(blocks, returning), gradient)
        logits = getattr(output, "logits", None)
        result: Tensor = logits if logits is not None else output[0]
        return result


class _Stop(Exception):
    """Ends the model's forward pass: nothing after it is needed."""


def learn_calls(skeleton: Skeleton, batches: Iterable[Tensor], device: torch.device) -> BlockCalls:
    """Learn how the blocks are called for token ids shaped like those of `batches` `[batch, tokens]`.

    Needs the outer weights in memory and loads the first block. Arguments are put on `device`. Raises UserError for a
    model that needs more than token ids, does not run each block once, in order, or gives them the tokens' own values
    or state that they fill.
    """
    extras: tuple[Any, ...] | None = None
    found: dict[tuple[int, ...], Sequence[Call]] = {}
    for ids in batches:
        if not found:
            extras = _learn_extras(skeleton, ids)
            _check_order(skeleton, ids, extras)
        if (shape := tuple(ids.shape)) not in found:
            found[shape] = to_device(_record_calls(skeleton, ids, extras), device)
    return BlockCalls(skeleton, device, extras, found)


def embed(skeleton: Skeleton, ids: Tensor) -> Tensor:
    """Return what the first block reads for ids `[batch, tokens]`: `[batch, tokens, width]`."""
    hidden: Tensor | None = None

    def catch(*args: Any, **kwargs: Any) -> Any:
        nonlocal hidden
        hidden = _split(args, kwargs)[0]
        raise _Stop

    _run(skeleton, ids, {0: catch})
    assert hidden is not None
    return hidden


def _learn_extras(skeleton: Skeleton, ids: Tensor) -> tuple[Any, ...] | None:
    output: Any = None

    def watch(*args: Any, **kwargs: Any) -> Any:
        nonlocal output
        output = type(first).forward(first, *args, **kwargs)
        raise _Stop

    try:
        with skeleton.resident(skeleton.blocks[0]) as first:
            _run(skeleton, ids, {0: watch})
    except (TypeError, ValueError, AttributeError) as error:  # it wants pixels, or a decoder's inputs, or a mask
        name = type(skeleton.model).__name__
        raise UserError(
            f"{name} does not run on token ids alone ({error}); give a causal language model or an encoder"
        ) from error
    if output is None:
        raise UserError(
            f"{type(skeleton.model).__name__} does not call {skeleton.blocks[0]} for a text: these are not the "
            "language model's blocks; leave out --blocks"
        )
    return None if isinstance(output, Tensor) else tuple(output[1:])


def _check_order(skeleton: Skeleton, ids: Tensor, extras: tuple[Any, ...] | None) -> None:
    order: list[int] = []

    def passing(i: int, *args: Any, **kwargs: Any) -> Any:
        order.append(i)
        return _wrap(_split(args, kwargs)[0], extras)

    blocks = range(len(skeleton.blocks))
    _run(skeleton, ids, {i: partial(passing, i) for i in blocks})
    if order != list(blocks):
        raise UserError(
            f"{type(skeleton.model).__name__} does not go once through its {len(blocks)} blocks in order, it calls "
            f"{order[:12]}: such an architecture cannot be streamed block by block"
        )


def _record_calls(skeleton: Skeleton, ids: Tensor, extras: tuple[Any, ...] | None) -> list[Call]:
    """Return a call per block. What depends on the tokens or may be filled cannot be replayed: UserError."""
    calls = _listen(skeleton, ids, extras)
    for path, call in zip(skeleton.blocks, calls, strict=True):
        _refuse_state(path, call)
    again = _listen(skeleton, ids.flip(0, 1).roll(1, 1), extras)
    for path, (args, kwargs), (other_args, other_kwargs) in zip(skeleton.blocks, calls, again, strict=True):
        for (key, one), other in zip(
            _by_name((args, kwargs)).items(), (*other_args, *other_kwargs.values()), strict=True
        ):
            if not _equal(one, other):
                raise UserError(
                    f"block {path} receives {key!r}, which depends on the tokens besides the hidden states: "
                    "this architecture cannot be streamed block by block"
                )
    return calls


def _by_name(call: Call) -> dict[str, Any]:
    args, kwargs = call
    return {**{f"argument {i + 2}": value for i, value in enumerate(args)}, **kwargs}


def _refuse_state(path: str, call: Call) -> None:
    """Raise UserError for an argument that a block could fill, such as a cache: the next call would find it filled."""
    for key, value in _by_name(call).items():
        if (kind := _state_in(value)) is not None:
            raise UserError(
                f"block {path} receives {key!r}, which holds {kind}: state that one call leaves for the next. Its "
                "results would depend on the batches before, so this architecture cannot be streamed block by block"
            )


def _state_in(value: Any) -> str | None:
    """Name what in nested `value` is no plain value: an object, or an empty list or dict, which waits to be filled."""
    if value is None or isinstance(value, _PLAIN):
        return None
    if isinstance(value, (list, dict)) and not value:
        return f"an empty {type(value).__name__}"
    if isinstance(value, (list, tuple, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return next((kind for part in parts if (kind := _state_in(part)) is not None), None)
    return f"a {type(value).__name__}"


def _listen(skeleton: Skeleton, ids: Tensor, extras: tuple[Any, ...] | None) -> list[Call]:
    calls: list[Call] = []

    def listening(*args: Any, **kwargs: Any) -> Any:
        hidden, rest, named = _split(args, kwargs)
        calls.append((rest, named))
        if len(calls) == len(skeleton.blocks):
            raise _Stop
        return _wrap(hidden, extras)

    _run(skeleton, ids, dict.fromkeys(range(len(skeleton.blocks)), listening))
    return calls


def _run(skeleton: Skeleton, ids: Tensor, forwards: dict[int, Callable[..., Any]], gradient: bool = False) -> Any:
    with torch.set_grad_enabled(gradient), _patched(skeleton, forwards):
        try:
            return skeleton.model(input_ids=ids)
        except _Stop:
            return None


@contextmanager
def _patched(skeleton: Skeleton, forwards: dict[int, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward methods of blocks but keep the modules, whose attributes the model's loop may read."""
    blocks = [skeleton.model.get_submodule(skeleton.blocks[i]) for i in forwards]
    for block, forward in zip(blocks, forwards.values(), strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named


def _wrap(hidden: Tensor, extras: tuple[Any, ...] | None) -> Any:
    return hidden if extras is None else (hidden, *extras)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return True
