"""MicroMix (arXiv 2508.02343, ICLR 2026): microscaling formats for weights AND activations, by a closed form.

1. every element of the calibration tokens falls into a band: 4, 6 or 8 bits, by where the format's worst error stays
   within that of per-token INT8;
2. the shares of the bands are the sizes of three parts of the channels, which are ordered by mean magnitude;
3. each part of the weight is rounded to its format, and so is the part of the input that meets it, as it comes.

As the paper says where its public code differs: magnitudes, not signed values; shares in their right order; a part's
weights in the part's format. Deviations: the scale is the code's (`scale_rule="ceil"`, 36 % less FP4 error on Gaussian
blocks than the paper's); shares and order come from an even sample of 4096 tokens; parts are whole multiples of 32
channels where 128 does not divide the layer, and padded elements are not stored. Layers of one input share the parts.
Beyond the paper: `thresholds="exact"`, from the formats' true worst errors (the published T(4) is 1.9 times stricter
than its own criterion needs, T(6) 1.6 % too loose); `bits`, a mean reached by scaling both thresholds, per input,
because one block is in memory at a time; one budget for the whole model, blocks of 32 channels by what they cost it.
A plan counts blocks of channels from the loudest on, not columns: which channels these are calibration says. Not
offered: smoothing, a quantized KV cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from bitquilt.core.budget import Budget
from bitquilt.core.packing import bits_per_weight
from bitquilt.core.recipe import Needs, PlanTerms
from bitquilt.core.types import (
    Cost,
    Event,
    Format,
    Layer,
    LayerPlan,
    LayerStats,
    Layout,
    Permutation,
    QuantizedWeight,
    Solution,
    check_finite,
    uniform_plan,
)
from bitquilt.layer.grids.mx import MXGrid, element_for, fit_mx, mx_format, worst_ratio
from bitquilt.layer.sensitivity.activation import Partition, exact_threshold, partition, published_threshold
from bitquilt.ops.microscaling import BLOCK, ScaleRule, quantize_blocks

_WIDTHS = (4, 6, 8)


@dataclass(frozen=True)
class MicroMix:
    """`multiplier`: of both thresholds (0: nearly all FP8, large: all FP4); or `bits`: the mean of the bands to reach,
    before parts are rounded up to `alignment` channels; or `bpw`: true bits per weight of every layer, scales and the
    order of its channels included, met from below to one part of `alignment` channels. `six`: the 6-bit element.
    `runs`: channels are ranked by the loudest of that many runs of the sampled tokens (1: by the mean of all).
    `quantize_activations`: False keeps the input as it is.
    """

    name: ClassVar[str] = "micromix"
    needs: ClassVar[Needs] = Needs(sample=True)
    fractional: ClassVar[bool] = True

    bits: float | None = None
    bpw: float | None = None
    multiplier: float = 1.0
    scale_rule: ScaleRule = "ceil"
    thresholds: Literal["published", "exact"] = "published"
    six: Literal["e3m2", "e2m3"] = "e3m2"
    runs: int = 32
    alignment: int = 128
    quantize_activations: bool = True

    @property
    def plan_terms(self) -> PlanTerms:
        """MX blocks at the recipe's mean; without one, the thresholds decide."""
        return PlanTerms(BLOCK, Budget.of(bits=self.bits, bpw=self.bpw))

    def check(self) -> None:
        """Raise ValueError naming the first field that cannot work, before any layer is read."""
        if self.bits is not None and not _WIDTHS[0] <= self.bits <= _WIDTHS[-1]:
            raise ValueError(f"bits is {self.bits:g}; MX elements have 4, 6 or 8, so their mean is 4 to 8")
        if not 0 <= self.multiplier < float("inf"):
            raise ValueError(f"multiplier is {self.multiplier}; wanted 0 or more")
        if (self.bits is not None or self.bpw is not None) and self.multiplier != 1.0:
            raise ValueError("bits, bpw and multiplier all scale the thresholds; give one")
        if self.bpw is not None and not self.bpw > 0:
            raise ValueError(f"bpw is {self.bpw}; wanted true bits per weight above 0, such as 4.5")
        if self.runs < 1:
            raise ValueError(f"runs is {self.runs}; wanted at least 1")
        if self.alignment < BLOCK or self.alignment % BLOCK:
            raise ValueError(f"alignment is {self.alignment}; wanted a positive multiple of {BLOCK}")

    def check_layers(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ValueError naming the first layer, `[out, in]` by path, that exceeds `bpw` with 4 bits everywhere."""
        self.check()
        for name, (rows, columns) in shapes.items() if self.bpw is not None else ():
            assert self.bpw is not None
            if (least := bits_per_weight(self._layout(rows, (columns, 0, 0)))) > self.bpw:
                low = max(bits_per_weight(self._layout(out, (width, 0, 0))) for out, width in shapes.values())
                raise ValueError(
                    f"bpw is {self.bpw:g}; {name} ({rows} x {columns}) takes {least:.3f} with 4 bits everywhere, its "
                    f"scales and its order; all layers together reach {low:.3f} and more"
                )

    def prepare(self, stats: LayerStats | None) -> Partition | None:
        """Split the channels of this input. None where no token was sampled. Raises ValueError without statistics."""
        if stats is None:
            raise ValueError("the activation statistics are missing: this recipe needs calibration data")
        if stats.sample is None or len(stats.sample) == 0:
            return None
        from_top = self.bpw is not None
        return partition(stats.sample, self._thresholds(), target=self.bits,
                         multiplier=0.0 if from_top else self.multiplier, runs=self.runs, alignment=self.alignment,
                         smaller=from_top)  # fmt: skip

    def measure(self, layer: Layer, prepared: Partition | None) -> Cost:
        """One way to spend the bits; all FP8 where nothing is known about the input."""
        if prepared is None:
            return Cost((uniform_plan(layer.weight.shape[1], _WIDTHS[-1], BLOCK),), (0.0,))
        prepared = self._within(prepared, layer.weight.shape[0])
        shares = dict(zip(("4", "6", "8"), prepared.shares, strict=True))
        details = {"shares": shares, "multiplier": prepared.multiplier}
        return Cost((LayerPlan(prepared.bits(BLOCK), BLOCK),), (0.0,), details)

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """The one plan."""
        return cost.plans[0]

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Partition | None) -> Solution:
        """Round each part to its format, channels in the order of their magnitude.

        Raises ValueError naming the layer if a weight is NaN or Inf, or if the plan holds bits that no MX element has.
        """
        check_finite(layer.name, weight=layer.weight)
        if unknown := set(plan.bits) - set(_WIDTHS):
            raise ValueError(f"{layer.name}: the plan gives channels {min(unknown)} bits; MX elements have 4, 6 or 8")
        loudest = self.column_order(layer, prepared)
        repeats = torch.tensor(plan.widths(len(loudest)), device=loudest.device)
        bits = torch.empty_like(loudest)
        bits[loudest] = torch.tensor(plan.bits, device=loudest.device).repeat_interleave(repeats)
        ranked = loudest.flip(0)
        order = ranked[torch.argsort(bits[ranked], stable=True)]
        segments = []
        for width in sorted(set(plan.bits)):
            channels = order[bits[order] == width]
            part, activation = layer.weight[:, channels], self._format(width).activation
            grid = fit_mx(part, element_for(width, self.six), self.scale_rule, activation)
            segments.append(MXGrid.segment([grid], grid.encode(part).to(torch.uint8)))
        stored = QuantizedWeight(tuple(segments), Permutation(order, 1, full=True))
        events: tuple[Event, ...] = ()
        if prepared is None:
            events = (Event(layer.name, "no token sample", "nothing is known about the input: 8 bits unless planned"),)
        return Solution(stored, None, events)

    def widths(self, out_features: int) -> tuple[int, ...]:
        """4, 6 and 8 bits."""
        return _WIDTHS

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """What a plan stores: a part for each width, and the order of the channels."""
        sizes = np.bincount(plan.bits, plan.widths(in_features), minlength=_WIDTHS[-1] + 1)
        return self._layout(out_features, [int(sizes[width]) for width in _WIDTHS])

    def rounded(self, layer: Layer, prepared: Partition | None, bits: int) -> Tensor:
        """Every block at `bits`."""
        return self._in_blocks(layer.weight, self.column_order(layer, prepared), bits)

    def column_cost(self, layer: Layer, prepared: Partition | None) -> Tensor:
        """E[x_j^2]: nothing compensates an error."""
        assert layer.stats is not None
        return layer.stats.hessian.diagonal() / layer.stats.tokens

    def column_order(self, layer: Layer, prepared: Partition | None) -> Tensor:
        """The loudest channels first; as they are where nothing is known about the input."""
        if prepared is None:
            return torch.arange(layer.weight.shape[1], device=layer.weight.device)
        return prepared.order.flip(0)

    def input_error(self, layer: Layer, prepared: Partition | None, bits: int) -> Tensor:
        """What rounding the input adds to each column, on the sampled tokens."""
        if prepared is None or not self.quantize_activations:
            return layer.weight.new_zeros(layer.weight.shape[1])
        assert layer.stats is not None
        assert layer.stats.sample is not None
        sample = layer.stats.sample
        return (sample - self._in_blocks(sample, self.column_order(layer, prepared), bits)).square_().mean(dim=0)

    def _in_blocks(self, values: Tensor, order: Tensor, bits: int) -> Tensor:
        """`[n, in]` rounded in blocks along `order`, at their own places."""
        element = element_for(bits, self.six)
        rounded = quantize_blocks(values[:, order], element, self.scale_rule)
        return torch.empty_like(values).index_copy_(1, order, rounded)

    def _within(self, found: Partition, out_features: int) -> Partition:
        """The largest partition of at most `bpw`. Layers of one input have one order; one of few rows, which pays more
        for it, may cut it a part earlier."""
        if self.bpw is None:
            return found
        for sizes, multiplier in ((found.sizes, found.multiplier), *found.smaller):
            found = replace(found, sizes=sizes, multiplier=multiplier)
            if bits_per_weight(self._layout(out_features, sizes)) <= self.bpw:
                break
        return found

    def _layout(self, out_features: int, sizes: Sequence[int]) -> Layout:
        segments = tuple((self._format(width), size) for width, size in zip(_WIDTHS, sizes, strict=True) if size)
        return Layout(out_features, sum(sizes), segments, "order", 1)

    def _format(self, width: int) -> Format:
        return mx_format(element_for(width, self.six), self.scale_rule if self.quantize_activations else "none")

    def _thresholds(self) -> tuple[float, float]:
        """T(4) and T(6) as shares of the token's largest magnitude."""
        elements = (element_for(4), element_for(6, self.six))
        if self.thresholds == "exact":
            four, six = (exact_threshold(worst_ratio(element, self.scale_rule)) for element in elements)
        else:
            four, six = (published_threshold(e.bits, e.largest, e.paper_exponent) for e in elements)
        return four, six
