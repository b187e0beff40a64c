"""`Columns` packs hidden states, and the tensors of the tokens that blocks receive besides, into one matrix.

The matrix is `[samples, tokens, width]` in fp32, a row per token, so that whatever keeps, cuts into batches or trains
on hidden states does the same to per-layer inputs, original embeddings or token ids. A tensor has its columns from the
block that makes it (the embedding: from the start) to the last block that reads it. That costs disk: Gemma 4 E2B's
per-layer inputs are 35 x 256 columns next to 1536 of hidden states, 4 times as many on average. Files of their own
would take a third of that, but every reader of hidden states would have to know which samples it holds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Token ids in fp32 are exact below 2^24; the largest vocabularies have 2^18.
_EXACT = 2**24


@dataclass(frozen=True)
class TokenTensor:
    """A tensor with a value per token: its axes of samples and tokens, its other sizes, its type."""

    samples: int
    tokens: int
    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Columns per token."""
        return math.prod(self.sizes)

    def columns(self, tensor: Tensor) -> Tensor:
        """Return the tensor as `[samples, tokens, width]` in fp32."""
        rows = tensor.movedim((self.samples, self.tokens), (0, 1))
        return rows.reshape(*rows.shape[:2], self.width).float()

    def tensor(self, columns: Tensor) -> Tensor:
        """Return the tensor of its columns, in its own type and shape."""
        rows = columns.reshape(*columns.shape[:2], *self.sizes).to(self.dtype)
        return rows.movedim((0, 1), (self.samples, self.tokens))


@dataclass(frozen=True)
class Columns:
    """The columns before each block: those of the hidden states, then of the `carried` tensors that are `alive`.

    `alive`: numbers of carried tensors before block i; the last entry is for what the last block returns.
    """

    hidden: TokenTensor
    carried: tuple[TokenTensor, ...]
    alive: tuple[tuple[int, ...], ...]

    def width(self, i: int) -> int:
        """Columns before block i."""
        return sum(part.width for part in self._parts(i))

    def pack(self, i: int, hidden: Tensor, carried: Mapping[int, Tensor]) -> Tensor:
        """Return hidden states and carried tensors before block i as one matrix."""
        tensors = [hidden, *(carried[k] for k in self.alive[i])]
        found = [part.columns(tensor) for part, tensor in zip(self._parts(i), tensors, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def unpack(self, i: int, matrix: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the hidden states and the carried tensors, by number, that the matrix before block i holds."""
        parts = self._parts(i)
        pieces = [matrix] if len(parts) == 1 else torch.split(matrix, [part.width for part in parts], dim=-1)
        hidden, *rest = (part.tensor(piece) for part, piece in zip(parts, pieces, strict=True))
        return hidden, dict(zip(self.alive[i], rest, strict=True))

    def _parts(self, i: int) -> tuple[TokenTensor, ...]:
        return self.hidden, *(self.carried[k] for k in self.alive[i])


SMALL_SHAPES = ((2, 5), (3, 7))
"""Two shapes `[samples, tokens]`: how a tensor's shape differs between them shows its axes."""


def token_tensor(small: Sequence[Tensor]) -> TokenTensor | None:
    """Return the axes of a tensor that was made for ids of each of `SMALL_SHAPES`, or None if it has no such axes."""
    one, other = (tensor.shape for tensor in small)
    if len(one) != len(other):
        return None
    pairs = list(zip(one, other, strict=True))
    of_samples, of_tokens = zip(*SMALL_SHAPES, strict=True)
    samples, tokens = ([i for i, pair in enumerate(pairs) if pair == sizes] for sizes in (of_samples, of_tokens))
    others = [pair for pair in pairs if pair not in (of_samples, of_tokens)]
    if len(samples) != 1 or len(tokens) != 1 or any(a != b for a, b in others):
        return None
    sizes = tuple(a for a, _ in others)
    return TokenTensor(samples[0], tokens[0], sizes, small[0].dtype)


def check_exact(name: str, tensor: Tensor) -> None:
    """Raise ValueError naming the tensor if fp32 cannot hold its values."""
    if not tensor.is_floating_point() and tensor.numel() and int(tensor.abs().max()) >= _EXACT:
        raise ValueError(f"{name} holds integers of {_EXACT} and more, which fp32 rounds")


def lives(made: Sequence[int], read: Sequence[int], blocks: int) -> tuple[tuple[int, ...], ...]:
    """Return which tensors have columns before each block and after the last.

    `made`: the first boundary at which tensor k exists; `read`: the last block that reads it.
    """
    return tuple(
        tuple(k for k, (start, end) in enumerate(zip(made, read, strict=True)) if start <= i <= end)
        for i in range(blocks + 1)
    )
