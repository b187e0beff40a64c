"""The nouns of `trainer.train`: `Link`, `TrainableWeight`, `TrainingSamples`, `TrainingSettings` and `Trained`.

A link is a function of its weights and its input: a block alone, or the blocks of a model in a row. A trainable weight
is a function of its values; `Mover` moves each value by its `Rule`. Nothing here knows a recipe, a module or a file.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from bitquilt.core.training import TrainedLayers
from bitquilt.core.types import Event, Solution

Values = tuple[Tensor, ...]
Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""(weights `[out, in]` by layer, input `[batch, tokens, width]`) -> output of the same shape, always the same."""
Read = Callable[[Sequence[int]], Tensor]
"""Sample numbers -> `[batch, tokens, width]`."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""(output, target) -> the mean over samples and tokens."""
Schedule = Literal["constant", "linear", "cosine"]
KeptEpoch = Literal["best", "last"]
_FACTORS: dict[Schedule, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


@dataclass(frozen=True)
class Rule:
    """The moves of one value: AdamW without decay, kept in `low` .. `high`."""

    rate: float
    low: float = -math.inf
    high: float = math.inf


class TrainableWeight(Protocol):
    """One layer's weight as a function of the values that are trained."""

    @property
    def start(self) -> Values:
        """The values that training begins with."""
        ...

    @property
    def rules(self) -> tuple[Rule, ...]:
        """One rule per value."""
        ...

    def weight(self, values: Values) -> Tensor:
        """The weight fp32 `[out, in]`, differentiable in the values."""
        ...


@dataclass(frozen=True, eq=False)
class Link:
    """A block of a chain: its function, and its trainable weights by layer."""

    forward: Forward
    parts: Mapping[str, TrainableWeight]


@dataclass(frozen=True)
class TrainingSettings:
    """`batch`: samples per step, a power of two; a block is called with that many samples, or a smaller power of two.
    `schedule`: rates stay, or fall to zero over all steps. `held_out`: share of the samples that is never trained on,
    at least one, and gives the loss after every epoch. `kept_epoch`: "best" = the epoch of least held-out loss, the
    start included; "last" = train on the held-out samples too and keep the last epoch. `autocast`: the
    links' products in bfloat16 while training; the held-out loss is computed in fp32."""

    epochs: int
    batch: int = 8
    schedule: Schedule = "linear"
    held_out: float = 0.125
    seed: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    autocast: bool = False
    kept_epoch: KeptEpoch = "best"

    def __post_init__(self) -> None:
        if self.batch < 1 or self.batch & (self.batch - 1):
            raise ValueError(f"batch is {self.batch}; wanted a power of two, such as 8")
        if self.epochs < 0:
            raise ValueError(f"epochs is {self.epochs}; wanted 0 or more")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; wanted a share of the samples between 0 and 1")

    def kept(self, count: int) -> int:
        """The number of `count` samples that are held out."""
        return min(count - 1, max(1, round(self.held_out * count)))

    def trained(self, count: int) -> int:
        """The number of `count` samples that are trained on."""
        return count if self.kept_epoch == "last" else count - self.kept(count)


@dataclass(frozen=True, eq=False)
class TrainingSamples:
    """`count` samples: the first link's inputs, and the targets of the last one's output. `loss`: None = the squared
    error in units of the first target's mean square."""

    count: int
    inputs: Read
    targets: tuple[Read, ...]
    loss: Loss | None = None


@dataclass(frozen=True, eq=False)
class Trained:
    """The kept values by layer, and the held-out losses: at the start, after each epoch, the best. `events`: (kind,
    detail) for the report."""

    values: Mapping[str, Values]
    start_loss: float
    best_loss: float
    losses: tuple[float, ...] = ()
    events: tuple[tuple[str, str], ...] = ()

    def layers(
        self, where: str, solutions: Mapping[str, Solution], notes: Mapping[str, Any] | None = None
    ) -> TrainedLayers:
        """Return the result with the recipe's `solutions`; `where`: the block, or the model, that was trained."""
        events = tuple(Event(where, kind, detail) for kind, detail in self.events)
        return TrainedLayers(solutions, events, self.start_loss, self.best_loss, self.losses, notes or {})


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value`."""
    return value + (rounded - value).detach()


def stored_as(dtype: torch.dtype, value: Tensor) -> Tensor:
    """`value` rounded to its storage type and back, within its range, with the gradient of `value`."""
    limit = torch.finfo(dtype).max
    return straight_through(value, value.clamp(-limit, limit).to(dtype).to(value.dtype))


class Mover:
    """The optimiser's step over all values, each by its rule, at the rate the schedule has reached."""

    def __init__(
        self, values: Mapping[str, Values], parts: Mapping[str, TrainableWeight], training: TrainingSettings, steps: int
    ) -> None:
        pairs = [(v, rule) for n, part in parts.items() for v, rule in zip(values[n], part.rules, strict=True)]
        self.pairs = [(v, rule) for v, rule in pairs if rule.rate > 0]
        by_rate: dict[float, list[Tensor]] = {}
        for value, rule in self.pairs:
            by_rate.setdefault(rule.rate, []).append(value)
        adam = [{"params": tensors, "lr": rate, "rate": rate} for rate, tensors in by_rate.items()]
        self.adam = torch.optim.AdamW(adam, betas=training.betas, weight_decay=0.0, fused=True) if adam else None
        self.schedule, self.steps, self.done = training.schedule, max(1, steps), 0

    @torch.no_grad()
    def move(self) -> None:
        """Take one step along the gradients."""
        share = self.done / self.steps
        factor = _FACTORS[self.schedule](share)
        self.done += 1
        if self.adam is not None:
            for group in self.adam.param_groups:
                group["lr"] = group["rate"] * factor
            self.adam.step()
        for value, rule in self.pairs:
            if math.isfinite(rule.low) or math.isfinite(rule.high):
                value.clamp_(rule.low, rule.high)
