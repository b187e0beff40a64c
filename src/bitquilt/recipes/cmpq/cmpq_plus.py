"""CMPQ+: `cmpq` with compensation between channels, and with training on request. A recipe of this library.

In addition to `cmpq`: errors are repaired by later channels as in GPTQ, channels in descending norm, levels fitted on
what is then there; layers repair what the layers before them broke (`layer.target`); bits go where they save most.
Compensation takes 22 to 70 % off the KL of `cmpq` at 3 bits per weight, repairs another 36 to 39 % (docs/lab/cmpq.md).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bitquilt.core.recipe import Needs
from bitquilt.core.training import Training
from bitquilt.core.types import Layer, LayerPlan, LayerStats, Solution
from bitquilt.layer.codebook_weight import sweep_channels
from bitquilt.layer.grouped_weight import layer_events
from bitquilt.layer.hessian import check_damp, factorize
from bitquilt.layer.target import check_repairs, corrected
from bitquilt.recipes.cmpq.cmpq import CMPQ, ChannelAllocation
from bitquilt.recipes.cmpq.input_norms import InputNorms, channel_norms
from bitquilt.recipes.cmpq.trial_losses import Trial
from bitquilt.recipes.shared.effort import Effort, EffortTraining
from bitquilt.recipes.shared.traits import Traits
from bitquilt.train.levels import LevelRounding
from bitquilt.train.problem import KeptEpoch, Rule, Values

# Steps that training can move a weight in a block: half a step is worse where calibration is short of the weights
# (babyllama, 2.25 bits: 0.101 with 0.2, no gain with 0.5) and no better elsewhere.
_REACH = 0.2


@dataclass(frozen=True, kw_only=True)
class CMPQPlus(CMPQ):
    """Options of CMPQ+: `bits`, `bpw`, `palette` and `allocation` of `CMPQ`, and these. `published` stays False.

    `error_outliers`, `act_outliers`: as in `CMPQ`, off: where errors are compensated their bytes are worth more as
    bits. At 2.6 bits per weight in one budget, KL 0.067 against 0.094 with the published amount on babyllama, 0.034
    against 0.039 on the demo model.
    `damp`: added to the Hessian's diagonal, as a share of its mean; 0.01 as in GPTQ.
    `alpha`, `stream_alpha`: share of the error of earlier layers, at the layer's input and in the residual stream,
    that the layer repairs. On the demo model at 2.55 bits per weight: KL 0.0480 with 0.75 each, 0.0631 with 0.
    `effort`: "fast" = no training; "normal" = each block's codes, levels and gains are trained, 23 to 40 % less KL on
    stories260k, 6 % on babyllama at 2.25 bits; "best" = then those of the whole model.
    `epochs`, `tune_epochs`, `tune_rate`, `autocast`: as in `Quilt`.
    `kept_epoch`: as in `Quilt`; at 2.25 bits "last" has 0.104 instead of 0.101 on babyllama, 0.0428 instead of 0.0471
    on the demo model.
    """

    name: ClassVar[str] = "cmpq+"
    traits: ClassVar[Traits] = Traits(
        fractional=True,
        own_allocations=CMPQ.traits.own_allocations,
        why_not_clipped="has free levels, which no range holds together: effort=normal trains these",
    )

    error_outliers: float = 0.0
    act_outliers: float = 0.0
    allocation: ChannelAllocation = "error_table"
    damp: float = 0.01
    alpha: float = 0.75
    stream_alpha: float = 0.75
    effort: Effort = EffortTraining.effort
    epochs: int = EffortTraining.epochs
    tune_epochs: int = EffortTraining.tune_epochs
    tune_rate: float = EffortTraining.tune_rate
    kept_epoch: KeptEpoch = EffortTraining.kept_epoch
    autocast: bool = EffortTraining.autocast

    @property
    def effort_training(self) -> EffortTraining[LevelRounding]:
        """The training that the options ask for."""
        return EffortTraining.of(self, _REACH, _part_of, _solution_of)

    @property
    def needs(self) -> Needs:
        """The Hessian, the drift of the inputs for repairs, and the block's outputs for training."""
        return Needs(
            hessian=True,
            drift=bool(self.alpha or self.stream_alpha),
            stream_drift=bool(self.stream_alpha),
            full_outputs=self.effort != "fast",
        )

    def check(self) -> None:
        """Raise ValueError naming the first option that cannot work, before any layer is read."""
        if self.published:
            raise ValueError("recipe cmpq+ has no published variant; leave out `published`, or use recipe cmpq")
        super().check()
        check_damp(self.damp)
        check_repairs(self.alpha, self.stream_alpha)
        self.effort_training.check()
        for name, share in (("error_outliers", self.error_outliers), ("act_outliers", self.act_outliers)):
            if share and self.effort != "fast":
                raise ValueError(f"{name} is {share:g}; effort={self.effort} trains codes and levels alone: use 0")

    def prepare(self, stats: LayerStats | None) -> InputNorms:
        """Norms of the channels and the factor of the Hessian. Raises ValueError without finite statistics."""
        norms = channel_norms(stats)
        assert stats is not None
        order = stats.hessian.diagonal().argsort(descending=True, stable=True)
        return InputNorms(norms, factorize(stats.hessian / stats.tokens, self.damp, order))

    def quantize(self, layer: Layer, plan: LayerPlan, prepared: InputNorms) -> Solution:
        """Sweep the layer's channels. Raises ValueError naming the layer if a weight is NaN or Inf."""
        factor = prepared.factor
        assert factor is not None
        trial = Trial(prepared.norms, prepared.cost)
        chosen = self._chosen(layer, plan, trial)
        target, notes = corrected(layer, factor, self.alpha, self.stream_alpha)
        weight = target.weight.masked_fill(factor.dead, 0.0)
        protected = trial.protected(weight, chosen.bits, chosen.tables, chosen.outliers)
        stored, loss, aim = sweep_channels(weight, chosen.bits, chosen.tables, protected, trial.cost, factor)
        events = (*chosen.events, *notes, *layer_events(layer, chosen.tables.dtype, factor, self.damp))
        return Solution(stored, loss, events, {"aim": aim})

    @property
    def training(self) -> Training:
        """The training that `effort` asks for."""
        return self.effort_training.steps

    def column_cost(self, layer: Layer, prepared: InputNorms) -> Tensor:
        """1 / U_jj^2: later channels compensate."""
        return prepared.cost


def _part_of(solution: Solution, plan: LayerPlan, rounding: Rule, scaling: Rule) -> LevelRounding:
    """Offsets of the weights, levels of the tables and gains of the channels."""
    return LevelRounding.of(solution.weight, solution.details["aim"], rounding, scaling)


def _solution_of(part: LevelRounding, values: Values, plan: LayerPlan) -> Solution:
    """The layer with trained values."""
    stored, aim = part.export(values)
    return Solution(stored, None, (), {"aim": aim})
