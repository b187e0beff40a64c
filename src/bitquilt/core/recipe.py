"""The recipe protocol: `Recipe` has the verbs every recipe implements, the other protocols the optional ones.

Plain tensors in and out. `Needs` and `PlanTerms` are the values by which the loop and the planner ask a recipe what it
is: neither looks at a recipe's fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from bitquilt.core.budget import Budget, Scope
from bitquilt.core.training import BlockProblem, ModelProblem, TrainedLayers
from bitquilt.core.types import Cost, Layer, LayerPlan, LayerStats, Layout, Solution


@dataclass(frozen=True)
class Probes:
    """Random-sign backward passes that estimate the Hessian at the output of a layer's sub-block.

    `count`: passes per sequence. `seed`: of the signs. `feed_forward_at_layer`: measure layers outside the attention at
    their own output instead.
    """

    count: int = 1
    seed: int = 0
    feed_forward_at_layer: bool = False


@dataclass(frozen=True)
class Needs:
    """What a recipe asks calibration for. The default asks for nothing, so the recipe runs without calibration.

    `hessian`: the sum of x x^T of each input. `sample`: an even subsample of the tokens. `drift`: the sum of
    (x_fp - x) x^T; `stream_drift`: the same for the residual stream; `full_outputs`: the outputs of the full-precision
    model's blocks, for training. These three run the full-precision model alongside the quantized one.
    `output_hessian`: replace the Hessian of the input by that at the output of the layer's sub-block, estimated by
    `probes`.

    Raises ValueError for `stream_drift` without `drift`.
    """

    hessian: bool = False
    sample: bool = False
    drift: bool = False
    stream_drift: bool = False
    full_outputs: bool = False
    output_hessian: bool = False
    probes: Probes = Probes()

    def __post_init__(self) -> None:
        if self.stream_drift and not self.drift:
            raise ValueError("stream_drift is measured together with drift: ask for both")

    @property
    def calibration(self) -> bool:
        """Whether calibration data is read at all."""
        return any(getattr(self, field.name) for field in fields(self) if field.name != "probes")

    @property
    def full_model(self) -> bool:
        """Whether the full-precision model runs alongside the quantized one."""
        return self.drift or self.full_outputs


@dataclass(frozen=True)
class PlanTerms:
    """How a recipe takes part in a plan for the whole model.

    `unit_columns`: columns that one digit of a plan covers: a column group, or 1 for recipes that give bits to single
    channels. `budget`: the bits the recipe is set to; None where calibration data decides. `scope`: the allocation used
    for a budget unless the caller names another. `plan_required`: the recipe cannot choose bits layer by layer.
    `searches_ranges`: quantizing searches the range of each group, which takes longer.
    """

    unit_columns: int
    budget: Budget | None
    scope: Scope | None = None
    plan_required: bool = False
    searches_ranges: bool = False


class Recipe(Protocol):
    """A paper as three verbs. A frozen dataclass whose fields are the paper's hyper-parameters.

    `prepare` runs once per distinct input, its result is handed to every layer that reads that input.
    """

    name: ClassVar[str]

    @property
    def needs(self) -> Needs:
        """What calibration has to collect."""
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
class Plannable(Recipe, Protocol):
    """A recipe whose bits a plan for the whole model can allocate before any layer is solved."""

    @property
    def plan_terms(self) -> PlanTerms:
        """How the recipe takes part in such a plan."""
        ...

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
class RoundsInputs(Plannable, Protocol):
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
