"""The model's own forward pass with other blocks: `run_model` runs it, `listen` records how it calls its blocks.

`learn_extras` runs the first block of a stack itself, whose further outputs some models hand on to the next block.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bitquilt.errors import UserError
from bitquilt.model.structure import Skeleton, is_encoder_decoder, stack_starts

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments that a block receives besides the hidden states."""
Extras = tuple[Any, ...] | None
"""What a block returns after the hidden states; None if it returns a tensor, not a tuple."""


_FEW_TOKENS = 16


class Stop(Exception):
    """Ends the model's forward pass: nothing after it is needed."""


@dataclass(frozen=True, eq=False)
class Heard:
    """One pass: the hidden states that each block reads, and the rest of its call."""

    inputs: list[Tensor]
    calls: list[Call]

    def leaves(self, i: int) -> list[Any]:
        """Return the values in the arguments of block i, with nested ones taken apart."""
        return tree_leaves(self.calls[i])


def run_model(skeleton: Skeleton, ids: Tensor, forwards: dict[int, Callable[..., Any]], gradient: bool = False) -> Any:
    """Return the model's output for token ids with these forward methods of blocks; None if one raises `Stop`."""
    with torch.set_grad_enabled(gradient), _patched(skeleton, forwards):
        try:
            return skeleton.model(**_inputs(skeleton, ids))
        except Stop:
            return None


def _inputs(skeleton: Skeleton, ids: Tensor) -> dict[str, Tensor]:
    """Return the model's arguments. An encoder-decoder reads the ids and is to write them again."""
    shift = getattr(skeleton.model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None or not is_encoder_decoder(skeleton.model):
        return {"input_ids": ids}
    return {"input_ids": ids, "decoder_input_ids": shift(labels=ids)}


def listen(
    skeleton: Skeleton,
    ids: Tensor,
    extras: Sequence[Extras],
    passing: Callable[[Tensor], Tensor] = lambda hidden: hidden,
    last: int | None = None,
    gradient: bool = False,
) -> Heard:
    """Record the calls of all blocks, or those up to block `last`; each returns `passing` of its input and its extras.

    `extras`: those of each block. `gradient`: keep the graph of the inputs.
    """
    calls: list[Call] = []
    inputs: list[Tensor] = []
    wanted = len(skeleton.blocks) if last is None else last + 1

    def listening(*args: Any, **kwargs: Any) -> Any:
        hidden, rest, named = split_call(args, kwargs)
        inputs.append(hidden)
        calls.append((rest, named))
        if len(calls) == wanted:
            raise Stop
        return wrap_output(passing(hidden), extras[len(calls) - 1])

    run_model(skeleton, ids, dict.fromkeys(range(len(skeleton.blocks)), listening), gradient)
    return Heard(inputs, calls)


def learn_extras(skeleton: Skeleton, ids: Tensor) -> tuple[Extras, ...]:
    """Run the first block of every stack itself, and return the extras of each block.

    Raises UserError for a model that wants more than token ids.
    """
    starts, count = stack_starts(skeleton.blocks), len(skeleton.blocks)
    found: list[Extras] = []
    for start, end in zip(starts, (*starts[1:], count), strict=True):
        found += [_extras_of(skeleton, ids, start, found)] * (end - start)
    return tuple(found)


def _extras_of(skeleton: Skeleton, ids: Tensor, start: int, before: Sequence[Extras]) -> Extras:
    """Run block `start` itself; those before it, whose extras are known, pass on their inputs."""
    output: Any = None

    def watch(*args: Any, **kwargs: Any) -> Any:
        nonlocal output
        output = type(first).forward(first, *args, **kwargs)
        raise Stop

    def passing(i: int, *args: Any, **kwargs: Any) -> Any:
        return wrap_output(split_call(args, kwargs)[0], before[i])

    try:
        with skeleton.resident(skeleton.blocks[start]) as first:
            run_model(skeleton, ids, {**{i: partial(passing, i) for i in range(start)}, start: watch})
    except (TypeError, ValueError, AttributeError) as error:  # it wants pixels, or a decoder's inputs, or a mask
        name, wanted = type(skeleton.model).__name__, getattr(skeleton.model, "main_input_name", "input_ids")
        if wanted != "input_ids":
            raise UserError(
                f"{name} reads {wanted}, not token ids, and calibration gives it none, so its blocks cannot be "
                "measured; give a model that reads text"
            ) from error
        raise UserError(
            f"{name} does not run on token ids alone ({error}); give a causal language model or an encoder"
        ) from error
    if output is None:
        raise UserError(
            f"{type(skeleton.model).__name__} does not call {skeleton.blocks[start]} for a text: these are not the "
            "language model's blocks; leave out --blocks"
        )
    return None if isinstance(output, Tensor) else tuple(output[1:])


def check_order(skeleton: Skeleton, ids: Tensor, extras: Sequence[Extras]) -> None:
    """Raise UserError for a model that does not run each block once, in order."""
    order: list[int] = []

    def passing(i: int, *args: Any, **kwargs: Any) -> Any:
        order.append(i)
        return wrap_output(split_call(args, kwargs)[0], extras[i])

    blocks = range(len(skeleton.blocks))
    few = ids[:1, :_FEW_TOKENS]  # unlike `listen`, this goes on to the logits: 805 MB for 4096 tokens of SmolLM2
    run_model(skeleton, few, {i: partial(passing, i) for i in blocks})
    if order != list(blocks):
        raise UserError(
            f"{type(skeleton.model).__name__} does not go once through its {len(blocks)} blocks in order, it calls "
            f"{order[:12]}: such an architecture cannot be streamed block by block"
        )


def shaken(hidden: Tensor) -> Tensor:
    """Return other hidden states: what follows them differs from one pass to the next."""
    return 1.5 * hidden + 0.25


def names_of(call: Call) -> list[str]:
    """Return the name of the argument that each value in a call belongs to."""
    return [name for name, value in arguments(call).items() for _ in tree_leaves(value)]


def arguments(call: Call) -> dict[str, Any]:
    """Return the arguments of a call by name; positional ones are counted with the hidden states as the first."""
    args, kwargs = call
    return {**{f"argument {i + 2}": value for i, value in enumerate(args)}, **kwargs}


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Take the hidden states out of a block's arguments."""
    if args:
        return args[0], args[1:], kwargs
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named


def wrap_output(hidden: Tensor, extras: Extras) -> Any:
    """Return hidden states as a block does."""
    return hidden if extras is None else (hidden, *extras)


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
