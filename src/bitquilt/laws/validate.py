"""Cross-validation of a law: `cross_validate` fits without some sizes, ratios or token counts and predicts them.

As in the D-CPT paper (arXiv 2406.01375): every size is left out once; every pair of ratios is left out
once (9 ratios: 36 splits; with fewer than six ratios, one at a time); token counts are cut into three stretches and
each is left out once, the last of which tests longer training than the fit has seen.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from bitquilt.errors import UserError
from bitquilt.laws.data import Runs
from bitquilt.laws.dcpt import DCPTLaw
from bitquilt.laws.fit import Array, Goodness, goodness

RunAxis = Literal["n", "ratio", "d"]
AXES: tuple[RunAxis, ...] = ("n", "ratio", "d")
_PAIRS_FROM = 6  # ratios: leaving out two of five leaves three, too few for the ratio term
_STRETCHES = 3


@dataclass(frozen=True)
class Split:
    """The held-out values (N or D in 1e9, or ratios), and the fit of a law without them to their points."""

    held_out: tuple[float, ...]
    goodness: Goodness


@dataclass(frozen=True)
class CrossValidation:
    """All splits over one axis, with the means of the held-out Huber loss and R2 and the largest error in nats."""

    over: RunAxis
    splits: tuple[Split, ...]

    @property
    def huber(self) -> float:
        return float(np.mean([split.goodness.huber for split in self.splits]))

    @property
    def r2(self) -> float:
        return float(np.mean([split.goodness.r2 for split in self.splits]))

    @property
    def rmse(self) -> float:
        return float(np.sqrt(np.mean([split.goodness.rmse**2 for split in self.splits])))

    @property
    def max_error(self) -> float:
        return max(split.goodness.max_error for split in self.splits)


def cross_validate(runs: Runs, over: RunAxis, *, starts: int = 12, seed: int = 0) -> CrossValidation:
    """Leave values of one axis out in turn. Raises UserError with fewer than three distinct values there."""
    column: Array = {"n": runs.n, "ratio": runs.ratio, "d": runs.d}[over]
    values = np.unique(column)
    if len(values) < 3:
        raise UserError(
            f"cross-validation over {over} leaves values out: got {len(values)} different, wanted at least 3; "
            "measure more, or validate over another axis"
        )
    splits = []
    for held_out in _parts(over, values):
        mask = np.isin(column, held_out)
        kept, tested = runs.where(~mask), runs.where(mask)
        law = DCPTLaw.fit(kept, starts=starts, seed=seed, draws=0)
        splits.append(Split(held_out, goodness(tested.loss, law.value(tested.n, tested.d, tested.ratio))))
    return CrossValidation(over, tuple(splits))


def _parts(over: RunAxis, values: Array) -> list[tuple[float, ...]]:
    if over == "d":
        return [tuple(part.tolist()) for part in np.array_split(values, _STRETCHES)]
    if over == "ratio" and len(values) >= _PAIRS_FROM:
        return list(combinations(values.tolist(), 2))
    return [(value,) for value in values.tolist()]
