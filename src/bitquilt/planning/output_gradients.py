"""`squared_gradients` sums the squared gradients at the outputs of linear layers over the tokens of a pass."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from bitquilt.model.hooks import hooked, on_gradient


@contextmanager
def squared_gradients(
    linears: Mapping[str, nn.Module], errors: Mapping[str, Sequence[Tensor]]
) -> Iterator[tuple[dict[str, Tensor], dict[str, list[float]]]]:
    """Collect sums over tokens during every backward pass inside the `with` block.

    Yields the squared gradient at each layer's output `[out]`, and for each error E of a layer's weight the sum of
    (g^T E x)^2, g being the gradient and x the input.
    """
    sums: dict[str, Tensor] = {}
    made = {name: [0.0] * len(tried) for name, tried in errors.items()}

    def add(name: str, x: Tensor, gradient: Tensor) -> None:
        flat = gradient.reshape(-1, gradient.shape[-1])
        total = flat.double().square().sum(dim=0)
        sums[name] = sums[name] + total if name in sums else total
        for i, error in enumerate(errors.get(name, ())):
            moved = x.reshape(len(flat), -1) @ error.t()
            first_order = torch.einsum("to,to->t", flat, moved)
            made[name][i] += float(first_order.double().square().sum())

    with hooked(after=[(module, on_gradient(partial(add, name))) for name, module in linears.items()]):
        yield sums, made
