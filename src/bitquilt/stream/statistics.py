"""What does calibration say about each linear layer's input? collect(linears, batches) -> LayerStats by layer."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bitquilt.core.types import LayerStats


@dataclass
class Accumulator:
    """Running sums of one input; every layer that reads the same tensor shares it."""

    width: int
    stride: int
    limit: int
    hessian: Tensor | None
    drift: Tensor | None = None
    tokens: int = 0
    rows: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, full: Tensor | None = None) -> None:
        """Tokens `[..., in]`, and beside them what the full-precision model's layer reads."""
        flat = x.detach().reshape(-1, self.width).float()
        if self.hessian is not None:
            self.hessian.addmm_(flat.t(), flat)
        if self.drift is not None and full is not None:
            theirs = full.detach().reshape(-1, self.width).float()
            if theirs.shape != flat.shape:  # routed differently in the two models: nothing to compare
                self.drift = None
            else:
                self.drift.addmm_((theirs - flat).t(), flat)
        # every stride-th token of the stream, whatever the batch size
        first = -self.tokens % self.stride
        kept = sum(len(rows) for rows in self.rows)
        if kept < self.limit:
            self.rows.append(flat[first :: self.stride][: self.limit - kept].clone())
        self.tokens += len(flat)

    def result(self) -> LayerStats:
        """The sums so far."""
        matrix = self.hessian if self.hessian is not None else torch.zeros(0, 0)
        return LayerStats(matrix, self.tokens, torch.cat(self.rows) if self.rows else None, self.drift)


def stride_for(sample: int, tokens: int) -> int:
    """Every which token to keep, for about `sample` of `tokens`."""
    return max(1, -(-tokens // sample)) if sample else tokens + 1


def collect(
    linears: Mapping[str, nn.Module],
    batches: Iterable[object],
    *,
    hessian: bool,
    sample: int,
    tokens: int,
) -> dict[str, LayerStats]:
    """Statistics of the inputs of `linears` (name -> module) while iterating `batches` sends `tokens` tokens through
    the block, one forward pass per item.

    `sample`: about how many tokens to keep per input. Layers that are handed the same tensor object share one
    `LayerStats`. A layer that saw no token has `tokens` = 0. Raises ValueError naming the layer whose input held
    NaN or Inf.
    """
    stride = stride_for(sample, tokens)
    accumulators: dict[str, Accumulator] = {}
    leader_of: dict[str, str] = {}
    seen: dict[int, tuple[Tensor, str]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            # the reference in `seen` keeps the tensor alive, so its id cannot be reused within one forward pass
            leader = leader_of.setdefault(name, seen.get(id(x), (x, name))[1])
            if leader != name:
                return
            seen[id(x)] = (x, name)
            if name not in accumulators:
                width = x.shape[-1]
                zeros = torch.zeros(width, width, device=x.device) if hessian else None
                accumulators[name] = Accumulator(width, stride, sample, zeros)
            accumulators[name].add(x)

        return before

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        for _ in batches:
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    return _results(linears, accumulators, leader_of)


def _results(
    linears: Mapping[str, nn.Module], accumulators: Mapping[str, Accumulator], leader_of: Mapping[str, str]
) -> dict[str, LayerStats]:
    shared = {name: sums.result() for name, sums in accumulators.items()}
    for name, stats in shared.items():
        check_statistics(name, stats)
    unseen = LayerStats(torch.zeros(0, 0), 0)
    return {name: shared[leader_of[name]] if name in leader_of else unseen for name in linears}


def check_statistics(name: str, stats: LayerStats, *more: Tensor) -> None:
    """Raise ValueError naming the layer if its input held NaN or Inf."""
    found = (stats.hessian, stats.sample, stats.drift, *more)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found if tensor is not None):
        raise ValueError(f"the input of layer {name} holds NaN or Inf")
