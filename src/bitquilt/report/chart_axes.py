"""An axis of a plot: `PlotAxis` places values in pixels, linearly or by logarithm, and chooses a few round ticks."""

import math
from dataclasses import dataclass

_MARGIN = 0.06  # free share of the axis at each end


@dataclass(frozen=True)
class PlotAxis:
    """From `low` to `high` over `pixels`. `flip`: large values first, since SVG counts y downwards."""

    low: float
    high: float
    pixels: float
    log: bool = False
    flip: bool = False

    @classmethod
    def around(
        cls, values: list[float], pixels: float, *, log: bool = False, flip: bool = False, span: float = 0.0
    ) -> "PlotAxis":
        """Return an axis that holds all values with a margin; linear where a logarithm is impossible or pointless.

        `span`: the least extent, as a share of the largest value, so that small differences stay small."""
        low, high = min(values), max(values)
        if (lacking := span * abs(high) - (high - low)) > 0:
            low, high = low - lacking / 2, high + lacking / 2
        log = log and low > 0 and high > 1.5 * low
        if log:
            low, high = math.log10(low), math.log10(high)
        margin = _MARGIN * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - margin, high + margin, pixels, log, flip)

    def place(self, value: float) -> float:
        """Pixels from the start, rounded to a tenth."""
        share = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return round(self.pixels * (1 - share if self.flip else share), 1)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values inside the axis."""
        if not self.log:
            return _round_steps(self.low, self.high, about)
        low, high = 10**self.low, 10**self.high
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
            if len(found) >= 3:
                return found[:: math.ceil(len(found) / (about + 2))]
        return _round_steps(low, high, about)


def _round_steps(low: float, high: float, about: int) -> list[float]:
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]
