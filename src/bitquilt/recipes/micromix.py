"""MicroMix (arXiv 2508.02343, ICLR 2026): microscaling formats for weights AND activations, by a closed form.

1. every element of the calibration tokens falls into a band: 4, 6 or 8 bits, the narrowest whose worst error stays
   within that of per-token INT8;
2. the shares of the bands are the sizes of three parts of the channels, which are ordered by mean magnitude;
3. each part of the weight is rounded to its format, and so is the matching part of the input while the model runs.

Where paper and public code differ, this follows the paper: magnitudes, not signed values; shares in their right order;
a part's weights in the part's format. Deviations, undone by `published=True`: scales are rounded as in the public code
("ceil": 36 % less FP4 error on Gaussian blocks than the paper's formula); channels are ranked by the largest of 32 runs
of tokens instead of the mean of all. Other deviations: shares and order come from an even sample of 4096 tokens; parts
are whole multiples of 32 channels where 128 does not divide the layer, and padded elements are not stored. Layers of
one input share the parts.
Beyond the paper: `bits`, a mean reached by scaling both thresholds, per input, because one block is in memory at a
time; one budget for the whole model, given to blocks of 32 channels by their cost to it.
A plan counts blocks of channels by falling magnitude, not columns: calibration decides which channels these are.
Not offered: smoothing, a quantized KV cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bitquilt.core.budget import Budget
from bitquilt.core.packing import bits_per_weight
from bitquilt.core.recipe import Needs, PlanTerms
from bitquilt.core.training import Training
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
from bitquilt.layer.grids.mx import MXGrid, element_for, fit_mx, mx_format
from bitquilt.layer.sensitivity.activation import Partition, partition, published_threshold
from bitquilt.ops.microscaling import BLOCK, ScaleRule, quantize_blocks
from bitquilt.recipes.shared.traits import Traits, check_bpw

_WIDTHS = (4, 6, 8)
_RUNS = 32  # of the sampled tokens


@dataclass(frozen=True)
class MicroMix:
    """Options of MicroMix. `bits`, `bpw` and `multiplier` are three ways to say how many bits; give one.

    `bits`: mean of the bands to reach, 4 to 8, before parts are rounded up to `alignment` channels.
    `bpw`: true bits per weight of every layer, scales and the order of its channels included, met from below to one
    part of `alignment` channels.
    `multiplier`: scales both thresholds; 1 as published, 0 nearly all FP8, a large number all FP4.
    `published`: scales by the paper's formula and channels ranked by the mean of all tokens.
    `alignment`: channels that a part is a multiple of, as published 128; narrow layers need 32. On stories260k a mean
    of 4.25 bits takes 5.48 bits per weight even so (docs/results.md).
    `quantize_activations`: False rounds weights only, and the input stays in its own type.
    """

    name: ClassVar[str] = "micromix"
    traits: ClassVar[Traits] = Traits(
        fractional=True, why_not_clipped="has powers of two for scales: no range between them to train"
    )
    needs: ClassVar[Needs] = Needs(sample=True)
    training: ClassVar[Training] = Training()

    bits: float | None = None
    bpw: float | None = None
    multiplier: float = 1.0
    published: bool = False
    alignment: int = 128
    quantize_activations: bool = True

    @property
    def scale_rule(self) -> ScaleRule:
        """Rule by which a block's shared scale is rounded to a power of two."""
        return "paper" if self.published else "ceil"

    @property
    def plan_terms(self) -> PlanTerms:
        """MX blocks at the recipe's mean; without one, the thresholds decide."""
        return PlanTerms(
            BLOCK, Budget.of(bits=self.bits, bpw=self.bpw), own_widths=_WIDTHS, overshoot=2 * self.alignment
        )

    def check(self) -> None:
        """Raise ValueError naming the first field that cannot work, before any layer is read."""
        if self.bits is not None and not _WIDTHS[0] <= self.bits <= _WIDTHS[-1]:
            raise ValueError(f"bits is {self.bits:g}; MX elements have 4, 6 or 8, so their mean is 4 to 8")
        if not 0 <= self.multiplier < float("inf"):
            raise ValueError(f"multiplier is {self.multiplier}; wanted 0 or more")
        if (self.bits is not None or self.bpw is not None) and self.multiplier != 1.0:
            raise ValueError("bits, bpw and multiplier all scale the thresholds; give one")
        check_bpw(self.bpw)
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
        """Split the channels of this input; None without a sampled token. Raises ValueError without statistics."""
        if stats is None:
            raise ValueError("the activation statistics are missing: this recipe needs calibration data")
        if stats.sample is None or len(stats.sample) == 0:
            return None
        from_top = self.bpw is not None
        four, six = (element_for(width) for width in _WIDTHS[:2])
        return partition(
            stats.sample,
            (
                published_threshold(four.bits, four.largest, four.paper_exponent),
                published_threshold(six.bits, six.largest, six.paper_exponent),
            ),
            target=self.bits,
            multiplier=0.0 if from_top else self.multiplier,
            runs=1 if self.published else _RUNS,
            alignment=self.alignment,
            smaller=from_top,
        )

    def measure(self, layer: Layer, prepared: Partition | None) -> Cost:
        """The only plan; all FP8 where nothing is known about the input."""
        if prepared is None:
            return Cost((uniform_plan(layer.weight.shape[1], _WIDTHS[-1], BLOCK),), (0.0,))
        prepared = self._within(prepared, layer.weight.shape[0])
        shares = dict(zip(("4", "6", "8"), prepared.shares, strict=True))
        details = {"shares": shares, "multiplier": prepared.multiplier}
        return Cost((LayerPlan(prepared.bits(BLOCK), BLOCK),), (0.0,), details)

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """The only plan."""
        return cost.plans[0]

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Partition | None) -> Solution:
        """Round each part to its format, channels in the order of their magnitude.

        Raises ValueError naming the layer if a weight is NaN or Inf, or if the plan holds bits that no MX element has.
        """
        check_finite(layer.name, weight=layer.weight)
        try:
            _check_bits(plan)
        except ValueError as error:
            raise ValueError(f"{layer.name}: {error}") from None
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
            grid = fit_mx(part, element_for(width), self.scale_rule, activation)
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
        """The layout in which `quantize` stores a plan: a part for each width, and the order of the channels.

        Raises ValueError if the plan holds bits that no MX element has.
        """
        _check_bits(plan)
        sizes = np.bincount(plan.bits, plan.widths(in_features), minlength=_WIDTHS[-1] + 1)
        return self._layout(out_features, [int(sizes[width]) for width in _WIDTHS])

    def rounded(self, layer: Layer, prepared: Partition | None, bits: int) -> Tensor:
        """The weight with every block at `bits`."""
        return self._in_blocks(layer.weight, self.column_order(layer, prepared), bits)

    def column_cost(self, layer: Layer, prepared: Partition | None) -> Tensor:
        """E[x_j^2]: nothing compensates an error."""
        assert layer.stats is not None
        return layer.stats.hessian.diagonal() / layer.stats.tokens

    def column_order(self, layer: Layer, prepared: Partition | None) -> Tensor:
        """The channels `[in]` by falling magnitude; in their own order where nothing is known about the input."""
        if prepared is None:
            return torch.arange(layer.weight.shape[1], device=layer.weight.device)
        return prepared.order.flip(0)

    def input_error(self, layer: Layer, prepared: Partition | None, bits: int) -> Tensor:
        """E[(x_j - x_j rounded at `bits`)^2] of each column `[in]`, over the sampled tokens."""
        if prepared is None or not self.quantize_activations:
            return layer.weight.new_zeros(layer.weight.shape[1])
        assert layer.stats is not None
        assert layer.stats.sample is not None
        sample = layer.stats.sample
        return (sample - self._in_blocks(sample, self.column_order(layer, prepared), bits)).square_().mean(dim=0)

    def _in_blocks(self, values: Tensor, order: Tensor, bits: int) -> Tensor:
        """`[n, in]` rounded in blocks along `order`, in the original order of the columns."""
        rounded = quantize_blocks(values[:, order], element_for(bits), self.scale_rule)
        return torch.empty_like(values).index_copy_(1, order, rounded)

    def _within(self, found: Partition, out_features: int) -> Partition:
        """The largest partition within `bpw`. Layers of one input share one order of the channels; its bytes weigh more
        in a layer of few rows, which may get a smaller partition."""
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
        return mx_format(element_for(width), self.scale_rule if self.quantize_activations else "none")


def _check_bits(plan: LayerPlan) -> None:
    if unknown := set(plan.bits) - set(_WIDTHS):
        raise ValueError(f"the plan gives channels {min(unknown)} bits; MX elements have 4, 6 or 8")
