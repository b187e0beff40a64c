"""How is each block called, and what happens before the first and after the last? Learned by watching the model.

The model's own forward pass runs once with its blocks listening instead of computing; whatever it hands to each of
them (masks, rotary tables, positions; they differ between blocks in sliding-window models) is replayed later.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitquilt.errors import UserError
from bitquilt.model.structure import Skeleton
from bitquilt.stream.devices import to_device


@dataclass(frozen=True, eq=False)
class Call:
    """What a block receives beside the hidden states, for one batch shape."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Run `block` on `hidden` `[batch, tokens, width]` -> the same shape."""
        output = block(hidden, *self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def to(self, device: torch.device) -> "Call":
        """The same with every tensor on `device`."""
        args, kwargs = to_device((self.args, self.kwargs), device)
        return Call(args, kwargs)


class _Stop(Exception):
    """Raised by the last listening block: nothing after it is needed."""


def open_outer(skeleton: Skeleton, ids: Tensor) -> tuple[Any, ...] | None:
    """Load the weights outside the blocks, and learn from the first block what blocks return (`learn_extras`)."""
    skeleton.load("")
    first = skeleton.blocks[0]
    template = skeleton.template(first)
    skeleton.load(first)
    extras = learn_extras(skeleton, ids)
    skeleton.reset(first, template)
    return extras


def learn_extras(skeleton: Skeleton, ids: Tensor) -> tuple[Any, ...] | None:
    """What a block returns after the hidden states: None if it returns a tensor, else the rest of its tuple.

    Needs the outer weights and the first block in memory. ids `[batch, tokens]`.
    """
    first = skeleton.model.get_submodule(skeleton.blocks[0])
    output: Any = None

    def watch(*args: Any, **kwargs: Any) -> Any:
        nonlocal output
        output = type(first).forward(first, *args, **kwargs)
        raise _Stop

    try:
        _run(skeleton, ids, {0: watch})
    except (TypeError, ValueError, AttributeError) as error:  # it wants pixels, or a decoder's inputs, or a mask
        name = type(skeleton.model).__name__
        raise UserError(
            f"{name} does not run on token ids alone ({error}): wanted a causal LM or an encoder"
        ) from error
    return None if isinstance(output, Tensor) else tuple(output[1:])


def check_order(skeleton: Skeleton, ids: Tensor, extras: tuple[Any, ...] | None) -> None:
    """Raise UserError unless the forward pass goes once through the blocks, in order; needs the outer weights."""
    order: list[int] = []

    def passing(i: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            order.append(i)
            return _wrap(_split(args, kwargs)[0], extras)

        return forward

    blocks = range(len(skeleton.blocks))
    _run(skeleton, ids, {i: passing(i) for i in blocks})
    if order != list(blocks):
        raise UserError(
            f"{type(skeleton.model).__name__} does not go once through its {len(blocks)} blocks in order, it calls "
            f"{order[:12]}: such an architecture cannot be streamed block by block"
        )


def record_calls(skeleton: Skeleton, ids: Tensor, extras: tuple[Any, ...] | None) -> list[Call]:
    """One `Call` per block for inputs shaped like ids `[batch, tokens]`; needs the outer weights in memory.

    Raises UserError if what a block receives depends on the tokens: replaying it for others would be wrong.
    """
    calls = _listen(skeleton, ids, extras)
    again = _listen(skeleton, ids.flip(0, 1).roll(1, 1), extras)
    for path, one, other in zip(skeleton.blocks, calls, again, strict=True):
        received = {**{f"argument {i + 2}": value for i, value in enumerate(one.args)}, **one.kwargs}
        for key, value in zip(received, (*other.args, *other.kwargs.values()), strict=True):
            if not _equal(received[key], value):
                raise UserError(
                    f"block {path} receives {key!r}, which depends on the tokens beside the hidden states: "
                    "this architecture cannot be streamed block by block"
                )
    return calls


def embed(skeleton: Skeleton, ids: Tensor) -> Tensor:
    """What the first block reads for ids `[batch, tokens]` -> `[batch, tokens, width]`."""
    hidden: Tensor | None = None

    def catch(*args: Any, **kwargs: Any) -> Any:
        nonlocal hidden
        hidden = _split(args, kwargs)[0]
        raise _Stop

    _run(skeleton, ids, {0: catch})
    assert hidden is not None
    return hidden


def finish(
    skeleton: Skeleton, ids: Tensor, hidden: Tensor, extras: tuple[Any, ...] | None, gradient: bool = False
) -> Tensor:
    """The model's output (logits where it has a head) when its last block returns `hidden`; needs the outer weights.

    `gradient`: keep the graph from `hidden` to the output."""

    def returning(*_: Any, **__: Any) -> Any:
        return _wrap(hidden, extras)

    output = _run(skeleton, ids, dict.fromkeys(range(len(skeleton.blocks)), returning), gradient)
    logits = getattr(output, "logits", None)
    result: Tensor = logits if logits is not None else output[0]
    return result


def _listen(skeleton: Skeleton, ids: Tensor, extras: tuple[Any, ...] | None) -> list[Call]:
    calls: list[Call] = []

    def listening(*args: Any, **kwargs: Any) -> Any:
        hidden, rest, named = _split(args, kwargs)
        calls.append(Call(rest, named))
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
    """Give blocks another forward while keeping the modules, whose attributes the model's loop may read."""
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
