"""The recipe protocols: `Recipe` has the verbs that every recipe implements, the other protocols are optional.

Verbs take and return plain tensors. The loop asks a recipe for its `Needs` and the planner asks for its `PlanTerms`;
neither looks at a recipe's fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from bitquilt.core.budget import Budget, Scope
from bitquilt.core.training import Training
from bitquilt.core.types import Cost, Layer, LayerPlan, LayerStats, Layout, Solution


@dataclass(frozen=True)
class Needs:
    """Statistics that a recipe asks calibration for. The default asks for none, so the recipe runs without data.

    `hessian`: the sum of x x^T of each input. `sample`: an even subsample of the tokens. `drift`: the sum of
    (x_fp - x) x^T; `stream_drift`: the same for the residual stream; `full_outputs`: the outputs of the full-precision
    model's blocks, for training. These three run the full-precision model alongside the quantized one.
    `output_hessian`: replace the Hessian of the input by that at the output of the layer's sub-block, estimated by a
    backward pass per sequence with random signs; `attention_only`: do so in attention alone, other layers keep theirs.

    Raises ValueError for `stream_drift` without `drift` and `attention_only` without `output_hessian`.
    """

    hessian: bool = False
    sample: bool = False
    drift: bool = False
    stream_drift: bool = False
    full_outputs: bool = False
    output_hessian: bool = False
    attention_only: bool = False

    def __post_init__(self) -> None:
        if self.attention_only and not self.output_hessian:
            raise ValueError("attention_only restricts output_hessian, which is not asked for; set both")
        if self.stream_drift and not self.drift:
            raise ValueError("stream_drift is measured together with drift, which is not asked for; set both")

    @property
    def calibration(self) -> bool:
        """Whether the recipe reads calibration data."""
        return any(getattr(self, field.name) for field in fields(self))

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
    `own_widths`: widths, ascending, that the recipe's own rule gives out within `budget` where no plan is made; none
    where every layer then gets the same bits. `overshoot`: columns of a layer that may exceed the mean of `bits`.
    `zeros`: which zeros groups have: "middle" = half the range, which engines without zeros can hold; "blocks" = none,
    layers are stored in llama.cpp's blocks.
    """

    unit_columns: int
    budget: Budget | None
    scope: Scope | None = None
    plan_required: bool = False
    searches_ranges: bool = False
    own_widths: tuple[int, ...] = ()
    overshoot: int = 0
    zeros: str = "fitted"


class Recipe(Protocol):
    """A paper as four verbs: `prepare`, `measure`, `allocate`, `quantize`. A frozen dataclass of its hyper-parameters.

    `prepare` runs once for consecutive layers that read the same input; each of them gets its result.
    """

    name: ClassVar[str]

    @property
    def needs(self) -> Needs:
        """Statistics that calibration collects."""

    @property
    def training(self) -> Training:
        """Training of the layers once they are solved."""

    def prepare(self, stats: LayerStats | None) -> Any:
        """Do the work that all layers with this input share, such as factoring the Hessian."""

    def measure(self, layer: Layer, prepared: Any) -> Cost:
        """Return candidate plans for the layer and the loss of each."""

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """Choose a plan; no tensors."""

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Any) -> Solution:
        """Solve the layer with the chosen plan."""


@runtime_checkable
class ChecksLayers(Protocol):
    """A recipe whose budget depends on the shapes of the layers; it checks them before any work starts."""

    def check_layers(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ValueError naming the first layer that the recipe cannot quantize; `shapes`: `[out, in]` by path."""


@runtime_checkable
class Plannable(Recipe, Protocol):
    """A recipe whose bits a plan for the whole model can allocate before any layer is solved."""

    @property
    def plan_terms(self) -> PlanTerms:
        """How the recipe takes part in a plan."""

    def widths(self, out_features: int) -> tuple[int, ...]:
        """Code widths that a plan may use in a layer with `out_features` rows, ascending."""

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """Layout that `quantize` will store for `plan`. Only the type of scales outside float16's range may differ."""

    def rounded(self, layer: Layer, prepared: Any, bits: int) -> Tensor:
        """Round every group of the weight `[out, in]` at `bits` without compensation: fast, for loss tables."""

    def column_cost(self, layer: Layer, prepared: Any) -> Tensor:
        """Cost at the layer's output of a unit squared error in each column, per token `[in]`."""


@runtime_checkable
class RoundsInputs(Plannable, Protocol):
    """A plannable recipe that also rounds the inputs of layers. Its plans count columns in an order that depends on the
    inputs, so the planner measures with `LayerStats.sample`."""

    def column_order(self, layer: Layer, prepared: Any) -> Tensor:
        """Columns `[in]` in the order in which the groups of a plan hold them."""

    def input_error(self, layer: Layer, prepared: Any, bits: int) -> Tensor:
        """Mean squared rounding error of each input column `[in]` at `bits`: E[(x_j - Q(x_j))^2]."""


@runtime_checkable
class PlansModel(Protocol):
    """A recipe that plans all layers together after a first pass over the full-precision model."""

    def sense(self, layer: Layer, trace: float) -> dict[str, float]:
        """Return the numbers that `plan_model` needs of a layer; `trace`: trace of its sub-block's output Hessian."""

    def plan_model(self, sensed: Mapping[str, Mapping[str, float]]) -> dict[str, LayerPlan]:
        """Return a plan for each layer; no tensors. Raises ValueError if the budget cannot be met."""
