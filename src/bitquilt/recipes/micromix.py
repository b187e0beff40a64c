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
because one block is in memory at a time. Not offered: smoothing, a quantized KV cache.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from bitquilt.grids.mx import element_for, fit_mx, worst_ratio
from bitquilt.ops.mx import BLOCK, ScaleRule
from bitquilt.sensitivity.activation import Partition, exact_threshold, partition, published_threshold
from bitquilt.types import (
    Cost,
    Event,
    Format,
    Layer,
    LayerPlan,
    LayerStats,
    Permutation,
    QuantizedWeight,
    Segment,
    Solution,
    check_finite,
)

_WIDTHS = (4, 6, 8)


@dataclass(frozen=True)
class MicroMix:
    """`multiplier`: of both thresholds (0: nearly all FP8, large: all FP4); or `bits`: the mean of the bands to reach,
    before parts are rounded up to `alignment` channels. `six`: the 6-bit element. `runs`: channels are ranked by the
    loudest of that many runs of the sampled tokens (1: by the mean of all). `quantize_activations`: False keeps the
    input as it is.
    """

    name: ClassVar[str] = "micromix"
    needs: ClassVar[frozenset[str]] = frozenset({"sample"})
    fractional: ClassVar[bool] = True
    plans_columns: ClassVar[bool] = True

    bits: float | None = None
    multiplier: float = 1.0
    scale_rule: ScaleRule = "ceil"
    thresholds: Literal["published", "exact"] = "published"
    six: Literal["e3m2", "e2m3"] = "e3m2"
    runs: int = 32
    alignment: int = 128
    quantize_activations: bool = True

    def check(self) -> None:
        """Raise ValueError naming the first field that cannot work, before any layer is read."""
        if self.bits is not None and not _WIDTHS[0] <= self.bits <= _WIDTHS[-1]:
            raise ValueError(f"bits is {self.bits:g}; MX elements have 4, 6 or 8, so their mean is 4 to 8")
        if not 0 <= self.multiplier < float("inf"):
            raise ValueError(f"multiplier is {self.multiplier}; wanted 0 or more")
        if self.bits is not None and self.multiplier != 1.0:
            raise ValueError("bits and multiplier both scale the thresholds; give one")
        if self.runs < 1:
            raise ValueError(f"runs is {self.runs}; wanted at least 1")
        if self.alignment < BLOCK or self.alignment % BLOCK:
            raise ValueError(f"alignment is {self.alignment}; wanted a positive multiple of {BLOCK}")

    def prepare(self, stats: LayerStats | None) -> Partition | None:
        """Split the channels of this input. None where no token was sampled. Raises ValueError without statistics."""
        if stats is None:
            raise ValueError("the activation statistics are missing: this recipe needs calibration data")
        if stats.sample is None or len(stats.sample) == 0:
            return None
        return partition(stats.sample, self._thresholds(), target=self.bits, multiplier=self.multiplier,
                         runs=self.runs, alignment=self.alignment)  # fmt: skip

    def measure(self, layer: Layer, prepared: Partition | None) -> Cost:
        """One way to spend the bits; all FP8 where nothing is known about the input."""
        if prepared is None:
            return Cost((LayerPlan((_WIDTHS[-1],) * layer.weight.shape[1], 1),), (0.0,))
        shares = dict(zip(("4", "6", "8"), prepared.shares, strict=True))
        details = {"shares": shares, "multiplier": prepared.multiplier}
        return Cost((LayerPlan(prepared.bits, 1),), (0.0,), details)

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
        bits = torch.tensor(plan.bits, device=layer.weight.device)
        ranked = torch.arange(len(bits), device=bits.device) if prepared is None else prepared.order
        order = ranked[torch.argsort(bits[ranked], stable=True)]
        segments = []
        for width in sorted(set(plan.bits)):
            channels = order[bits[order] == width]
            element = element_for(width, self.six)
            codes, scale = fit_mx(layer.weight[:, channels], element, self.scale_rule)
            form = Format(
                width,
                BLOCK,
                "mx_e2m3" if element.name == "e2m3" else "mx",
                torch.uint8,
                symmetric=True,
                activation=self.scale_rule if self.quantize_activations else "none",
            )
            segments.append(Segment(form, codes, scale))
        in_place = bool((order.diff() > 0).all())
        stored = QuantizedWeight(tuple(segments), None if in_place else Permutation(order, 1))
        events: tuple[Event, ...] = ()
        if prepared is None:
            events = (Event(layer.name, "no token sample", "nothing is known about the input: 8 bits unless planned"),)
        return Solution(stored, None, events)

    def _thresholds(self) -> tuple[float, float]:
        """T(4) and T(6) as shares of the token's largest magnitude."""
        elements = (element_for(4), element_for(6, self.six))
        if self.thresholds == "exact":
            four, six = (exact_threshold(worst_ratio(element, self.scale_rule)) for element in elements)
        else:
            four, six = (published_threshold(e.bits, e.largest, e.paper_exponent) for e in elements)
        return four, six
