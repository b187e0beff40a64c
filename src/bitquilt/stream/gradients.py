"""`collect_gradients` measures how an error in each layer changes the output of the layer's sub-block.

One backward pass per sub-block (attention, feed-forward) and probe. Layers that stand in the block itself are measured
at the block's output. `attention_aware` puts the Hessians found this way into the statistics of the inputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitquilt.core.types import Event, LayerStats
from bitquilt.layer.sensitivity.attention import GradientSums, gradient_sums, probe_signs, sequence_gradients
from bitquilt.model.hooks import hooked
from bitquilt.model.linear import linear_weight

# A trace below this share of its sub-block's largest is rounding: queries and keys of sequences of one token get 1e-15.
_SILENT = 1e-10
_BLOCK = ""  # the sub-block of layers that stand in the block itself
_ATTENTION = ("attn", "attention")  # every family of transformers calls its sub-block one or the other


@dataclass(frozen=True, eq=False)
class Gradients:
    """One layer's curvature, summed over all tokens.

    `trace`: of the Gauss-Newton Hessian at the sub-block's output, or of 2 sum x x^T for each row where the layer is
    measured at its own output, or has to be for a `reason`. `hessian`: fp32 `[in, in]`, B / (2 out), in units of
    sum x x^T, or None.
    """

    trace: float
    hessian: Tensor | None
    reason: str = ""


@dataclass
class _Watched:
    """One layer: what a forward pass shows of it, and the sums so far."""

    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    inputs: float = 0.0
    sums: GradientSums | None = None
    reason: str = ""

    def see(self, x: Tensor, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)
        self.calls.append((x.detach(), output))
        self.inputs += float(x.detach().double().square().sum())


def collect_gradients(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    passes: Iterable[Tensor],
    *,
    hessian: bool,
    attention_only: bool = False,
    probes: int = 1,
) -> dict[str, Gradients]:
    """Measure `linears` (full path -> module inside the block) while iterating `passes` runs the block.

    Each item of `passes` is the block's output `[batch, tokens, width]`. `hessian`: return matrices, not only traces.
    `attention_only`: measure layers outside attention at their own output, as GPTQ does.
    `probes`: backward passes with random signs per sequence, for an estimate of less variance.
    A layer whose gradient does not exist, or is zero everywhere, has a `reason`.
    """
    paths = {id(module): path for path, module in block.named_modules()}
    owner = {name: _sub_block(block, paths[id(module)]) for name, module in linears.items()}
    watched = {name: _Watched() for name in linears}
    members = {
        path: [watched[n] for n in linears if owner[n] == path]
        for path in dict.fromkeys(owner.values())
        if not attention_only or is_attention(path)
    }
    outputs: dict[str, Tensor] = {}

    def see_output(path: str, _x: Tensor, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(first, Tensor):
            outputs[path] = first

    after = [(module, watched[name].see) for name, module in linears.items()]
    sub_blocks = [(block.get_submodule(path), partial(see_output, path)) for path in members if path != _BLOCK]
    seen = 0
    try:
        with hooked(after=[*after, *sub_blocks]), torch.enable_grad():
            for output in passes:
                outputs[_BLOCK] = output
                signs = partial(_signs, range(seen, seen + len(output)), probes)
                for path in members:
                    _backward(outputs.get(path), members[path], len(output), signs, hessian)
                for layer in watched.values():
                    layer.calls.clear()
                outputs.clear()
                seen += len(output)
    except RuntimeError as error:  # a block that writes into its layers' outputs, or has no derivative
        for layer in watched.values():
            layer.reason, layer.sums = f"no backward pass: {str(error).splitlines()[0]}", None
    largest = {path: max(layer.sums.squares if layer.sums else 0.0 for layer in members[path]) for path in members}
    found = {}
    for name, layer in watched.items():
        if owner[name] in members:
            found[name] = _result(layer, linears[name], probes, _SILENT * largest[owner[name]])
        else:
            found[name] = Gradients(_own_trace(layer, linears[name]), None)
    return found


def is_attention(path: str) -> bool:
    """Whether the sub-block at `path` is an attention module, by its name."""
    return any(word in path.rpartition(".")[2].lower() for word in _ATTENTION)


def attention_aware(
    stats: Mapping[str, LayerStats], gradients: Mapping[str, Gradients]
) -> tuple[dict[str, LayerStats], list[Event]]:
    """Replace the Hessians in `stats` by those at the sub-blocks' outputs.

    A layer without one keeps the Hessian of its input and gets an event.
    """
    found, events = dict(stats), []
    for name, value in gradients.items():
        if value.hessian is not None:
            found[name] = replace(stats[name], hessian=value.hessian)
        elif value.reason:
            events.append(Event(name, "no attention-aware Hessian", f"{value.reason}: its own input's is used"))
    return found, events


def _sub_block(block: nn.Module, path: str) -> str:
    """Return the outermost module below the block that contains the layer and is called, as lists are not."""
    parts = path.split(".")
    for depth in range(1, len(parts)):
        outer = ".".join(parts[:depth])
        if not isinstance(block.get_submodule(outer), (nn.ModuleList, nn.ModuleDict)):
            return outer
    return _BLOCK


def _signs(samples: range, probes: int, rows: Tensor) -> Iterator[Tensor]:
    """Random signs shaped like `rows` `[samples, n, width]`, one tensor per probe, drawn on the host: the same on every
    device."""
    shape = (rows.shape[1], rows.shape[2])
    for probe in range(probes):
        yield torch.stack([probe_signs(shape, i, probe) for i in samples]).to(rows.device)


def _backward(
    output: Tensor | None,
    members: Sequence[_Watched],
    batch: int,
    signs: Callable[[Tensor], Iterable[Tensor]],
    hessian: bool,
) -> None:
    """Add one batch to the sums of the layers of one sub-block, whose output is `output` `[batch, tokens, n]`."""
    called = [layer for layer in members if layer.calls]
    if not called:
        return
    if output is None or output.numel() == 0 or not output.requires_grad:
        for layer in called:
            layer.reason = "the output of its sub-block cannot be watched"
        return
    targets = [out for layer in called for _, out in layer.calls]
    rows = output.reshape(batch, -1, output.shape[-1])
    for drawn in signs(rows):
        grads = iter(torch.autograd.grad((rows * drawn).sum(), targets, retain_graph=True, allow_unused=True))
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


def _own_trace(layer: _Watched, module: nn.Module) -> float:
    """Trace of the Hessian at the layer's own output."""
    return 2 * len(linear_weight(module)) * layer.inputs


def _result(layer: _Watched, module: nn.Module, probes: int, silent: float) -> Gradients:
    out_features = len(linear_weight(module))
    own_trace = _own_trace(layer, module)
    sums = layer.sums
    if sums is None or sums.squares <= silent:
        reason = layer.reason or ("no token reached it" if layer.inputs == 0 else "its gradient is zero on all tokens")
        return Gradients(own_trace, None, reason)
    trace = sums.squares / probes
    if not trace < float("inf"):
        return Gradients(own_trace, None, "its gradient is not finite")
    matrix = None if sums.products is None else sums.products / (2 * out_features * probes)
    return Gradients(trace, matrix)
