"""APTQ-style mixed precision (arXiv 2402.14866, DAC 2024): layers of 2 or 4 bits, by how much they hurt attention.

1. a first pass over the full-precision model: the trace of every layer's Gauss-Newton Hessian at the output of its
   sub-block, softmax included, by one backward pass per sequence with random signs (`layer.sensitivity.attention`);
2. layers in falling trace per weight get 4 bits while the mean stays within the target, the rest 2;
3. a GPTQ sweep of each layer with that Hessian (B / out, its mean diagonal row block) instead of the input's.

Why "-style": the publication's closed forms, calibration and tables were not reachable and there is no public code.
Published: the loss at the attention output, a Levenberg-Marquardt Hessian, its trace as the sensitivity, 2 and 4 bits.
Ours: the estimator, the trace per weight, damp, group size, min-max ranges. Deviation, undone by `published=True`:
feed-forward layers are measured at their sub-block's output, in the units of the attention layers, instead of at their
own. `published=True` also refuses what the publication lacks: other allocations or widths, searched or trained ranges.
A budget for the whole model (`--size`, `--vram`, `--allocation layers`) gives the palette's widths to layers by the
tables of loss that all recipes share, instead of by the trace.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from bitquilt.allocation.by_trace import by_trace, by_weighted_error
from bitquilt.core.budget import Budget
from bitquilt.core.packing import storage_bits
from bitquilt.core.recipe import Needs, PlanTerms
from bitquilt.core.training import Training
from bitquilt.core.types import (
    Cost,
    Layer,
    LayerPlan,
    LayerStats,
    Layout,
    Solution,
    check_finite,
    group_slices,
    uniform_plan,
)
from bitquilt.layer.grids.uniform import MIN_MAX, RangeSearch, scale_dtype_for
from bitquilt.layer.grouped_weight import fit_ranges, live_weight, solve
from bitquilt.layer.hessian import Factor, check_damp, factorize
from bitquilt.layer.layouts import check_group_size, grouped_layout
from bitquilt.layer.nearest import COARSE, round_groups
from bitquilt.recipes.shared.clipping import ClippingMode, clipping_training
from bitquilt.recipes.shared.traits import Traits, check_bpw, check_mean, check_palette

LayerAllocation = Literal["trace", "hawq2"]


@dataclass(frozen=True)
class APTQ:
    """Options of APTQ. KL figures: babyllama at about 2.6 bits per weight (docs/results.md).

    `bits`: mean over the weights of all layers, any number that the palette reaches; never exceeded.
    `bpw`: instead, true bits per weight of all layers in the blocks together, scales and zeros included; never
    exceeded.
    `published`: measure feed-forward layers at their own output, as GPTQ does. The other options then keep their
    defaults, which are the paper's where it is known: 2 and 4 bits by the trace, with a mean of 3.8.
    `group_size`: input columns that share a scale and a zero.
    `damp`: added to the Hessian's diagonal, as a share of its mean; 0.01 as in GPTQ.
    `palette`: widths that a layer may have, two for "trace". A layer outside the blocks (`--include-head`) takes the
    highest.
    `allocation`: "trace" as published, KL 0.575; "hawq2" = least sum of trace per weight times |W - Q_b(W)|^2, exact,
    over any palette, 0.428 with palette (2, 3, 4) and scale search.
    `scale_search`: search each range instead of taking min and max; on `gptq` at that size KL 0.696 to 0.519.
    `clipping`: "trained" trains the ranges of each block after the sweep; codes and bytes stay. At 2 bits with scale
    search on stories260k: KL 1.900 to 1.528.
    """

    name: ClassVar[str] = "aptq"
    traits: ClassVar[Traits] = Traits(fractional=True, own_allocations=get_args(LayerAllocation))

    bits: float = 3.8
    bpw: float | None = None
    published: bool = False
    group_size: int = 128
    damp: float = 0.01
    palette: tuple[int, ...] = (2, 4)
    allocation: LayerAllocation = "trace"
    scale_search: bool = False
    clipping: ClippingMode = "solved"

    @property
    def needs(self) -> Needs:
        """The Hessian at the output of the sub-blocks, and the block's outputs if clipping is trained."""
        trained = self.clipping == "trained"
        return Needs(hessian=True, output_hessian=True, attention_only=self.published, full_outputs=trained)

    @property
    def plan_terms(self) -> PlanTerms:
        """One width per layer, as published, at the recipe's mean."""
        budget = Budget.of(bits=self.bits) if self.bpw is None else Budget.of(bpw=self.bpw)
        return PlanTerms(
            self.group_size, budget, scope="layers", searches_ranges=self.scale_search, own_widths=self.palette
        )

    def check(self) -> None:
        """Raise ValueError naming the first field that cannot work, before any layer is read."""
        check_palette(self.palette, least=2)
        own = {"palette": (2, 4), "allocation": "trace", "scale_search": False, "clipping": "solved"}
        for option, value in own.items() if self.published else ():
            if (given := getattr(self, option)) != value:
                raise ValueError(f"{option} is {given}; published=true has {value}: leave out one of both")
        if self.allocation == "trace" and len(self.palette) != 2:
            raise ValueError(f"palette is {self.palette}; allocation=trace takes two widths, hawq2 any number")
        if self.bpw is None:
            check_mean(self.bits, self.palette)
        check_bpw(self.bpw)
        check_group_size(self.group_size)
        check_damp(self.damp)

    def check_layers(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ValueError if the layers, `[out, in]` by path, cannot have `bpw` together."""
        self.check()
        if self.bpw is None or not shapes:
            return
        costs = [self._stored(*shape) for shape in shapes.values()]
        weights = sum(rows * columns for rows, columns in shapes.values())
        least, most = (sum(cost[b] for cost in costs) / weights for b in (self.palette[0], self.palette[-1]))
        if not least <= self.bpw <= most:
            raise ValueError(
                f"bpw is {self.bpw:g}; with palette {self.palette} and groups of {self.group_size} these layers reach "
                f"{least:.3f} to {most:.3f}"
            )

    def sense(self, layer: Layer, trace: float) -> dict[str, float]:
        """Size, trace and with "hawq2" the squared error at each width. Raises ValueError if a weight is not finite."""
        check_finite(layer.name, weight=layer.weight)
        found = {"in_features": float(layer.weight.shape[1]), "weights": float(layer.weight.numel()), "trace": trace}
        if self.allocation == "hawq2":
            dtype, fit_group = scale_dtype_for(layer.weight), fit_ranges(None, self._search)
            for bits in self.palette:
                error = 0.0
                for group in group_slices(layer.weight.shape[1], self.group_size):
                    part = layer.weight[:, group]
                    rounded = fit_group(group, part, bits, dtype).quantize(part)
                    error += float((part - rounded).double().square().sum())
                found[f"error_{bits}"] = error
        return found

    def plan_model(self, sensed: Mapping[str, Mapping[str, float]]) -> dict[str, LayerPlan]:
        """Bits by layer. Raises ValueError if a trace is not a finite number or no map is within the budget."""
        costs, budget = self._costs(sensed)
        per_weight = {name: value["trace"] / value["weights"] for name, value in sensed.items()}
        if self.allocation == "hawq2":
            errors = {
                name: {bits: per_weight[name] * value[f"error_{bits}"] for bits in self.palette}
                for name, value in sensed.items()
            }
            bits = by_weighted_error(errors, costs, budget)
        else:
            bits = by_trace(per_weight, costs, budget)
        return {name: uniform_plan(int(sensed[name]["in_features"]), bits[name], self.group_size) for name in sensed}

    def prepare(self, stats: LayerStats | None) -> Factor:
        """Factor the Hessian of the sub-block's output."""
        assert stats is not None
        return factorize(stats.hessian / stats.tokens, self.damp)

    def measure(self, layer: Layer, prepared: Factor) -> Cost:
        """The highest width, for a layer outside the model's plan."""
        return Cost((uniform_plan(layer.weight.shape[1], self.palette[-1], self.group_size),), (0.0,))

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """The one plan."""
        return cost.plans[0]

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Factor) -> Solution:
        """Sweep the layer. Raises ValueError naming the layer if a weight is NaN or Inf."""
        return solve(layer, plan, prepared, fit_ranges(prepared.importance, self._search), damp=self.damp)

    @property
    def training(self) -> Training:
        """Trained clipping on request."""
        return clipping_training(self.clipping)

    def widths(self, out_features: int) -> tuple[int, ...]:
        """The palette."""
        return self.palette

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """The layout in which `quantize` stores a plan."""
        return grouped_layout(out_features, in_features, plan.bits, plan.group_size)

    def rounded(self, layer: Layer, prepared: Factor, bits: int) -> Tensor:
        """The weight with every group at `bits`."""
        search = COARSE if self.scale_search else MIN_MAX
        return round_groups(live_weight(layer, prepared), bits, self.group_size, prepared.importance, search)

    def column_cost(self, layer: Layer, prepared: Factor) -> Tensor:
        """1 / U_jj^2: later columns compensate."""
        return prepared.importance

    def _costs(self, sensed: Mapping[str, Mapping[str, float]]) -> tuple[dict[str, dict[int, int]], float]:
        """Size of each layer at each width, and the budget; both in bits of codes, or with `bpw` in stored bits."""
        weights = sum(int(value["weights"]) for value in sensed.values())
        if self.bpw is None:
            return {n: {b: b * int(v["weights"]) for b in self.palette} for n, v in sensed.items()}, self.bits * weights
        shapes = {n: (int(v["weights"] / v["in_features"]), int(v["in_features"])) for n, v in sensed.items()}
        return {n: self._stored(*shape) for n, shape in shapes.items()}, self.bpw * weights

    def _stored(self, out_features: int, in_features: int) -> dict[int, int]:
        """Stored bits of a layer at each width."""
        groups = len(group_slices(in_features, self.group_size))
        return {
            b: storage_bits(grouped_layout(out_features, in_features, (b,) * groups, self.group_size))
            for b in self.palette
        }

    @property
    def _search(self) -> RangeSearch:
        return RangeSearch() if self.scale_search else MIN_MAX
