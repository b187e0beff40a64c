"""How a recipe trains solved layers: `Training`, what it is handed (`BlockProblem`, `ModelProblem`) and what it returns
(`TrainedLayers`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bitquilt.core.types import Event, LayerPlan, Solution


@dataclass(frozen=True, eq=False)
class BlockProblem:
    """A block whose layers are solved, to be trained as a whole. `plans` and `solutions` are by layer.

    `forward(weights, hidden)` returns the block's output with these weights `[out, in]` by layer, `hidden` being
    `[batch, tokens, width]`. Three functions take sample numbers below `count`: `inputs` returns what the block reads
    in the quantized model, `outputs` what the full-precision block returns for that input, `full_outputs` the block's
    output in the full-precision model. `told(done, of, loss)` is called after every epoch.
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
    """A model whose blocks are solved, to be trained as a whole. `plans` and `solutions` are by layer; each
    `Solution.details` holds what the recipe's `keep` returned.

    `blocks`: the `forward` of each block, as in `BlockProblem`, and the names of its layers, in order. `targets`
    returns the last block's output in the full-precision model. `loss(output, target)` is the mean KL divergence of
    the model's output in nats per token. `told` is that of `BlockProblem`.
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
    """Trained layers and their loss on held-out samples: at the start, the best, and after each epoch.

    The loss of a block is its error relative to its output; the loss of a model is its KL divergence. `notes`: plain
    values for the report."""

    solutions: Mapping[str, Solution]
    events: tuple[Event, ...]
    start_loss: float
    loss: float
    losses: tuple[float, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockTraining:
    """Training of a block's layers together, after each is solved. `batch`: samples per step, a power of two.

    `run` raises ValueError if the block cannot be trained.
    """

    batch: int
    run: Callable[[BlockProblem], TrainedLayers]


@dataclass(frozen=True)
class ModelTraining:
    """Training of all blocks together, after the last one is done. `batch`: samples per step, a power of two.

    `weight_bytes`: bytes of memory per quantized weight, in addition to the training of one block. `keep` returns the
    tensors of a solved layer that training needs and the checkpoint does not store. `run` raises ValueError if the
    model cannot be trained.
    """

    batch: int
    run: Callable[[ModelProblem], TrainedLayers]
    weight_bytes: int
    keep: Callable[[Solution], dict[str, Tensor]]


@dataclass(frozen=True)
class Training:
    """The training that follows a recipe's solving, by block and in the whole model; None: no training there."""

    block: BlockTraining | None = None
    model: ModelTraining | None = None
