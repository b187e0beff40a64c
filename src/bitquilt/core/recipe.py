"""The verbs: what a recipe must be able to do (`Recipe`), and what it may do besides. Plain tensors in and out."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from bitquilt.core.types import (
    BlockProblem,
    Cost,
    Layer,
    LayerPlan,
    LayerStats,
    Layout,
    ModelProblem,
    Solution,
    TrainedLayers,
)


class Recipe(Protocol):
    """A paper as three verbs. A frozen dataclass whose fields are the paper's hyper-parameters.

    `prepare` runs once per distinct input, its result is handed to every layer that reads that input.
    """

    name: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """Of LayerStats: {"hessian", "sample"}; empty = no calibration at all. {"drift"}, and with it {"stream"} for
        stream_drift: the full-precision model runs beside, and a layer is measured after those before it are solved.
        {"full"}: it runs beside for a block's training."""
        ...

    def prepare(self, stats: LayerStats | None) -> Any:
        """Shared work of the layers that read one input."""
        ...

    def measure(self, layer: Layer, prepared: Any) -> Cost:
        """What would each way to spend the bits cost?"""
        ...

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """Choose; no tensors."""
        ...

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Any) -> Solution:
        """Solve the layer for the chosen plan."""
        ...


@runtime_checkable
class TrainsBlocks(Protocol):
    """A recipe that trains the layers of a block together once each is solved."""

    @property
    def train_batch(self) -> int:
        """Samples that go through the block at once, a power of two; 0 = no training this time."""
        ...

    def train_block(self, problem: BlockProblem) -> TrainedLayers:
        """Raise ValueError if the block cannot be trained."""
        ...


@runtime_checkable
class TunesModel(Protocol):
    """A recipe that trains all blocks together once they are done."""

    @property
    def tune_batch(self) -> int:
        """Samples that go through the model at once, a power of two; 0 = no tuning this time."""
        ...

    @property
    def tune_bytes(self) -> int:
        """Memory that tuning takes per weight of the quantized layers, beside a block's own training."""
        ...

    def keep(self, solution: Solution) -> dict[str, Tensor]:
        """What tuning needs of a solved layer beside what is stored."""
        ...

    def tune(self, problem: ModelProblem) -> TrainedLayers:
        """Raise ValueError if the model cannot be trained."""
        ...


@runtime_checkable
class ChecksLayers(Protocol):
    """A recipe whose budget depends on the layers' shapes: asked before the expensive step."""

    def check_layers(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ValueError naming the first layer, `[out, in]` by path, that the recipe cannot serve."""
        ...


@runtime_checkable
class Plannable(Protocol):
    """A recipe whose bits can be given out by a plan for the whole model, before a layer is solved."""

    def widths(self, out_features: int) -> tuple[int, ...]:
        """Code widths a plan may use in a layer of so many rows, ascending."""
        ...

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """What `quantize` will store for `plan`: exact, but for the type of scales out of float16's range."""
        ...

    def rounded(self, layer: Layer, prepared: Any, bits: int) -> Tensor:
        """The weight `[out, in]` with every group rounded at `bits`, without compensation: fast, for tables of loss."""
        ...

    def column_cost(self, layer: Layer, prepared: Any) -> Tensor:
        """What a squared error in each column `[in]` costs at the layer's output, per token."""
        ...


@runtime_checkable
class RoundsInputs(Protocol):
    """A plannable recipe whose layers round their inputs too, and whose plans count the columns in an order that the
    inputs give. While its tables are made `LayerStats.sample` is there."""

    def column_order(self, layer: Layer, prepared: Any) -> Tensor:
        """The columns `[in]` in the order in which a plan's groups hold them."""
        ...

    def input_error(self, layer: Layer, prepared: Any, bits: int) -> Tensor:
        """E[(x_j - x_j rounded at `bits`)^2] of each column `[in]`."""
        ...


@runtime_checkable
class PlansModel(Protocol):
    """A recipe that plans all layers together: each is looked at in a first pass over the full-precision model."""

    def sense(self, layer: Layer, trace: float) -> dict[str, float]:
        """Numbers that `plan_model` needs of a layer; `trace`: of the Hessian at its sub-block's output."""
        ...

    def plan_model(self, sensed: Mapping[str, Mapping[str, float]]) -> dict[str, LayerPlan]:
        """A plan for each layer; no tensors. Raises ValueError if the budget cannot be met."""
        ...
