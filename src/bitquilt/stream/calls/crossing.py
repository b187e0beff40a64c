"""`Crossing`: from an encoder's last block to the decoder's first, through the modules that close the encoder.

Every decoder block reads the closed output of the encoder, which is carried in columns of the hidden states; the
decoder's own first hidden states, known from the tokens, wait in columns until the encoder is through.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from bitquilt.model.hooks import hooked
from bitquilt.model.structure import Skeleton
from bitquilt.stream.calls.recording import Extras, Heard, listen, shaken


@dataclass(frozen=True, eq=False)
class Crossing:
    """Where the decoder starts, what closes the encoder, and the numbers of two carried tensors.

    `waiting`: the decoder's first hidden states; `encoded`: the encoder's closed output.
    """

    start: int
    closing: nn.Sequential
    waiting: int
    encoded: int

    def after(self, i: int, hidden: Tensor, carried: dict[int, Tensor]) -> Tensor:
        """Return what block i + 1 reads when block i returned `hidden`; changes `carried` at the crossing."""
        if i + 1 != self.start:
            return hidden
        carried[self.encoded] = self.closing(hidden)
        return carried[self.waiting]


def learn_closing(
    skeleton: Skeleton, ids: Tensor, extras: Sequence[Extras], start: int
) -> tuple[nn.Sequential, Heard, Tensor]:
    """Return copies of the encoder's modules that run one after another behind its last block, with their weights.

    Also the pass that showed them, in which blocks change their inputs, and the last module's output in it.
    """
    encoder = skeleton.model.get_encoder()
    seen: list[tuple[nn.Module, Tensor, Any]] = []
    last: list[Tensor] = []

    def see(module: nn.Module, x: Tensor, output: Any) -> None:
        seen.append((module, x, output))

    def passing(hidden: Tensor) -> Tensor:
        last.append(shaken(hidden))
        return last[-1]

    children = [module for module in encoder.children() if not isinstance(module, nn.ModuleList)]
    with hooked(after=[(module, partial(see, module)) for module in children]):
        heard = listen(skeleton, ids, extras, passing=passing)
    found: Tensor = last[start - 1]
    closing: list[nn.Module] = []
    for module, x, output in seen:
        if x is found and isinstance(output, Tensor):  # others are of the decoder, such as a shared embedding
            closing.append(copy.deepcopy(module))
            found = output
    return nn.Sequential(*closing), heard, found
