"""CMPQ+: `cmpq` with what measured better, and trained on request; a recipe of this library."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from bitquilt.core.recipe import Needs
from bitquilt.core.types import LayerPlan, Solution
from bitquilt.recipes.cmpq.cmpq import CMPQ
from bitquilt.recipes.shared.effort import Effort
from bitquilt.train.levels import LevelRounding
from bitquilt.train.problem import Rule, Values


@dataclass(frozen=True, kw_only=True)
class CMPQPlus(CMPQ, Effort[LevelRounding]):
    """`cmpq` with error compensation between channels, in descending norm, bits by what they save, and layers that
    repair what the layers before them broke, as in `quilt`: each of the three is measured in docs/benchmarks.md. No
    outliers unless asked: where errors are compensated their bytes are worth more as bits (0.067 against 0.094 with
    the published amount on babyllama, 0.034 against 0.039 on the demo model, one budget of 2.6 bits per weight).
    `effort` and the rest of training, of codes, levels and gains: `recipes.effort`. `reach`: half a step is worse where
    calibration is short of the weights (babyllama, 2.25 bits: 0.101 with 0.2, no gain with 0.5) and no better else."""

    name: ClassVar[str] = "cmpq+"

    error_outliers: float = 0.0
    act_outliers: float = 0.0
    allocation: Literal["norm", "first", "error_table", "global"] = "error_table"
    compensation: bool = True
    alpha: float = 0.75
    stream_alpha: float = 0.75
    reach: float = 0.2

    @property
    def needs(self) -> Needs:
        """What `cmpq` needs, and the block's outputs for training."""
        return replace(super().needs, full_outputs=self.effort != "fast")

    def check(self) -> None:
        """Raise ValueError naming the first field that cannot work, before any layer is read."""
        super().check()
        self.check_effort()
        if self.effort == "fast":
            return
        if not self.compensation:
            raise ValueError(f"effort={self.effort} trains the result of a sweep; use compensation=true")
        for name in ("error_outliers", "act_outliers"):
            if share := getattr(self, name):
                raise ValueError(f"{name} is {share:g}; effort={self.effort} trains codes and levels alone: use 0")

    def part_of(self, solution: Solution, plan: LayerPlan, rounding: Rule, scaling: Rule) -> LevelRounding:
        """Offsets, levels and gains of its channels."""
        return LevelRounding.of(solution.weight, solution.details["aim"], rounding, scaling)

    def solution_of(self, part: LevelRounding, values: Values, plan: LayerPlan) -> Solution:
        """The layer with these values."""
        stored, aim = part.export(values)
        return Solution(stored, None, (), {"aim": aim})
