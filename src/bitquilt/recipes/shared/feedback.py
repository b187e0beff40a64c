"""What the recipes that sweep with error feedback share: `gptq`, `slim-llm`, `quilt`."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from bitquilt.core.recipe import Needs
from bitquilt.core.types import Layer, LayerPlan, LayerStats, Solution
from bitquilt.layer.grouped_weight import FitColumns, live_weight, protect, solve, unprotected_event
from bitquilt.layer.hessian import Factor
from bitquilt.layer.target import check_feedback, corrected, layer_factor


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """`damp`: share of the Hessian's mean diagonal. `alpha`, `stream_alpha`: how much of the error of earlier layers,
    at the layer's input and in the residual stream it writes into, the layer repairs (`solvers.target`); above 0 the
    full-precision model runs beside. `group_order`: whole groups in descending Hessian diagonal, their columns
    likewise, each grid fitted when its group is reached. `passes`: of coordinate descent over the codes afterwards."""

    group_size: int = 128
    damp: float = 0.01
    group_order: bool = False
    alpha: float = 0.0
    stream_alpha: float = 0.0
    passes: int = 0

    @property
    def needs(self) -> Needs:
        """The Hessian, and with a full-precision target the drift of the inputs."""
        repairs = bool(self.alpha or self.stream_alpha)
        return Needs(hessian=True, drift=repairs, stream_drift=bool(self.stream_alpha))

    def check_sweep(self, hessian: str = "input") -> None:
        """Raise ValueError naming the field that cannot work."""
        check_feedback(self.alpha, self.stream_alpha, self.passes, hessian)

    def prepare(self, stats: LayerStats | None) -> Factor:
        """Factor the Hessian once for all layers that read this input."""
        assert stats is not None
        return layer_factor(stats, self.damp, self.group_size if self.group_order else None)

    def column_cost(self, layer: Layer, prepared: Factor) -> Tensor:
        """1 / U_jj^2: later columns compensate."""
        return prepared.importance

    def swept(
        self,
        layer: Layer,
        plan: LayerPlan,
        prepared: Factor,
        fitter: Callable[[Tensor, Factor], FitColumns],
        *,
        act_order: bool = False,
        outliers: tuple[float, float] = (0.0, 0.0),
    ) -> Solution:
        """Solve the layer with the grids that `fitter` (live weight, factor) finds; `outliers`: the shares kept in half
        precision, by contribution and by error. Raises ValueError naming the layer if a weight is NaN or Inf."""
        assert layer.stats is not None
        if self.group_order and plan.group_size != self.group_size:  # a plan made with other groups
            prepared = layer_factor(layer.stats, self.damp, plan.group_size)
        layer, events = corrected(layer, prepared, self.alpha, self.stream_alpha)
        fit = fitter(live_weight(layer, prepared), prepared)
        protected = protect(layer, plan, prepared, fit, *outliers)
        solution = solve(
            layer, plan, prepared, fit, damp=self.damp, act_order=act_order, protected=protected, passes=self.passes
        )
        unprotected = unprotected_event(layer.name, layer.weight, *outliers)
        return replace(solution, events=(*events, *solution.events, *unprotected))
