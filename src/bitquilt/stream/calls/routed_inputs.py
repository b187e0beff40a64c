"""Statistics of experts, one expert in memory at a time: `RoutedInputs` keeps what the experts of a block receive,
`ExpertStats` makes `LayerStats` of it when a layer's are asked for.

All Hessians of a DeepSeek-V3 block would take 57 GB, those of one expert 0.22. So the inputs and the router's choices
go to the disk, as activations do, and each expert's tokens are gathered from there.

An expert with few tokens has a poor Hessian of its own, and one without tokens has none. It is therefore shrunk towards
what the expert would see if every token came to it: H_e + lambda H_pooled. H_pooled is of tokens of the whole block,
evenly spread and sent through this expert: neurons of two experts have nothing in common, so its down-projection sees
them behind its own gate and up. lambda makes them count as `PRIOR` tokens per input channel, whatever their number.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from bitquilt.core.types import Event, LayerStats
from bitquilt.model.experts import SplitExperts, experts_of
from bitquilt.stream.job import LoadedBlock
from bitquilt.stream.statistics import InputSums

# One token per channel is best at every load. Tokens of shakespeare2m-bytes were routed to 8 experts at random; the
# error at 3 bits on other tokens of the same expert, without shrinking, with 0.1, 0.3, 1 and 3 tokens per channel:
#   gate, 1 token per channel     0.0161   0.0129  0.0119  0.0114  0.0118
#   gate, 10.7 tokens             0.0098   0.0098  0.0098  0.0098  0.0099
#   down, 0.25 tokens             0.0344   0.0207  0.0188  0.0180  0.0182
#   down, 2 tokens                0.0176   0.0164  0.0156  0.0151  0.0155
PRIOR = 1.0
_POOLED = 2  # pooled tokens per input channel: enough for a Hessian of full rank
_LEAST_POOLED = 256
_CHUNK = 4096  # tokens in memory at once

Item = TypeVar("Item")


class RoutedInputs:
    """What every module of experts of a block received, in the order of the passes. Close it to delete the files."""

    def __init__(self, folder: Path, block: nn.Module, label: str = "here") -> None:
        """`folder`: for the files, whose names begin with a dot; `label` tells two records of one block apart."""
        self.received = {
            path: _Received(experts, folder / f".experts-{label}-{i}.f32")
            for i, (path, experts) in enumerate(experts_of(block).items())
        }

    def during(self, passes: Iterable[Item]) -> Iterator[Item]:
        """Iterate `passes`, each a pass of the block, and record them."""
        with self.listening():
            yield from passes
        for received in self.received.values():
            received.finish()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record every pass inside the context."""
        with ExitStack() as handles:
            for received in self.received.values():
                hook = partial(_hear, received)
                handles.callback(received.experts.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def close(self) -> None:
        """Delete the files."""
        for received in self.received.values():
            received.close()


@contextmanager
def routed_inputs(folder: Path, block: nn.Module, label: str = "here") -> Iterator[RoutedInputs]:
    """Hold a `RoutedInputs` and close it on exit, also after an error."""
    found = RoutedInputs(folder, block, label)
    try:
        yield found
    finally:
        found.close()


class _Received:
    """The inputs `[tokens, in]` of one module of experts on disk, and the experts chosen for each."""

    def __init__(self, experts: SplitExperts, path: Path) -> None:
        self.experts, self.path, self.tokens, self.width = experts, path, 0, 0
        self._file = path.open("wb")
        self._chosen: list[Tensor] = []
        self._rows: dict[int, Tensor] = {}

    def add(self, hidden: Tensor, chosen: Tensor | None) -> None:
        """Write the tokens of one pass."""
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        if chosen is None:  # sorted by expert: each token once for every expert that it goes to
            pairs = list(self.experts.rows_by_expert(flat))
            counts = [len(rows) for _, rows in pairs]
            numbers = torch.tensor([i for i, _ in pairs], dtype=torch.long)
            chosen = numbers.repeat_interleave(torch.tensor(counts, dtype=torch.long)).unsqueeze(1)
            flat = flat[torch.cat([rows for _, rows in pairs])] if pairs else flat[:0]
        self._chosen.append(chosen.detach().reshape(len(flat), -1).cpu())
        self._file.write(flat.float().cpu().contiguous().numpy().tobytes())
        self.tokens, self.width = self.tokens + len(flat), flat.shape[-1]

    def finish(self) -> None:
        """Sort the tokens by expert; no more are added."""
        self._file.flush()
        if self._chosen:
            self._rows = {i: tokens for i, tokens, _ in self.experts.routed(torch.cat(self._chosen))}

    def rows(self, expert: int) -> Tensor:
        """Numbers of the tokens that went to an expert."""
        return self._rows.get(expert, torch.zeros(0, dtype=torch.long))

    def spread(self, count: int) -> Tensor:
        """Numbers of about `count` tokens, evenly spread."""
        return torch.linspace(0, self.tokens - 1, min(count, self.tokens)).long()

    def read(self, rows: Tensor) -> Tensor:
        """Return these tokens `[len(rows), in]`."""
        matrix = np.memmap(self.path, np.float32, "r", shape=(self.tokens, self.width))
        return torch.from_numpy(matrix[rows.numpy()])

    def close(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


class ExpertStats(Mapping[str, LayerStats]):
    """Statistics of the experts' layers of a block by full path, computed when they are asked for.

    Ask expert by expert: those of one expert are kept. With the full-precision model alongside, the inputs of a
    down-projection are those behind the gate and up that are in place when it is asked for, so that it sees their
    errors; otherwise those behind the layers in place when the expert is first asked for. `events`: an entry for each
    layer whose expert got no token.
    """

    def __init__(
        self,
        block: LoadedBlock,
        here: RoutedInputs,
        full: RoutedInputs | None = None,
        *,
        hessian: bool,
        sample: int,
        device: torch.device,
    ) -> None:
        """`full`: the same tokens in the full-precision model, for drift. `sample`: tokens to keep per layer."""
        self._hessian, self._sample, self._device, self._pairs = hessian, sample, device, full is not None
        self.events: list[Event] = []
        self._places: dict[str, tuple[str, int, bool]] = {}
        for path, received in here.received.items():
            for name, (expert, kind) in received.experts.expert_layers().items():
                if (layer := f"{block.path}.{path}.{name}") in block.linears:
                    self._places[layer] = path, expert, kind == "down_proj"
        self._here, self._full = here.received, {} if full is None else full.received
        self._held: tuple[tuple[str, int], dict[bool, LayerStats]] | None = None
        self._pooled: tuple[str, LayerStats] | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> LayerStats:
        path, expert, down = self._places[name]
        if self._held is None or self._held[0] != (path, expert):
            self._held = (path, expert), {}
        found = self._held[1]
        for kind in (False, True):
            if kind not in found and (kind == down or not self._pairs):
                found[kind] = self._of(path, expert, kind, name)
        if not len(self._here[path].rows(expert)):
            detail = "no token was routed to this expert: it is solved on tokens of the other experts of its block"
            self.events.append(Event(name, "no calibration tokens", detail))
        return found[down]

    def smoothed(self, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return summed squared gradients `[out]` by layer, each expert's as if one token more had come to it.

        That token has the mean gradient of its block's experts. Otherwise an expert that none of the measured tokens
        reached would look worthless, and a budget would leave it at its least width.
        """
        kinds: dict[tuple[str, str], list[str]] = {}
        for name, (path, _, _) in self._places.items():
            kinds.setdefault((path, name.rpartition(".")[2]), []).append(name)
        found = dict(squares)
        for (path, _), names in kinds.items():
            tokens = sum(len(self._here[path].rows(self._places[name][1])) for name in names)
            known = [squares[name] for name in names if name in squares]
            if tokens and known:
                mean = torch.stack(known).sum(dim=0).mean() / tokens
                zeros = torch.zeros_like(known[0])
                found |= {name: squares.get(name, zeros) + mean for name in names}
        return found

    def _of(self, path: str, expert: int, down: bool, name: str) -> LayerStats:
        """Return the statistics of one expert's inputs or, with `down`, of what its down-projection reads."""
        here = self._here[path]
        if not here.tokens:
            return LayerStats(torch.zeros(0, 0), 0)
        rows = here.rows(expert)
        own = self._sums(path, expert, down, rows, name)
        pooled = self._pooled[1] if self._pooled is not None and self._pooled[0] == path and not down else None
        if pooled is None:
            width = here.experts.inner if down else here.width
            pooled = self._sums(path, expert, down, here.spread(max(_POOLED * width, _LEAST_POOLED)), name)
            assert pooled is not None
            if not down:
                self._pooled = path, pooled
        return pooled if own is None else shrunk(own, pooled)

    def _sums(self, path: str, expert: int, down: bool, rows: Tensor, name: str) -> LayerStats | None:
        """Sum over these tokens; None if there are none."""
        here, full = self._here[path], self._full.get(path)
        if full is not None and full.tokens != here.tokens:  # Llama 4 hands on routed tokens only
            full = None
        sums: InputSums | None = None
        for part in rows.split(_CHUNK):
            if not len(part):
                continue
            x = self._read(here, expert, down, part)
            if sums is None:
                sums = InputSums(x, self._sample, len(rows), hessian=self._hessian, drift=full is not None)
            sums.add(x, None if full is None else self._read(full, expert, down, part))
        return None if sums is None else sums.result(name)

    @torch.no_grad()
    def _read(self, received: _Received, expert: int, down: bool, rows: Tensor) -> Tensor:
        x = received.read(rows).to(self._device)
        return received.experts.hidden(expert, x) if down else x


def shrunk(own: LayerStats, pooled: LayerStats) -> LayerStats:
    """Return H_e + lambda H_pooled, of as many tokens as the sum counts for; the same for the drift.

    The sample is of the expert's own tokens, and of pooled ones where those outweigh them.
    """
    width = own.hessian.shape[0] if own.sample is None else own.sample.shape[1]
    extra = max(1, round(PRIOR * width))
    share = extra / pooled.tokens
    sample = own.sample
    if sample is not None and pooled.sample is not None and own.tokens < extra:
        sample = torch.cat([sample, pooled.sample[: extra - own.tokens]])
    drift = None if own.drift is None or pooled.drift is None else own.drift + share * pooled.drift
    return replace(
        own, hessian=own.hessian + share * pooled.hessian, tokens=own.tokens + extra, sample=sample, drift=drift
    )


def _hear(received: _Received, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    received.add(tensors[0], tensors[1] if len(tensors) > 1 else None)
