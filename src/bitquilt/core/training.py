"""What a recipe that trains is handed and returns: `BlockProblem`, `ModelProblem` and `TrainedLayers`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bitquilt.core.types import Event, LayerPlan, Solution


@dataclass(frozen=True, eq=False)
class BlockProblem:
    """A block whose layers are solved, to be trained as a whole. `plans` and `solutions` by layer.

    `forward` (weights `[out, in]` by layer, `[batch, tokens, width]`) -> the block's output with these weights; for
    lists of sample numbers below `count`: `inputs`, what the block reads in the quantized model, `outputs`, what the
    full-precision block makes of it, and `full_outputs`, its output in the full-precision model. `told`: after every
    epoch, how many are done, of how many, and the loss.
    """

    name: str
    plans: Mapping[str, LayerPlan]
    solutions: Mapping[str, Solution]
    forward: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    count: int
    inputs: Callable[[Sequence[int]], Tensor]
    outputs: Callable[[Sequence[int]], Tensor]
    full_outputs: Callable[[Sequence[int]], Tensor]
    told: Callable[[int, int, float], None] = lambda done, of, loss: None


@dataclass(frozen=True, eq=False)
class ModelProblem:
    """A model whose blocks are solved, to be trained as a whole. `plans` and `solutions` by layer, `Solution.details`
    being what the recipe's `keep` kept of it.

    `blocks`: each block's function, as in `BlockProblem`, and its layers, in order. `targets`: what the last block
    returns in the full-precision model; `loss` (the same of the trained one, target) -> mean KL of the model's output,
    nats per token. `told` as in `BlockProblem`.
    """

    plans: Mapping[str, LayerPlan]
    solutions: Mapping[str, Solution]
    blocks: tuple[tuple[Callable[[Mapping[str, Tensor], Tensor], Tensor], tuple[str, ...]], ...]
    count: int
    inputs: Callable[[Sequence[int]], Tensor]
    targets: Callable[[Sequence[int]], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    told: Callable[[int, int, float], None] = lambda done, of, loss: None


@dataclass(frozen=True, eq=False)
class TrainedLayers:
    """Trained layers, and the loss on samples not trained on: at the start, the best, by epoch. Of a block its error
    relative to its output, of a model its KL. `notes`: plain values for the report."""

    solutions: Mapping[str, Solution]
    events: tuple[Event, ...]
    start_loss: float
    loss: float
    losses: tuple[float, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)
