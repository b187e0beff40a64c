"""Drift: how far the quantized layers of a block move the inputs of the layers after them.

`full_copy` copies the full-precision block, `find_stages` groups its layers by input, `observe_pass` reads the inputs
of one group in one model, and `collect_pairs` turns passes of both models into `LayerStats` with their drift.

The residual stream is found by experiment: a small change is added to a layer's output, and wherever exactly this
change arrives, the output has been added to the stream.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from bitquilt.core.types import LayerStats
from bitquilt.model.hooks import hooked
from bitquilt.stream.statistics import InputSums

Run = Callable[[], Tensor]
"""One forward pass of a block -> its output `[batch, tokens, width]`."""
_OUTPUT = ""  # a tap: the block's output; any other tap is the path of the module whose input is read


class _EverythingSeen(Exception):
    """Ends a pass early: the rest of the block need not run."""


@dataclass(frozen=True, eq=False)
class SeenInputs:
    """One pass by layer: the input `[tokens, in]`, and the residual stream its output is added to `[tokens, out]`."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    streams: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class InputStage:
    """Layers that are measured together because they read one input.

    `paired`: their tokens are the block's, in order, so that two models can be compared. `taps`: where the stream that
    a layer writes to can be read, by layer.
    """

    names: tuple[str, ...]
    paired: bool
    taps: Mapping[str, str]

    @property
    def reaches_output(self) -> bool:
        """Whether a pass that reads the stage's inputs and streams runs to the block's end."""
        return _OUTPUT in self.taps.values()


def full_copy(block: nn.Module) -> nn.Module:
    """Copy the block around the same tensors, so that replacing the block's layers leaves the copy's in place."""
    shared = {id(t): t for t in (*block.parameters(), *block.buffers())}
    return copy.deepcopy(block, shared)


def find_stages(block: nn.Module, names: Sequence[str], run: Run, streams: bool) -> list[InputStage]:
    """Group the layers `names` (paths inside `block`) by input, in the order in which a pass reaches them.

    `run`: a pass on a probe. `streams`: look for taps. Layers that see other tokens than the block (routed experts),
    or that are called twice or not at all, are unpaired.
    """
    calls: list[tuple[str, Tensor]] = []

    def read(name: str, x: Tensor) -> None:
        calls.append((name, x))

    with hooked(before=[(block.get_submodule(name), partial(read, name)) for name in names]):
        output = run()
    called = [name for name, _ in calls]
    stages: dict[int, list[str]] = {}
    for name, x in calls:
        # some families flatten the tokens on the way
        same_tokens = x.shape[:-1] in (output.shape[:2], (output.shape[:2].numel(),))
        members = stages.setdefault(id(x) if called.count(name) == 1 and same_tokens else 0, [])
        if name not in members:
            members.append(name)
    if missing := [name for name in names if name not in called]:
        stages.setdefault(0, []).extend(missing)
    found = []
    for key, members in stages.items():
        taps = {n: tap for n in members if (tap := _tap(block, n, run)) is not None} if key and streams else {}
        found.append(InputStage(tuple(members), bool(key), taps))
    return found


def observe_pass(root: nn.Module, stage: InputStage, run: Run) -> SeenInputs:
    """Run one pass of `root` and stop it when the stage's inputs and streams have been seen."""
    seen, outputs = SeenInputs(), dict[str, Tensor]()
    wanted = len(stage.names) + len(stage.taps)
    inner_taps = {name: tap for name, tap in stage.taps.items() if tap != _OUTPUT}

    def stop_early() -> None:
        if len(inner_taps) == len(stage.taps) and len(seen.inputs) + len(seen.streams) == wanted:
            raise _EverythingSeen

    def input_of(name: str, x: Tensor) -> None:
        seen.inputs[name] = _rows(x)
        stop_early()

    def output_of(name: str, _x: Tensor, output: Tensor) -> None:
        outputs[name] = _rows(output)

    def at_tap(name: str, x: Tensor) -> None:
        if name in outputs:
            seen.streams[name] = _rows(x) - outputs[name]
            stop_early()

    before = [(root.get_submodule(name), partial(input_of, name)) for name in stage.names]
    before += [(root.get_submodule(tap), partial(at_tap, name)) for name, tap in inner_taps.items()]
    after = [(root.get_submodule(name), partial(output_of, name)) for name in stage.taps]
    try:
        with hooked(before, after):
            result = run()
    except _EverythingSeen:
        return seen
    for name in stage.taps.keys() - inner_taps.keys():
        seen.streams[name] = _rows(result) - outputs[name]
    return seen


def collect_pairs(
    stage: InputStage, passes: Iterable[tuple[SeenInputs, SeenInputs]], *, sample: int, tokens: int, prefix: str = ""
) -> dict[str, LayerStats]:
    """Sum up a paired stage over passes (full precision, quantized) with `tokens` tokens in all.

    `prefix`: of the layers' names in the result. Raises UserError naming the layer whose input, in either model, held
    NaN or Inf.
    """
    leader = stage.names[0]
    sums: InputSums | None = None
    streams: dict[str, Tensor] = {}
    for full, here in passes:
        x = here.inputs[leader]
        sums = sums or InputSums(x, sample, tokens, drift=True)
        sums.add(x, full.inputs[leader])
        for name, stream in here.streams.items():
            drift = (full.streams[name] - stream).float()
            if name not in streams:
                streams[name] = torch.zeros(drift.shape[1], x.shape[1], device=x.device)
            streams[name].addmm_(drift.t(), x.float())
    assert sums is not None
    shared = sums.result(prefix + leader, *streams.values())
    return {prefix + n: replace(shared, stream_drift=streams[n]) if n in streams else shared for n in stage.names}


def _tap(block: nn.Module, name: str, run: Run) -> str | None:
    """Find where the sum of the layer's output and a stream can be read, or return None."""
    arrived: list[tuple[str, Tensor]] = []
    output: list[Tensor] = []
    change: list[Tensor] = []

    def arriving(path: str, x: Tensor) -> None:
        if output and x.dim() and _rows(x).shape == output[0].shape:
            arrived.append((path, _rows(x).clone()))

    def changing(_x: Tensor, result: Tensor) -> Tensor:
        output.append(_rows(result).clone())
        return result + change[0].view_as(result) if change else result

    before = [(module, partial(arriving, path)) for path, module in block.named_modules() if path]
    with hooked(before, after=[(block.get_submodule(name), changing)]):
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
    tolerance = 1e-3 * float(change[0].abs().max())
    for (path, first), (_, second) in zip(plain, changed, strict=True):
        added_to_something = float((first - own).abs().max()) > tolerance
        if added_to_something and float((second - first - change[0]).abs().max()) < tolerance:
            return path
    return None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
