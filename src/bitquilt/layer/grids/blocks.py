"""Grids of llama.cpp's block types: `UnitFit` fits them in a sweep, `round_blocks` without one, `RunGrid` rounds.

A run of 16 or 32 columns has integers s and m, a block of 256 columns the units d and dmin behind them. The units come
first, from the whole block and the layer's own weights; a run's integers when the sweep reaches it, from weights that
hold the errors of earlier columns, among the neighbours of the best real step and low. Everything is as stored before
a code is chosen. Errors are weighted by what they cost the sweep.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bitquilt.core.types import Format, LayerPlan, Layout, QuantizedWeight, Segment
from bitquilt.layer.grids.grid import Grid
from bitquilt.layer.grids.uniform import ZeroRule
from bitquilt.ops.block_types import BLOCK_TYPES, BlockScales, BlockType, decode_blocks, read_heads, write_heads

BLOCK_WIDTHS = (2, 3, 4, 5, 6, 8)
RUN = 32  # columns of the groups in which recipes plan
_OF_256 = dict(zip(BLOCK_WIDTHS, ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0"), strict=True))
# As llama.cpp falls back, but that 4 bits are levels of a table at once: nothing below 4 bits has blocks of 32.
_OF_32 = dict(zip(BLOCK_WIDTHS, ("iq4_nl", "iq4_nl", "iq4_nl", "q5_0", "q8_0", "q8_0"), strict=True))
_TAUS = (1.0, 0.5, 0.6, 0.68, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05)  # shares of the full range
_MOST = 65504.0
_ROWS = 2048  # at once in `round_blocks`


# Codes of the table's nearest levels for floor(2 x): levels are integers, so their middles are halves.
_NEAREST = (lambda levels: torch.bucketize(torch.arange(-127.75, 128.25, 0.5), (levels[1:] + levels[:-1]) / 2).float())(
    BLOCK_TYPES["iq4_nl"].levels()
)


def block_type(bits: int, columns: int) -> BlockType:
    """Return the type that stores rows of `columns` at `bits`: of 32 columns where 256 do not divide them."""
    return BLOCK_TYPES[(_OF_32 if columns % 256 else _OF_256)[bits]]


def block_layout(rows: int, columns: int, plan: LayerPlan) -> Layout:
    """The layout of a weight in blocks; one whose columns 32 does not divide is for engines to refuse."""
    return Layout(rows, columns, ((block_format(_type_of(plan, columns)), columns),))


def check_blocks(zeros: ZeroRule, group_size: int, trained: bool) -> None:
    """Raise ValueError naming the recipe's option that does not go with blocks."""
    if zeros == "blocks" and group_size != RUN:
        raise ValueError(f"group_size is {group_size}; blocks have runs of their own: leave it out, or give {RUN}")
    if zeros == "blocks" and trained:
        raise ValueError("scales of blocks are not trained; leave out effort and clipping")


def block_format(kind: BlockType) -> Format:
    """How weights of the type are stored."""
    return Format(kind.bits, kind.columns, kind.name, torch.uint8, symmetric=True)  # type: ignore[arg-type]


def run_plan(plan: LayerPlan, columns: int) -> tuple[BlockType, LayerPlan]:
    """Return the type for a plan of equal bits, and the plan in runs of it. ValueError: other plans or columns."""
    kind = _type_of(plan, columns)
    if columns % kind.run:
        raise ValueError(f"{columns} inputs are no multiple of {kind.run}, the smallest block; leave the layer out")
    return kind, LayerPlan((kind.bits,) * (columns // kind.run), kind.run)


def _type_of(plan: LayerPlan, columns: int) -> BlockType:
    bits = {int(width) for width in plan.bits}
    if len(bits) != 1 or not bits <= set(BLOCK_WIDTHS):
        raise ValueError(f"groups of {sorted(bits)} bits; blocks have one of {BLOCK_WIDTHS} bits in all of a layer")
    return block_type(bits.pop(), columns)


@dataclass(frozen=True, eq=False)
class RunGrid(Grid):
    """One run of columns: the units of its block, `d` and `dmin` fp16 `[out, 1]`, and `s` and `m` int16 `[out, 1]`."""

    kind: BlockType
    scales: BlockScales

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes of `[out, n]` as float."""
        step, low = self.scales.steps()
        return _codes(weight, step, low, self.kind)

    def decode(self, codes: Tensor) -> Tensor:
        """fp32 values of float codes `[out, n]`."""
        step, low = self.scales.steps()
        return _values(codes, step, low, self.kind)

    @classmethod
    def segment(cls, grids: Sequence[Self], codes: Tensor, group_size: int) -> Segment:
        """All runs of a row as they are stored."""
        kind = grids[0].kind
        firsts = grids[:: kind.runs]
        scales = BlockScales(
            torch.cat([grid.scales.d for grid in firsts], dim=1),
            torch.cat([grid.scales.s for grid in grids], dim=1),
            _joined([grid.scales.dmin for grid in firsts]),
            _joined([grid.scales.m for grid in grids]),
        )
        return Segment(block_format(kind), codes, write_heads(scales, kind))

    @classmethod
    def of_segment(cls, segment: Segment, columns: slice) -> Self:
        """The grid of one run of a segment."""
        kind = BLOCK_TYPES[segment.format.grid]
        scales, run, block = read_heads(segment.scale, kind), columns.start // kind.run, columns.start // kind.columns
        return cls(kind, _one(scales, block, run))


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found, dim=1) if found else None


def _one(scales: BlockScales, block: int, run: int) -> BlockScales:
    b, r = slice(block, block + 1), slice(run, run + 1)
    dmin = None if scales.dmin is None else scales.dmin[:, b]
    return BlockScales(scales.d[:, b], scales.s[:, r], dmin, None if scales.m is None else scales.m[:, r])


def _codes(weight: Tensor, step: Tensor, low: Tensor | None, kind: BlockType) -> Tensor:
    """Nearest codes, as float; steps of zero have one level."""
    exact = (weight if low is None else weight + low) / torch.where(step == 0, 1.0, step)
    if kind.table:
        return _NEAREST.to(weight.device)[(2 * exact).floor_().clamp_(-256, 255).long() + 256]
    return (exact.round() + kind.offset).clamp_(0, 2**kind.bits - 1)


def _values(codes: Tensor, step: Tensor, low: Tensor | None, kind: BlockType) -> Tensor:
    values = step * _levels(codes, kind)
    return values if low is None else values - low


def _levels(codes: Tensor, kind: BlockType) -> Tensor:
    return kind.levels().to(codes.device)[codes.long()] if kind.table else codes - kind.offset


@dataclass(frozen=True, eq=False)
class _Runs:
    """Runs `weight` fp32 `[..., n]` and what an error costs in each column, `importance`, which broadcasts to it."""

    weight: Tensor
    importance: Tensor
    kind: BlockType

    def error(self, step: Tensor, low: Tensor | None) -> Tensor:
        """Weighted squared error `[..., 1]` of the nearest levels."""
        codes = _codes(self.weight, step, low, self.kind)
        apart = self.weight - _values(codes, step, low, self.kind)
        return (apart.square_() * self.importance).sum(dim=-1, keepdim=True)

    def real(self) -> tuple[Tensor, Tensor | None]:
        """The best real step and low of every run `[..., 1]`: least squares for the levels of several ranges."""
        w, kind = self.weight, self.kind
        if kind.low:
            bottom = w.amin(dim=-1, keepdim=True).clamp_max(0)
            full = (w.amax(dim=-1, keepdim=True) - bottom).clamp_min(1e-12) / (2**kind.bits - 1)
            starts: list[tuple[Tensor, Tensor | None]] = [(full * tau, -bottom * tau) for tau in _TAUS]
        else:
            levels = kind.levels()
            peak = w.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
            ends = (float(levels[0]), float(levels[-1]))
            starts = [(peak * (tau / end), None) for tau in _TAUS for end in ends]
        best_step, best_low = starts[0]
        least = self.error(best_step, best_low)
        for start in starts:
            step, low = self._refitted(*start)
            loss = self.error(step, low)
            better = loss < least
            least, best_step = torch.where(better, loss, least), torch.where(better, step, best_step)
            if low is not None and best_low is not None:
                best_low = torch.where(better, low, best_low)
        return best_step, best_low

    def _refitted(self, step: Tensor, low: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Least-squares step and low for the levels that are nearest with these."""
        w, mass = self.weight, self.importance.expand_as(self.weight)
        level = _levels(_codes(w, step, low, self.kind), self.kind)

        def total(values: Tensor) -> Tensor:
            return (mass * values).sum(dim=-1, keepdim=True)

        wl, ll = total(w * level), total(level * level).clamp_min(1e-30)
        plain = wl / ll
        if low is None:
            return plain, None
        one, sum_l, x = total(torch.ones_like(w)), total(level), total(w)
        determinant = ll * one - sum_l * sum_l
        usable = determinant > 1e-9 * ll * one
        slope = torch.where(usable, (wl * one - sum_l * x) / determinant.clamp_min(1e-30), plain)
        found = (slope * sum_l - x) / one.clamp_min(1e-30)
        if self.kind.scale_bits:  # K types subtract a low that is not negative
            usable &= (found >= 0) & (slope > 0)
            slope, found = torch.where(usable, slope, plain), torch.where(usable, found, 0.0)
        return slope, found

    def integers(self, d: Tensor, dmin: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The best s and m for these units fp32 `[..., 1]`, next to those of the real step and low."""
        kind, (step, low) = self.kind, self.real()
        least_s, most_s = _range(kind)
        first_s = (step / torch.where(d == 0, 1.0, d)).round().clamp(least_s, most_s)
        first_m = None
        if dmin is not None and low is not None:
            first_m = (low / torch.where(dmin == 0, 1.0, dmin)).round().clamp(0, most_s)
        best_s, best_m, least = first_s, first_m, None
        for move_s in (0, -1, 1):
            for move_m in (0, -1, 1) if first_m is not None else (0,):
                s = (first_s + move_s).clamp(least_s, most_s)
                m = None if first_m is None else (first_m + move_m).clamp(0, most_s)
                loss = self.error(d * s, None if m is None or dmin is None else dmin * m)
                if least is None:
                    least = loss
                    continue
                better = loss < least
                least, best_s = torch.where(better, loss, least), torch.where(better, s, best_s)
                if m is not None and best_m is not None:
                    best_m = torch.where(better, m, best_m)
        return best_s, best_m

    def units(self) -> tuple[Tensor, Tensor | None]:
        """Units d and dmin fp16 `[out, blocks]` of runs `[out, blocks, runs, n]`."""
        kind, (step, low) = self.kind, self.real()
        if not kind.scale_bits:
            smallest = None if low is None else _half(-low[..., 0, 0])
            return _half(step[..., 0, 0]), smallest
        steps = step.squeeze(-1)
        largest = steps.gather(-1, steps.abs().argmax(dim=-1, keepdim=True))
        d = _half(largest / (_range(kind)[0] if kind.signed or kind.name == "q6_k" else _range(kind)[1]))
        dmin = None if low is None else _half(low.squeeze(-1).amax(dim=-1, keepdim=True) / _range(kind)[1])
        for _ in range(2):  # least squares for the units, with the integers that they have
            wide, narrow = d.float().unsqueeze(-1), None if dmin is None else dmin.float().unsqueeze(-1)
            s, m = self.integers(wide, narrow)
            codes = _codes(self.weight, wide * s, None if m is None or narrow is None else narrow * m, kind)
            d, dmin = self._units_of(s * _levels(codes, kind), m, d, dmin)
        return d.squeeze(-1), None if dmin is None else dmin.squeeze(-1)

    def _units_of(self, a: Tensor, m: Tensor | None, d: Tensor, dmin: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The units `[out, blocks, 1]` with the least error for d a - dmin m; the given ones where none are found."""

        def total(values: Tensor) -> Tensor:
            return (values * self.importance).sum(dim=(-2, -1)).unsqueeze(-1)

        wa, aa = total(self.weight * a), total(a * a)
        if m is None or dmin is None:
            return _half(torch.where(aa > 0, wa / aa.clamp_min(1e-30), d.float())), None
        b = m.expand_as(a)
        am, mm, wm = total(a * b), total(b * b), total(self.weight * b)
        determinant = aa * mm - am * am
        usable = determinant > 1e-6 * aa * mm
        unit = (wa * mm - am * wm) / determinant.clamp_min(1e-30)
        below = (wa * am - aa * wm) / determinant.clamp_min(1e-30)
        usable &= (unit > 0) & (below >= 0)
        return _half(torch.where(usable, unit, d.float())), _half(torch.where(usable, below, dmin.float()))


def _range(kind: BlockType) -> tuple[int, int]:
    """Least and most that s can be."""
    if kind.signed or kind.name == "q6_k":
        return -(2 ** (kind.scale_bits - 1)), 2 ** (kind.scale_bits - 1) - 1
    return 0, 2**kind.scale_bits - 1


def _half(values: Tensor) -> Tensor:
    return values.clamp(-_MOST, _MOST).half()


class UnitFit:
    """The fit of a layer's runs when a sweep reaches them. `weight` fp32 `[out, in]`, `importance` `[in]`."""

    def __init__(self, weight: Tensor, kind: BlockType, importance: Tensor) -> None:
        self.kind, self.importance = kind, importance
        self._d = self._dmin = None
        if kind.scale_bits:
            shape = (-1, kind.runs, kind.run)
            mass = importance.view(*shape)
            parts = [_Runs(rows.view(len(rows), *shape), mass, kind).units() for rows in weight.split(_ROWS)]
            self._d = torch.cat([d for d, _ in parts])
            self._dmin = _stacked([dmin for _, dmin in parts])

    def __call__(self, columns: slice, weight: Tensor, bits: int, scale_dtype: torch.dtype) -> RunGrid:
        """The grid of a run, `weight` `[out, n]` being its compensated columns."""
        kind = self.kind
        runs = _Runs(weight, self.importance[columns], kind)
        if self._d is None:
            step, low = runs.real()
            one = torch.ones(step.shape, dtype=torch.int16, device=step.device)
            return RunGrid(kind, BlockScales(_half(step), one, None if low is None else _half(-low)))
        at = slice(columns.start // kind.columns, columns.start // kind.columns + 1)
        d, dmin = self._d[:, at], None if self._dmin is None else self._dmin[:, at]
        s, m = runs.integers(d.float(), None if dmin is None else dmin.float())
        return RunGrid(kind, BlockScales(d, s.to(torch.int16), dmin, None if m is None else m.to(torch.int16)))


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def round_blocks(weight: Tensor, kind: BlockType, importance: Tensor | None = None) -> QuantizedWeight:
    """Round `[rows, columns]` to blocks without feedback, errors weighted by `importance` `[columns]`."""
    codes, heads = zip(*(_rounded(rows.float(), kind, importance) for rows in weight.split(_ROWS)), strict=True)
    return QuantizedWeight((Segment(block_format(kind), torch.cat(codes), torch.cat(heads)),))


def _rounded(weight: Tensor, kind: BlockType, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (len(weight), -1, kind.runs, kind.run)
    mass = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance
    runs = _Runs(weight.view(shape), mass.view(shape[1:]), kind)
    d, dmin = runs.units()
    s, m = torch.ones(shape[0], d.shape[1], kind.runs, device=weight.device), None
    if kind.scale_bits:
        wide, narrow = (None if unit is None else unit.float()[..., None, None] for unit in (d, dmin))
        assert wide is not None
        s, m = runs.integers(wide, narrow)
    integers = [None if part is None else part.flatten(1).to(torch.int16) for part in (s, m)]
    assert integers[0] is not None
    scales = BlockScales(d, integers[0], dmin, integers[1])
    step, low = (None if part is None else part.view(*shape[:1], -1, kind.runs, 1) for part in scales.steps())
    assert step is not None
    found = _codes(runs.weight, step, low, kind)
    return found.flatten(1).to(torch.uint8), write_heads(scales, kind)


def block_values(weight: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Return `weight` `[rows, columns]` rounded to blocks of these bits."""
    kind = block_type(bits, weight.shape[1])
    stored = round_blocks(weight, kind, importance).segments[0]
    return decode_blocks(stored.codes, stored.scale, kind)
