"""What did the quantized layers before it do to each layer's input? The full-precision block runs beside the quantized
one on the same tokens: collect_pairs(...) -> LayerStats with the drift between them.

Where the residual stream can be read is found by looking: a small change is added to a layer's output, and wherever
exactly this change arrives, the output has been added to something: that is the stream.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitquilt.core.types import LayerStats
from bitquilt.stream.statistics import Accumulator, check_statistics, stride_for

Run = Callable[[], Tensor]
"""One forward pass of a block -> its output `[batch, tokens, width]`."""
_OUTPUT = ""  # a tap: the block's output, else the path of the module whose input is read


class _Stop(Exception):
    """Everything asked for has been seen: the rest of the block need not run."""


@dataclass(frozen=True, eq=False)
class Seen:
    """One pass: each layer's input `[tokens, in]`, and the residual stream its output is added to `[tokens, out]`."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    streams: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Layers that are measured together, because they read one input. `paired`: their tokens are the block's, in
    order, so that two runs can be compared; `taps`: where the stream of some of them can be read."""

    names: tuple[str, ...]
    paired: bool
    taps: Mapping[str, str]


def beside(block: nn.Module) -> nn.Module:
    """The block once more around the same tensors: its layers may be replaced one by one, the copy's stay."""
    shared = {id(t): t for t in (*block.parameters(), *block.buffers())}
    return copy.deepcopy(block, shared)


def find_stages(block: nn.Module, names: Sequence[str], run: Run, streams: bool) -> list[Stage]:
    """`names` (paths inside `block`) by input, in the order in which a pass reaches them; `run`: a pass on a probe.

    Layers that see other tokens than the block (routed experts), are called twice or not at all are unpaired.
    """
    calls: list[tuple[str, Tensor]] = []
    hooks = [
        block.get_submodule(n).register_forward_pre_hook(lambda _m, args, n=n: calls.append((n, args[0])))
        for n in names
    ]
    try:
        output = run()
    finally:
        for hook in hooks:
            hook.remove()
    counts = [name for name, _ in calls]
    stages: dict[int, list[str]] = {}
    for name, x in calls:
        # some families flatten the tokens on the way
        same_tokens = x.shape[:-1] in (output.shape[:2], (output.shape[:2].numel(),))
        once = counts.count(name) == 1 and same_tokens
        members = stages.setdefault(id(x) if once else 0, [])
        if name not in members:
            members.append(name)
    if missing := [name for name in names if name not in counts]:
        stages.setdefault(0, []).extend(missing)
    found = []
    for key, members in stages.items():
        taps = {n: tap for n in members if (tap := _tap(block, n, run)) is not None} if key and streams else {}
        found.append(Stage(tuple(members), bool(key), taps))
    return found


def observe_pass(root: nn.Module, stage: Stage, run: Run) -> Seen:
    """One pass of `root`, stopped when the stage's inputs and streams are there."""
    seen, outputs = Seen(), dict[str, Tensor]()
    last_needed = len(stage.names) + len(stage.taps)

    def done() -> None:
        if _OUTPUT not in stage.taps.values() and len(seen.inputs) + len(seen.streams) == last_needed:
            raise _Stop

    def reading(name: str) -> Callable[..., None]:
        def before(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.inputs[name] = _rows(args[0])
            done()

        return before

    def writing(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: outputs.__setitem__(name, _rows(output))

    def arriving(name: str) -> Callable[..., None]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in outputs and (tensor := _first_tensor(args, kwargs)) is not None:
                seen.streams[name] = _rows(tensor) - outputs[name]
                done()

        return before

    hooks = [root.get_submodule(n).register_forward_pre_hook(reading(n)) for n in stage.names]
    hooks += [root.get_submodule(n).register_forward_hook(writing(n)) for n in stage.taps]
    hooks += [
        root.get_submodule(tap).register_forward_pre_hook(arriving(n), with_kwargs=True)
        for n, tap in stage.taps.items()
        if tap != _OUTPUT
    ]
    try:
        result = run()
        for name, tap in stage.taps.items():
            if tap == _OUTPUT:
                seen.streams[name] = _rows(result) - outputs[name]
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def collect_pairs(
    stage: Stage, passes: Iterable[tuple[Seen, Seen]], *, sample: int, tokens: int
) -> dict[str, LayerStats]:
    """Statistics of a paired stage from passes (full precision, quantized) over `tokens` tokens.

    Raises ValueError naming the layer whose input, in either model, held NaN or Inf.
    """
    leader = stage.names[0]
    sums: Accumulator | None = None
    streams: dict[str, Tensor] = {}
    for full, here in passes:
        x = here.inputs[leader]
        width = x.shape[1]
        if sums is None:
            zeros = torch.zeros(width, width, device=x.device)
            sums = Accumulator(width, stride_for(sample, tokens), sample, zeros, torch.zeros_like(zeros))
        sums.add(x, full.inputs[leader])
        for name, stream in here.streams.items():
            drift = (full.streams[name] - stream).float()
            if name not in streams:
                streams[name] = torch.zeros(drift.shape[1], width, device=x.device)
            streams[name].addmm_(drift.t(), x.float())
    assert sums is not None
    shared = sums.result()
    check_statistics(leader, shared, *streams.values())
    return {n: replace(shared, stream_drift=streams[n]) if n in streams else shared for n in stage.names}


def _tap(block: nn.Module, name: str, run: Run) -> str | None:
    """Where the sum of the layer's output and a stream can be read, or None where there is no such place."""
    layer = block.get_submodule(name)
    arrived: list[tuple[str, Tensor]] = []
    output: list[Tensor] = []
    change: list[Tensor] = []

    def arriving(path: str) -> Callable[..., None]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = _first_tensor(args, kwargs)
            if output and tensor is not None and tensor.dim() and _rows(tensor).shape == output[0].shape:
                arrived.append((path, _rows(tensor).clone()))

        return before

    def writing(_module: nn.Module, _args: Any, result: Tensor) -> Tensor:
        output.append(_rows(result).clone())
        return result + change[0].view_as(result) if change else result

    hooks = [layer.register_forward_hook(writing)]
    hooks += [m.register_forward_pre_hook(arriving(p), with_kwargs=True) for p, m in block.named_modules() if p]
    try:
        result = _rows(run())
        if not output or output[0].shape != result.shape:
            return None
        plain, own = [*arrived, (_OUTPUT, result)], output[0]
        noise = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result)
        change.append(noise * (own.std() + 1e-3 * result.abs().max()))
        arrived.clear()
        output.clear()
        moved = _rows(run())
        changed = [*arrived, (_OUTPUT, moved)]
    finally:
        for hook in hooks:
            hook.remove()
    tolerance = 1e-3 * float(change[0].abs().max())
    for (path, before), (_, after) in zip(plain, changed, strict=True):
        added_to_something = float((before - own).abs().max()) > tolerance
        if added_to_something and float((after - before - change[0]).abs().max()) < tolerance:
            return path
    return None


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
