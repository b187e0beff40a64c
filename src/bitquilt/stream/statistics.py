"""`collect` measures the inputs of linear layers on calibration tokens and returns `LayerStats` by layer."""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from bitquilt.core.types import LayerStats, all_finite
from bitquilt.errors import UserError
from bitquilt.model.hooks import hooked


class InputSums:
    """Running sums over one input `[..., in]`, shared by every layer that reads the same tensor."""

    def __init__(self, x: Tensor, sample: int, tokens: int, *, hessian: bool = True, drift: bool = False) -> None:
        """`x`: an input, for width and device. `sample`: about how many of `tokens` tokens to keep."""
        self.width = x.shape[-1]
        square = (self.width, self.width)
        self._hessian = torch.zeros(square, device=x.device) if hessian else None
        self._drift = torch.zeros(square, device=x.device) if drift else None
        self._stride = max(1, -(-tokens // sample)) if sample else tokens + 1
        self._limit, self._tokens, self._kept = sample, 0, list[Tensor]()

    def add(self, x: Tensor, full: Tensor | None = None) -> None:
        """Add the tokens `x` and compare them with `full`, the same tokens in the full-precision model."""
        flat = x.detach().reshape(-1, self.width).float()
        if self._hessian is not None:
            self._hessian.addmm_(flat.t(), flat)
        if self._drift is not None and full is not None:
            theirs = full.detach().reshape(-1, self.width).float()
            if theirs.shape != flat.shape:  # the two models route the tokens differently
                self._drift = None
            else:
                self._drift.addmm_((theirs - flat).t(), flat)
        # every stride-th token of the stream, whatever the batch size
        first = -self._tokens % self._stride
        kept = sum(len(rows) for rows in self._kept)
        if kept < self._limit:
            self._kept.append(flat[first :: self._stride][: self._limit - kept].clone())
        self._tokens += len(flat)

    def result(self, name: str, *more: Tensor) -> LayerStats:
        """Return the sums so far. Raises UserError naming the layer if they, or `more`, hold NaN or Inf."""
        matrix = torch.zeros(0, 0) if self._hessian is None else self._hessian
        found = LayerStats(matrix, self._tokens, torch.cat(self._kept) if self._kept else None, self._drift)
        for tensor in (found.hessian, found.sample, found.drift, *more):
            if tensor is not None and not all_finite(tensor):
                raise UserError(
                    f"the input of layer {name} holds NaN or Inf; calibrate a model whose activations are finite"
                )
        return found


def collect(
    linears: Mapping[str, nn.Module], batches: Iterable[object], *, hessian: bool, sample: int, tokens: int
) -> dict[str, LayerStats]:
    """Measure the inputs of `linears` by name while iterating `batches` sends `tokens` tokens through the block.

    Each item of `batches` is one forward pass. `sample`: about how many tokens to keep per input. Layers that read the
    same tensor object share one `LayerStats`; a layer that saw no token has `tokens` = 0. Raises UserError naming the
    layer whose input held NaN or Inf.
    """
    sums: dict[str, InputSums] = {}
    leader_of: dict[str, str] = {}
    leaders: dict[int, tuple[Tensor, str]] = {}

    def read(name: str, x: Tensor) -> None:
        # the reference in `leaders` keeps the tensor alive, so its id cannot be reused within one forward pass
        leader = leader_of.setdefault(name, leaders.get(id(x), (x, name))[1])
        if leader != name:
            return
        leaders[id(x)] = (x, name)
        if name not in sums:
            sums[name] = InputSums(x, sample, tokens, hessian=hessian)
        sums[name].add(x)

    with hooked(before=[(module, partial(read, name)) for name, module in linears.items()]):
        for _ in batches:
            leaders.clear()
    shared = {name: added.result(name) for name, added in sums.items()}
    unseen = LayerStats(torch.zeros(0, 0), 0)
    return {name: shared[leader_of[name]] if name in leader_of else unseen for name in linears}
