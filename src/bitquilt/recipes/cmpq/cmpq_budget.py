"""`ChannelBudget`: what a layer of a given shape can have for a number of bits. Sizes alone, no weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from bitquilt.allocation.fractional import FULL_PALETTE, check_budget, largest_within, spread_bits
from bitquilt.allocation.knapsack import spend_all
from bitquilt.core.packing import storage_bits
from bitquilt.core.types import MAX_BITS
from bitquilt.layer.codebook_weight import LevelTables
from bitquilt.layer.layouts import channel_layout
from bitquilt.layer.outliers import MAX_SHARE, activation_count

_SPENT = 0.9  # share of a budget: widths whose largest leaves more than a tenth are not worth trying
_ROUNDING = 1e-6  # bits: a target is a float, a stored size a whole number


@dataclass(frozen=True)
class ChannelBudget:
    """`bits`: nominal mean; `bpw`: instead, true bits per weight. `tables`: how levels are stored. `palette`: widths
    that a channel may have. `act_share`, `error_share`: shares of the weights in O_act and O_q. `fewer`: with `bpw`,
    outliers may be left out for more bits."""

    bits: float
    bpw: float | None
    tables: LevelTables
    palette: tuple[int, ...] = FULL_PALETTE
    act_share: float = 0.0
    error_share: float = 0.0
    fewer: bool = False

    def widths(self, out_features: int) -> tuple[int, ...]:
        """The palette without widths that give a channel's own table more levels than the channel has weights."""
        return tuple(sorted({min(b, self.widest(out_features)) for b in self.palette}))

    def widest(self, out_features: int) -> int:
        """Bits beyond which a channel's own table would hold more levels than weights."""
        return max(1, (out_features - 1).bit_length()) if self.tables.scope == "channel" else MAX_BITS

    def spread(self, norms: Sequence[float], out_features: int, total: int) -> tuple[int, ...]:
        """`total` bits by rank of the norms."""
        return spread_bits(norms, total, palette=self.widths(out_features))

    def asked(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Asked-for sizes of O_act and O_q."""
        act = activation_count(self.act_share, out_features, in_features)
        return act, round(self.error_share * out_features * in_features)

    def outliers(self, out_features: int, bits: Sequence[int]) -> tuple[int, int]:
        """Sizes of O_act and O_q with these bits: as asked, or with `bpw` what it leaves room for, O_act first."""
        act, error = self.asked(out_features, len(bits))
        if self.bpw is None or act + error == 0:
            return act, error
        target = self.bpw * out_features * len(bits) + _ROUNDING
        most = round(MAX_SHARE * out_features * len(bits)) if error else act
        bare = channel_layout(out_features, bits, self.tables)
        room = largest_within(lambda n: storage_bits(replace(bare, outliers=n)), 0, most, target)
        return (act, room - act) if act <= room else (0, room if error else 0)

    def size(self, out_features: int, bits: Sequence[int]) -> int:
        """Stored bits with the asked-for outliers."""
        return storage_bits(channel_layout(out_features, bits, self.tables, sum(self.asked(out_features, len(bits)))))

    def reach(self, out_features: int, in_features: int) -> tuple[float, float]:
        """True bits per weight at the palette's ends; the lower without outliers where they may be left out."""
        palette = self.widths(out_features)
        bare = self.candidates()[-1]
        least = bare._ranked_size(out_features, in_features, palette[0] * in_features)
        most = self._ranked_size(out_features, in_features, palette[-1] * in_features)
        return least / (out_features * in_features), most / (out_features * in_features)

    def reaches(self, out_features: int, in_features: int) -> bool:
        """Return whether some map of the palette, with the asked-for outliers and no others, has `bpw`."""
        if self.bpw is None:
            return True
        least, most = replace(self, fewer=False).reach(out_features, in_features)
        return least <= self.bpw <= most

    def candidates(self) -> list["ChannelBudget"]:
        """This budget, and with `bpw` and `fewer` the same without outliers, whose bytes become bits."""
        shares = (1.0, 0.0) if self.fewer and self.bpw is not None else (1.0,)
        return [replace(self, act_share=s * self.act_share, error_share=s * self.error_share) for s in shares]

    def total(self, out_features: int, in_features: int) -> int:
        """Sum of the channels' bits: as asked, or the most that `bpw` leaves room for."""
        if self.bpw is None:
            check_budget(self.bits, self.palette)
            return min(round(self.bits * in_features), self.widest(out_features) * in_features)
        return _largest_total(self, out_features, in_features)

    def check_reach(self, out_features: int, in_features: int) -> None:
        """Raise ValueError if no map of the palette has `bpw`."""
        if self.bpw is None:
            return
        least, most = self.reach(out_features, in_features)
        if not least <= self.bpw <= most:
            raise ValueError(
                f"bpw is {self.bpw}; this {out_features} x {in_features} layer reaches {least:.3f} to {most:.3f}"
            )

    def least_error(
        self,
        table: Sequence[Sequence[float]],
        widths: Sequence[int],
        out_features: int,
        total: int,
        norms: Sequence[float],
    ) -> tuple[int, ...]:
        """Bits per channel of least summed error within the budget; `table[j][i]`: error of channel j at `widths[i]`.

        With `bpw` a width has a price of its own (its table, its rows' padding, a larger map), so every run of
        neighbouring widths is tried, and the rank of the norms, which also decides where nothing else fits.
        """
        if self.bpw is None:
            return tuple(widths[i] for i in spend_all(table, widths, total))
        target = self.bpw * out_features * len(table) + _ROUNDING
        column = {b: i for i, b in enumerate(widths)}
        ranked = self.spread(norms, out_features, total)
        maps = [ranked] if set(ranked) <= set(widths) else []
        ends = [self._channel_price(out_features, b) * len(table) for b in widths]
        for first in range(len(widths)):
            for last in range(first, len(widths)):
                wasteful = ends[last] < _SPENT * target and last + 1 < len(widths)
                if ends[first] <= target and not wasteful:
                    maps += self._cheapest(table, widths, range(first, last + 1), out_features, target)
        fits = [bits for bits in maps if self.size(out_features, bits) <= target]
        losses = [sum(row[column[b]] for row, b in zip(table, bits, strict=True)) for bits in fits]
        return fits[losses.index(min(losses))] if fits else ranked

    def _cheapest(
        self,
        table: Sequence[Sequence[float]],
        widths: Sequence[int],
        among: range,
        out_features: int,
        target: float,
    ) -> list[tuple[int, ...]]:
        """Maps of least summed error with the widths numbered `among`, at about `target` stored bits."""
        part = [[row[i] for i in among] for row in table]
        prices = [self._channel_price(out_features, widths[i]) for i in among]
        # the size of what channels share (padding, map, outliers, tables) is known only from the finished map
        allowed, found = target, []
        for _ in range(4):
            allowed = max(allowed, prices[0] * len(table))
            found.append(tuple(widths[among[i]] for i in spend_all(part, prices, allowed)))
            spare = target - self.size(out_features, found[-1])
            if len(found) > 1 and found[-1] == found[-2]:
                break
            allowed += spare
        return found

    def check_layers(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ValueError naming the first layer, `[out, in]` by path, that cannot have `bpw`, and what all can."""
        if self.bpw is None or not shapes:
            return
        ranges = {name: self.reach(*shape) for name, shape in shapes.items()}
        low, high = max(r[0] for r in ranges.values()), min(r[1] for r in ranges.values())
        for name, (least, most) in ranges.items():
            if not least <= self.bpw <= most:
                out_features, in_features = shapes[name]
                common = (
                    f"all layers together reach {low:.3f} to {high:.3f}" if low <= high else "no bpw fits all layers"
                )
                raise ValueError(
                    f"bpw is {self.bpw}; {name} ({out_features} x {in_features}) reaches {least:.3f} to {most:.3f} "
                    f"with its tables and outliers; {common}"
                )

    def _channel_price(self, out_features: int, bits: int) -> int:
        """Stored bits of one channel: its codes, and its own table or gain."""
        if self.tables.scope == "shared":
            return out_features * bits + 8 * self.tables.gain_dtype.itemsize
        return out_features * bits + 8 * self.tables.dtype.itemsize * 2**bits

    def _ranked_size(self, out_features: int, in_features: int, total: int) -> int:
        """The size for some ranking of the channels."""
        return self.size(out_features, self.spread([float(-j) for j in range(in_features)], out_features, total))


@lru_cache(maxsize=256)
def _largest_total(budget: ChannelBudget, out_features: int, in_features: int) -> int:
    """The largest sum of the channels' bits within `budget.bpw`.

    Sizes grow with the sum, with two exceptions: rows are padded to whole bytes, less than a byte per row and width,
    and equal bits everywhere need neither map nor second table.
    """
    assert budget.bpw is not None
    palette = budget.widths(out_features)
    return largest_within(
        lambda total: budget._ranked_size(out_features, in_features, total),
        palette[0] * in_features,
        palette[-1] * in_features,
        budget.bpw * out_features * in_features + _ROUNDING,
        [b * in_features for b in palette],
    )
