"""`hooked` watches the inputs, outputs and output gradients of modules and always removes its hooks again."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

Before = Callable[[Tensor], None]
"""Called with a module's input: its first argument that is a tensor."""
After = Callable[[Tensor, Any], Any]
"""Called with a module's input and output. A value other than None replaces the output."""


@contextmanager
def hooked(
    before: Iterable[tuple[nn.Module, Before]] = (), after: Iterable[tuple[nn.Module, After]] = ()
) -> Iterator[None]:
    """Call `before` ahead of each forward pass of its module, and `after` behind it, while the context is open.

    A pass without a tensor among its arguments is skipped.
    """
    with ExitStack() as handles:
        for module, read in before:
            handles.callback(module.register_forward_pre_hook(partial(_before, read), with_kwargs=True).remove)
        for module, change in after:
            handles.callback(module.register_forward_hook(partial(_after, change), with_kwargs=True).remove)
        yield


def on_gradient(read: Callable[[Tensor, Tensor], None]) -> After:
    """Return an `after` hook that calls `read(input, gradient)` whenever a gradient arrives at the output."""

    def after(x: Tensor, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: read(x.detach(), gradient))

    return after


def _before(read: Before, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if (x := _first_tensor(args, kwargs)) is not None:
        read(x)


def _after(change: After, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    x = _first_tensor(args, kwargs)
    return None if x is None else change(x, output)


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
