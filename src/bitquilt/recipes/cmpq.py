"""CMPQ-style channel-wise mixed precision (arXiv 2410.13056): any fractional budget, a codebook per input channel.

1. bits per channel from activation norms: two adjacent widths meet every mean exactly;
2. O_act, the weights that contribute most to the output, leave the codebooks for half precision;
3. a codebook of 2^bits levels per channel by one-dimensional k-means on the rest;
4. O_q, the weights whose rounding costs most at the output, leave too; their channels are fitted again.

Why "-style": the publication's method section was not reachable and there is no public code. Known are the channel
axis' idea, clustering, two kinds of outliers and 0.45 %; our choices are the input axis (the only one an input norm
can rank), the rule of two adjacent widths, the split of the outliers (0.45 % O_q, 0.05 % O_act), the fp16 levels.
Deviation: k-means is exact, not Lloyd (`clustering="lloyd"`). Not offered: a codebook per output row, Fisher weights.
Weighting the clustering by the Hessian's diagonal is no option because it is a constant inside a channel: it changes
nothing there. What the second order can do is `compensation`.

Options beyond the publication, off in `cmpq`: `compensation`, which `cmpq+` turns on, and `allocation="error_table"`.
Mean KL plain, by table, compensated, both: 0.383, 0.357, 0.110, 0.088 (babyllama-1m-chars, 4.0 bpw, 32 x 256 tokens);
3.15, 2.95, 2.36, 2.57 (stories260k, 3.61 bpw, 8 x 256 tokens); plain and compensated 0.054, 0.029 (demo, 3.59 bpw,
16 x 256 tokens), by `measure` of benchmarks/curve.py: the table on top of compensation does not always help.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bitquilt.allocation.fractional import FULL_PALETTE, check_budget, check_palette, spread_bits
from bitquilt.allocation.knapsack import least_error_relaxed
from bitquilt.grids.codebook import Clustering, CodebookGrid, fit_codebook
from bitquilt.grids.uniform import scale_dtype_for
from bitquilt.hessian import Factor, factorize
from bitquilt.outliers import (
    ActivationRule,
    activation_count,
    activation_outliers,
    check_share,
    error_outliers,
    sparse_remainder,
)
from bitquilt.packing import bits_per_weight, storage_bits
from bitquilt.solvers.gptq import in_original_order, sweep
from bitquilt.solvers.layouts import channel_layout
from bitquilt.solvers.solve import assemble_codebooks, codebook_layout, layer_events
from bitquilt.types import (
    Cost,
    Event,
    Layer,
    LayerPlan,
    LayerStats,
    Layout,
    Outliers,
    QuantizedWeight,
    Solution,
    check_finite,
)

Statistic = Literal["l2", "mean_abs", "max_abs"]
_ROUNDING = 1e-6  # bits: a target is a float, what is stored a whole number
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float8": torch.float8_e4m3fn,
}
_FLOAT8_SAFE = (0.125, 448.0)  # largest weight: below, most levels fall under 2^-6, where float8_e4m3 loses digits


@dataclass(frozen=True, eq=False)
class Activations:
    """What layers of one input share: `norms` a_j fp32 `[in]`; with compensation the order of the sweep `[in]`, the
    factor of the Hessian in that order (`dead` in the original one), and 1 / U_jj^2 in the original order."""

    norms: Tensor
    order: Tensor | None = None
    factor: Factor | None = None
    importance: Tensor | None = None
    events: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class CMPQ:
    """`bits`: nominal mean, any real number the palette reaches; `bpw`: instead, true bits per weight of every layer
    with everything stored, met from below to one channel, the rest spent on O_q.

    `statistic`: a_j as the L2 norm of the channel's inputs over all tokens, or their mean or largest absolute value
    over a sample of the tokens. `error_outliers`, `act_outliers`: shares of the weights in O_q and O_act; `act_rule`
    "column" protects whole channels. `swap`: share of the channels that gain a bit, and as many lose one
    (where the palette has room on both sides).
    `allocation`: "norm"; "first" = the first channels, whatever their norms (to see what norms are worth);
    "error_table" = least sum of a_j^2 |w_j - Q_b(w_j)|^2 over widths next to the mean; "global" = channels of the whole
    model share one budget, which needs a plan (`bitquilt.quantize` makes it). `clustering`: "uniform" = equal
    steps. `iterations`: of Lloyd. `codebook_dtype`: "auto" = float16 unless the weights leave its range; "float8"
    halves the codebooks, which on a layer of few rows cost more than the codes.
    `compensation`: errors are repaired by later channels as in GPTQ, codebooks fitted on what is then there;
    `act_order`: in descending norm; `damp` as in GPTQ.
    """

    name: ClassVar[str] = "cmpq"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "sample"})
    channelwise: ClassVar[bool] = True

    bits: float = 3.0
    bpw: float | None = None
    statistic: Statistic = "l2"
    error_outliers: float = 0.0045
    act_outliers: float = 0.0005
    act_rule: ActivationRule = "weight"
    swap: float = 0.0
    palette: tuple[int, ...] = FULL_PALETTE
    allocation: Literal["norm", "first", "error_table", "global"] = "norm"
    clustering: Clustering = "exact"
    iterations: int = 50
    codebook_dtype: Literal["auto", "float16", "bfloat16", "float32", "float8"] = "auto"
    compensation: bool = False
    act_order: bool = True
    damp: float = 0.01

    def check(self) -> None:
        """Raise ValueError naming the first field that cannot work, before any layer is read."""
        check_palette(self.palette)
        if self.bpw is None:
            check_budget(self.bits, self.palette)
        elif not self.bpw > 0:
            raise ValueError(f"bpw is {self.bpw}; wanted true bits per weight above 0, such as 2.5")
        check_share(error_outliers=self.error_outliers, act_outliers=self.act_outliers)
        if not 0 <= self.swap <= 0.5:
            raise ValueError(f"swap is {self.swap}; wanted a share of the channels from 0 to 0.5")
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}; wanted at least 1")

    def check_layers(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ValueError naming the first layer, `[out, in]` by path, that cannot have `bpw`, and what all can."""
        self.check()
        if self.bpw is None or not shapes:
            return
        ranges = {name: self._reach(*shape) for name, shape in shapes.items()}
        low, high = max(r[0] for r in ranges.values()), min(r[1] for r in ranges.values())
        for name, (least, most) in ranges.items():
            if not least <= self.bpw <= most:
                out_features, in_features = shapes[name]
                common = (
                    f"all layers together reach {low:.3f} to {high:.3f}" if low <= high else "no bpw fits all layers"
                )
                raise ValueError(
                    f"bpw is {self.bpw}; {name} ({out_features} x {in_features}) reaches {least:.3f} to {most:.3f} "
                    f"with its codebooks and outliers; {common}"
                )

    def prepare(self, stats: LayerStats | None) -> Activations:
        """Norms of the channels, and with compensation the factor. Raises ValueError without finite statistics."""
        if stats is None:
            raise ValueError("the activation statistics are missing: this recipe needs calibration data")
        norms, events = self._norms(stats)
        if not self.compensation:
            return Activations(norms, events=events)
        order = torch.arange(len(norms))
        if self.act_order:
            order = torch.argsort(stats.hessian.diagonal(), descending=True, stable=True)
        factor = factorize(stats.hessian[order][:, order] / stats.tokens, self.damp)
        importance = torch.empty_like(norms).index_copy_(0, order, factor.importance)
        dead = torch.empty_like(factor.dead).index_copy_(0, order, factor.dead)
        return Activations(norms, order, replace(factor, dead=dead), importance, events)

    def measure(self, layer: Layer, prepared: Activations) -> Cost:
        """One way to spend the bits. Raises ValueError if the budget is out of the layer's reach."""
        if self.allocation == "global":
            raise ValueError("a global allocation is a plan for the whole model: give this layer's part of it")
        out_features, in_features = layer.weight.shape
        total = self._total(out_features, in_features)
        if self.allocation == "error_table":
            bits = self._by_error(layer, prepared, total)
        else:
            norms = [0.0] * in_features if self.allocation == "first" else prepared.norms.tolist()
            bits = self._spread(norms, out_features, total)
        return Cost((LayerPlan(bits, 1),), (0.0,))

    def allocate(self, cost: Cost, in_features: int) -> LayerPlan:
        """The one plan."""
        return cost.plans[0]

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: Activations) -> Solution:
        """Cluster, protect, cluster again. Raises ValueError naming the layer if a weight is NaN or Inf."""
        check_finite(layer.name, weight=layer.weight)
        weight = layer.weight
        if prepared.factor is not None:
            weight = weight.masked_fill(prepared.factor.dead, 0.0)
        widest = _widest(len(weight))
        bits = [min(b, widest) for b in plan.bits]
        dtype = self._dtype(layer.weight)
        events = [Event(layer.name, kind, detail) for kind, detail in prepared.events]
        if max(plan.bits) > widest or (self.bpw is None and self.bits > widest):
            detail = f"{len(weight)} rows need at most {widest} bits per channel; asked: {max(*plan.bits, self.bits):g}"
            events.append(Event(layer.name, "more levels than rows", detail))
        protected = self._protected(layer, weight, bits, dtype, prepared.norms, events)
        if prepared.factor is None:
            stored, loss = self._rounded(weight, bits, dtype, protected), None
        else:
            stored, loss = self._swept(weight, bits, dtype, protected, prepared)
        events += layer_events(layer, dtype, prepared.factor, self.damp)
        return Solution(stored, loss, tuple(events))

    def widths(self, out_features: int) -> tuple[int, ...]:
        """The palette, without widths of more levels than rows."""
        return self._palette(out_features)

    def layout(self, out_features: int, in_features: int, plan: LayerPlan) -> Layout:
        """What a plan stores, with the asked-for shares of outliers."""
        dtype = _DTYPES.get(self.codebook_dtype, torch.float16)
        return channel_layout(out_features, plan.bits, sum(self._outliers(out_features, in_features)), dtype)

    def rounded(self, layer: Layer, prepared: Activations, bits: int) -> Tensor:
        """Every channel at `bits`; weights as many as will be protected, those whose error costs most, as they are."""
        weight = layer.weight
        mass = (~activation_outliers(weight, prepared.norms, self.act_outliers, self.act_rule)).float()
        nearest = self._fit(weight, bits, mass, self._dtype(weight)).quantize(weight)
        kept = error_outliers(weight, nearest, prepared.norms, self._outliers(*weight.shape)[1], mass == 0)
        return torch.where(kept | (mass == 0), weight, nearest)

    def column_cost(self, layer: Layer, prepared: Activations) -> Tensor:
        """1 / U_jj^2 where later channels compensate, else E[x_j^2]."""
        if prepared.importance is not None:
            return prepared.importance
        assert layer.stats is not None
        return layer.stats.hessian.diagonal() / layer.stats.tokens

    def _norms(self, stats: LayerStats) -> tuple[Tensor, tuple[tuple[str, str], ...]]:
        events: tuple[tuple[str, str], ...] = ()
        if self.statistic == "l2" or stats.sample is None:
            norms = stats.hessian.diagonal().clamp(min=0).sqrt()
            if self.statistic != "l2":
                events = (("no token sample", f"statistic {self.statistic} needs one; the L2 norm is used"),)
        else:
            size = stats.sample.abs()
            norms = size.mean(dim=0) if self.statistic == "mean_abs" else size.amax(dim=0)
        check_finite("the layer's input", norms=norms)
        return norms, events

    def _dtype(self, weight: Tensor) -> torch.dtype:
        """Raises ValueError if the levels would not survive float8."""
        if self.codebook_dtype == "float8":
            largest = float(weight.abs().max())
            if largest and not _FLOAT8_SAFE[0] <= largest <= _FLOAT8_SAFE[1]:
                raise ValueError(
                    f"the largest weight is {largest:.3g}; float8 levels need it within {_FLOAT8_SAFE[0]} .. "
                    f"{_FLOAT8_SAFE[1]}; use codebook_dtype=float16"
                )
        return scale_dtype_for(weight) if self.codebook_dtype == "auto" else _DTYPES[self.codebook_dtype]

    def _palette(self, out_features: int) -> tuple[int, ...]:
        return tuple(sorted({min(b, _widest(out_features)) for b in self.palette}))

    def _spread(self, norms: list[float], out_features: int, total: int) -> tuple[int, ...]:
        palette = self._palette(out_features)
        room = palette[0] < total // len(norms) and -(-total // len(norms)) < palette[-1]
        return spread_bits(norms, total, self.swap if room else 0.0, palette)

    def _outliers(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Asked-for sizes of O_act and O_q."""
        act = activation_count(self.act_outliers, out_features, in_features, self.act_rule)
        return act, round(self.error_outliers * out_features * in_features)

    def _total(self, out_features: int, in_features: int) -> int:
        """Sum of the channels' bits: as asked, or the most that `bpw` leaves room for."""
        if self.bpw is None:
            check_budget(self.bits, self.palette)
            return min(round(self.bits * in_features), _widest(out_features) * in_features)
        least, most = self._reach(out_features, in_features)
        if not least <= self.bpw <= most:
            raise ValueError(
                f"bpw is {self.bpw}; this {out_features} x {in_features} layer reaches {least:.3f} to {most:.3f}"
            )
        return _largest_total(self, out_features, in_features)

    def _reach(self, out_features: int, in_features: int) -> tuple[float, float]:
        """True bits per weight at the palette's ends."""
        palette = self._palette(out_features)
        ends = (self._size(out_features, in_features, b * in_features) for b in (palette[0], palette[-1]))
        least, most = (bits / (out_features * in_features) for bits in ends)
        return least, most

    def _size(self, out_features: int, in_features: int, total: int) -> int:
        """Stored bits of a layer whose channels, ranked somehow, share `total` bits."""
        bits = self._spread([float(-j) for j in range(in_features)], out_features, total)
        return storage_bits(self._layout(out_features, bits))

    def _layout(self, out_features: int, bits: Sequence[int]) -> Layout:
        """What the asked-for shares of outliers and these bits will store."""
        count = sum(self._outliers(out_features, len(bits)))
        return codebook_layout(out_features, bits, count, _DTYPES.get(self.codebook_dtype, torch.float16))

    def _by_error(self, layer: Layer, prepared: Activations, total: int) -> tuple[int, ...]:
        """The map of least tabulated error among widths from one below to two above the mean."""
        weight, (out_features, in_features) = layer.weight, layer.weight.shape
        check_finite(layer.name, weight=weight)
        middle = total // in_features
        widths = [b for b in self._palette(out_features) if middle - 1 <= b <= middle + 2]
        mass = (~activation_outliers(weight, prepared.norms, self.act_outliers, self.act_rule)).float()
        cost = prepared.norms.square() if prepared.importance is None else prepared.importance
        columns = []
        for b in widths:
            error = (weight - self._fit(weight, b, mass, self._dtype(weight)).quantize(weight)) * mass
            columns.append(cost.double() * error.double().square().sum(dim=0))
        table = torch.stack(columns, dim=1).tolist()
        if self.bpw is None:
            return tuple(widths[i] for i in least_error_relaxed(table, widths, total))
        entry = 8 * _DTYPES.get(self.codebook_dtype, torch.float16).itemsize
        prices = [out_features * b + entry * 2**b for b in widths]
        target = self.bpw * out_features * in_features
        # what is not a channel's own (padding, map, outliers) is known only from the finished map: correct for it
        budget, best = target, None
        for _ in range(6):
            budget = max(budget, prices[0] * in_features)
            bits = tuple(widths[i] for i in least_error_relaxed(table, prices, budget))
            spare = target - storage_bits(self._layout(out_features, bits))
            if spare >= -_ROUNDING and (best is None or spare < best[0]):
                best = (spare, bits)
            budget += spare
        return best[1] if best else self._spread(prepared.norms.tolist(), out_features, total)

    def _fit(self, weight: Tensor, bits: int, mass: Tensor | None, dtype: torch.dtype) -> CodebookGrid:
        return fit_codebook(weight, bits, mass, clustering=self.clustering, iterations=self.iterations, dtype=dtype)

    def _protected(
        self, layer: Layer, weight: Tensor, bits: list[int], dtype: torch.dtype, norms: Tensor, events: list[Event]
    ) -> Tensor:
        """O_act and O_q together, bool `[out, in]`: O_q is ranked by codebooks fitted without O_act."""
        act, error = self._outliers(*weight.shape)
        nothing = torch.zeros_like(weight, dtype=torch.bool)
        if act + error == 0:
            return nothing
        if scale_dtype_for(layer.weight) != torch.float16:
            detail = "the sparse part is float16, which the layer's weights leave: none are protected"
            events.append(Event(layer.name, "outliers out of float16 range", detail))
            return nothing
        chosen = activation_outliers(weight, norms, self.act_outliers, self.act_rule) if act else nothing
        if error == 0:
            return chosen
        if self.bpw is not None:
            layout = codebook_layout(len(weight), bits, act + error, dtype)
            one_more = storage_bits(replace(layout, outliers=act + error + 1)) - storage_bits(layout)
            error += max(0, math.floor((self.bpw - bits_per_weight(layout)) * weight.numel() / one_more + 1e-9))
        rounded = torch.empty_like(weight)
        for channels, grid in self._grids(weight, bits, dtype, ~chosen).values():
            rounded[:, channels] = grid.quantize(weight[:, channels])
        return chosen | error_outliers(weight, rounded, norms, error, chosen)

    def _grids(
        self, weight: Tensor, bits: list[int], dtype: torch.dtype, counted: Tensor
    ) -> dict[int, tuple[Tensor, CodebookGrid]]:
        """By width: its channels and their codebooks, fitted to the weights that are `counted`."""
        widths, grids = torch.tensor(bits), {}
        for b in sorted(set(bits)):
            channels = torch.nonzero(widths == b).flatten()
            grids[b] = (channels, self._fit(weight[:, channels], b, counted[:, channels].float(), dtype))
        return grids

    def _rounded(self, weight: Tensor, bits: list[int], dtype: torch.dtype, protected: Tensor) -> QuantizedWeight:
        """Every weight to the nearest level of its channel, what is protected to the level nearest 0."""
        codes, dense = torch.empty(weight.shape, dtype=torch.uint8), torch.empty_like(weight)
        grids = self._grids(weight, bits, dtype, ~protected)
        rest = weight.masked_fill(protected, 0.0)
        for channels, grid in grids.values():
            nearest = grid.encode(rest[:, channels])
            codes[:, channels], dense[:, channels] = nearest.to(torch.uint8), grid.decode(nearest)
        levels = {b: grid.levels for b, (_, grid) in grids.items()}
        return assemble_codebooks(codes, bits, levels, dtype, sparse_remainder(weight, dense, protected))

    def _swept(
        self, weight: Tensor, bits: list[int], dtype: torch.dtype, protected: Tensor, prepared: Activations
    ) -> tuple[QuantizedWeight, float]:
        """The GPTQ sweep, one codebook per column, fitted when the sweep reaches it."""
        assert prepared.factor is not None
        assert prepared.order is not None
        order = prepared.order
        places = order.tolist()
        kept = protected[:, order]

        def fit_column(k: int, column: Tensor) -> CodebookGrid:
            return self._fit(column, bits[places[k]], (~kept[:, k : k + 1]).float(), dtype)

        singles = [slice(k, k + 1) for k in range(len(places))]
        swept = sweep(weight[:, order], prepared.factor.upper, singles, fit_column, kept)
        by_channel = dict(zip(places, swept.grids, strict=True))
        swept = in_original_order(swept, tuple(by_channel[j] for j in range(len(places))), order)
        levels = {b: torch.cat([g.levels for g in swept.grids if g.bits == b]) for b in set(bits)}
        outliers: Outliers | None = None
        if swept.remainder is not None:
            outliers = sparse_remainder(swept.remainder, torch.zeros(()), protected)
        return assemble_codebooks(swept.codes, bits, levels, dtype, outliers), swept.loss


@dataclass(frozen=True)
class CMPQPlus(CMPQ):
    """`cmpq` with error compensation between channels, in descending norm."""

    name: ClassVar[str] = "cmpq+"

    compensation: bool = True


def _widest(out_features: int) -> int:
    """Bits beyond which a channel would have more levels than weights."""
    return max(1, (out_features - 1).bit_length())


@lru_cache(maxsize=256)
def _largest_total(recipe: CMPQ, out_features: int, in_features: int) -> int:
    """The largest sum of bits whose stored size is within `bpw`.

    Sizes grow with the sum but for the bytes that rows are padded to, less than a byte per row and width, and for the
    map that equal bits everywhere do not need: bisect, then look a little further, and at the equal widths.
    """
    assert recipe.bpw is not None
    palette = recipe._palette(out_features)
    target = recipe.bpw * out_features * in_features
    low, high = palette[0] * in_features, palette[-1] * in_features

    def fits(total: int) -> bool:
        return recipe._size(out_features, in_features, total) <= target + _ROUNDING

    first, last = low, high
    while first < last:
        middle = (first + last + 1) // 2
        if fits(middle):
            first = middle
        else:
            last = middle - 1
    nearby = range(min(high, first + 32), first, -1)
    further = next((total for total in nearby if fits(total)), first)
    return max([further, *(b * in_features for b in palette if fits(b * in_features))])
