"""What does an error in each layer do at the output of its sub-block? collect_gradients(block, linears, passes).

One backward pass per sub-block (attention, feed-forward) and probe. Layers that stand in the block itself are measured
at the block's output, which differs from their sub-block's by what does not depend on them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitquilt.core.types import Event, LayerStats
from bitquilt.layer.sensitivity.attention import GradientSums, gradient_sums, probe_signs, sequence_gradients
from bitquilt.model.linear import linear_weight

# A trace below this share of its sub-block's largest is rounding: queries and keys of sequences of one token get 1e-15.
_SILENT = 1e-10
_BLOCK = ""  # the sub-block of layers that stand in the block itself


@dataclass(frozen=True, eq=False)
class Gradients:
    """Of one layer over all tokens: `trace` of its Gauss-Newton Hessian, `own_trace` of 2 sum x x^T for each row;
    `hessian` fp32 `[in, in]`, B / (2 out), in units of sum x x^T, or None. `reason`: why there is no trace, or ""."""

    trace: float
    own_trace: float
    hessian: Tensor | None
    reason: str = ""


@dataclass
class _Watched:
    """What one forward pass shows of a layer."""

    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    inputs: float = 0.0
    sums: GradientSums | None = None
    reason: str = ""


def collect_gradients(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    passes: Iterable[Tensor],
    *,
    hessian: bool,
    probes: int = 1,
    seed: int = 0,
    own: Callable[[str], bool] = lambda _path: False,
) -> dict[str, Gradients]:
    """By layer, while iterating `passes` sends calibration through `block`; each item: its output `[batch, tokens, w]`.

    `linears`: full path -> module inside the block. `own`: sub-blocks (by path inside the block) whose layers are
    measured at their own output instead. A layer whose gradient does not exist, or is zero everywhere, has a `reason`.
    """
    paths = {id(module): path for path, module in block.named_modules()}
    owner = {name: _sub_block(block, paths[id(module)]) for name, module in linears.items()}
    watched = {name: _Watched() for name in linears}
    outputs: dict[str, Tensor] = {}
    handles = [module.register_forward_hook(_watch_layer(watched[name])) for name, module in linears.items()]
    handles += [
        block.get_submodule(path).register_forward_hook(_watch_output(outputs, path))
        for path in set(owner.values()) - {_BLOCK}
    ]
    seen = 0
    try:
        with torch.enable_grad():
            for output in passes:
                outputs[_BLOCK] = output
                for path in dict.fromkeys(owner.values()):
                    members = {name: watched[name] for name in linears if owner[name] == path and not own(path)}
                    _backward(outputs.get(path), members, output.shape[0], seen, probes, seed, hessian)
                for layer in watched.values():
                    layer.calls.clear()
                outputs.clear()
                seen += output.shape[0]
    except RuntimeError as error:  # a block that writes into its layers' outputs, or has no derivative
        for layer in watched.values():
            layer.reason, layer.sums = f"no backward pass: {str(error).splitlines()[0]}", None
    finally:
        for handle in handles:
            handle.remove()
    largest: dict[str, float] = {}
    for name, layer in watched.items():
        squares = layer.sums.squares if layer.sums else 0.0
        largest[owner[name]] = max(squares, largest.get(owner[name], 0.0))
    return {
        name: _result(layer, linears[name], own(owner[name]), probes, _SILENT * largest[owner[name]])
        for name, layer in watched.items()
    }


def attention_aware(
    stats: Mapping[str, LayerStats], gradients: Mapping[str, Gradients]
) -> tuple[dict[str, LayerStats], list[Event]]:
    """`stats` with the Hessians of the sub-blocks' outputs; a layer without one keeps its input's, and an event."""
    found, events = dict(stats), []
    for name, value in gradients.items():
        if value.hessian is not None:
            found[name] = replace(stats[name], hessian=value.hessian)
        elif value.reason:
            events.append(Event(name, "no attention-aware Hessian", f"{value.reason}: its own input's is used"))
    return found, events


def _sub_block(block: nn.Module, path: str) -> str:
    """The outermost module below the block that contains the layer and is called: lists are not."""
    parts = path.split(".")
    for depth in range(1, len(parts)):
        outer = ".".join(parts[:depth])
        if not isinstance(block.get_submodule(outer), (nn.ModuleList, nn.ModuleDict)):
            return outer
    return _BLOCK


def _watch_layer(layer: _Watched) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)
        x = inputs[0].detach()
        layer.calls.append((x, output))
        layer.inputs += float(x.double().square().sum())

    return hook


def _watch_output(outputs: dict[str, Tensor], path: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(first, Tensor):
            outputs[path] = first

    return hook


def _backward(
    output: Tensor | None,
    members: Mapping[str, _Watched],
    batch: int,
    first: int,
    probes: int,
    seed: int,
    hessian: bool,
) -> None:
    """Add one batch to the sums of the layers of one sub-block, whose output is `output` `[batch, tokens, n]`."""
    called = [layer for layer in members.values() if layer.calls]
    if not called:
        return
    if output is None or output.numel() == 0 or not output.requires_grad:
        for layer in called:
            layer.reason = "the output of its sub-block cannot be watched"
        return
    targets = [out for layer in called for _, out in layer.calls]
    rows = output.reshape(batch, -1, output.shape[-1])
    for probe in range(probes):
        shape = (rows.shape[1], rows.shape[2])
        signs = torch.stack([probe_signs(shape, seed, first + i, probe) for i in range(batch)])
        signs = signs.to(rows.device)  # drawn on the host: the same on every device
        grads = iter(torch.autograd.grad((rows * signs).sum(), targets, retain_graph=True, allow_unused=True))
        for layer in called:
            parts = [
                sequence_gradients(x, grad.detach(), batch)
                for (x, _), grad in zip(layer.calls, grads, strict=False)
                if grad is not None
            ]
            if not parts:
                layer.reason = "its sub-block's output does not depend on it"
                continue
            sums = gradient_sums(torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0], hessian)
            layer.sums = sums if layer.sums is None else layer.sums + sums


def _result(layer: _Watched, module: nn.Module, own: bool, probes: int, silent: float) -> Gradients:
    out_features = len(linear_weight(module))
    own_trace = 2 * out_features * layer.inputs
    sums = layer.sums
    if own:
        return Gradients(own_trace, own_trace, None)
    if sums is None or sums.squares <= silent:
        reason = layer.reason or ("no token reached it" if layer.inputs == 0 else "its gradient is zero on all tokens")
        return Gradients(own_trace, own_trace, None, reason)
    trace = sums.squares / probes
    if not trace < float("inf"):
        return Gradients(own_trace, own_trace, None, "its gradient is not finite")
    matrix = None if sums.products is None else sums.products / (2 * out_features * probes)
    return Gradients(trace, own_trace, matrix)
