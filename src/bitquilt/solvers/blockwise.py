"""How are all the quantized weights of a block trained together? train(forward, parts, samples, training) -> Trained.

The block is a function of its weights and its input; what is trained is hidden behind `Part`. Nothing here knows a
recipe, a module or a file. The loss is the squared error of the block's output against one or more targets, in units
of the first target's mean square. What is returned is never worse than the start on samples that were not trained on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

Values = tuple[Tensor, ...]
Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""(weights `[out, in]` by layer, input `[batch, tokens, width]`) -> output of the same shape, always the same."""
Read = Callable[[Sequence[int]], Tensor]
"""Sample numbers -> `[batch, tokens, width]`."""
R = TypeVar("R")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Rule:
    """How one tensor of a part moves: AdamW without decay, or by the sign of its gradient; kept in `low` .. `high`."""

    rate: float
    kind: Literal["adam", "sign"] = "adam"
    low: float = -math.inf
    high: float = math.inf


class Part(Protocol):
    """One layer's trainable weight."""

    @property
    def start(self) -> Values:
        """Where training begins."""
        ...

    @property
    def rules(self) -> tuple[Rule, ...]:
        """One per value."""
        ...

    def weight(self, values: Values) -> Tensor:
        """The weight fp32 `[out, in]`, differentiable in the values."""
        ...


@dataclass(frozen=True)
class Training:
    """`batch`: samples per step, a power of two; the block is called with that many samples, or a power of two fewer.
    `schedule`: rates stay, or fall to zero over all steps. `held_out`: share of the samples never trained on, at least
    one; they are asked after every epoch. `patience`: epochs without a gain before it stops, 0 = never."""

    epochs: int
    batch: int = 8
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    held_out: float = 0.125
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.batch & (self.batch - 1):
            raise ValueError(f"batch is {self.batch}; wanted a power of two, such as 8")
        if self.epochs < 0:
            raise ValueError(f"epochs is {self.epochs}; wanted 0 or more")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; wanted a share of the samples between 0 and 1")

    def kept(self, count: int) -> int:
        """How many of `count` samples are held out."""
        return min(count - 1, max(1, round(self.held_out * count)))

    def trained(self, count: int) -> int:
        """How many of `count` samples are trained on."""
        return count - self.kept(count)


@dataclass(frozen=True, eq=False)
class Samples:
    """`count` samples: what the block reads, and what its output is compared with."""

    count: int
    inputs: Read
    targets: tuple[Read, ...]


@dataclass(frozen=True, eq=False)
class Trained:
    """The best values seen, by layer, and the held-out losses: at the start, after each epoch, the best.
    `events`: (kind, detail) of what a report must say."""

    values: Mapping[str, Values]
    start_loss: float
    best_loss: float
    losses: tuple[float, ...] = ()
    events: tuple[tuple[str, str], ...] = ()


def train(forward: Forward, parts: Mapping[str, Part], samples: Samples, training: Training) -> Trained:
    """Train all parts together for `training.epochs` passes over the samples that are not held out.

    A loss that is not finite ends it with the start, a lack of memory halves what goes through the block at once; both
    are events. Raises ValueError if the block answers the same question twice differently, or with fewer than two
    samples; MemoryError if not even one sample fits.
    """
    if samples.count < 2:
        raise ValueError(f"{samples.count} sample to train on; wanted at least 2: one is held out")
    generator = torch.Generator().manual_seed(training.seed)
    order = torch.randperm(samples.count, generator=generator).tolist()
    kept = training.kept(samples.count)
    run = _Run(forward, parts, samples, training.batch)
    return run.fit(order[:kept], order[kept:], training, generator)


@dataclass(eq=False)
class _Run:
    forward: Forward
    parts: Mapping[str, Part]
    samples: Samples
    at_once: int
    unit: float = 1.0
    events: list[tuple[str, str]] = field(default_factory=list)

    def fit(self, held: list[int], rest: list[int], training: Training, generator: torch.Generator) -> Trained:
        start = {name: part.start for name, part in self.parts.items()}
        self._check_repeatable(start, held[0])
        first = self.samples.targets[0](held)
        self.unit = max(float(first.square().mean()), 1e-30)
        start_loss = self.held_out_loss(start, held)
        if not math.isfinite(start_loss):
            self.events.append(("training skipped", "the block's loss is not finite before training"))
            return Trained(start, start_loss, start_loss, (), tuple(self.events))
        values = {name: tuple(v.clone().requires_grad_(True) for v in tensors) for name, tensors in start.items()}
        best, best_loss, since = start, start_loss, 0
        losses: list[float] = []
        steps = training.epochs * -(-len(rest) // training.batch)
        mover = _Mover(values, {name: part.rules for name, part in self.parts.items()}, training.schedule, steps)
        for epoch in range(training.epochs):
            shuffled = [rest[i] for i in torch.randperm(len(rest), generator=generator).tolist()]
            for begin in range(0, len(shuffled), training.batch):
                if not self._step(values, shuffled[begin : begin + training.batch]):
                    detail = f"in epoch {epoch + 1}: the block keeps what it had before training"
                    self.events.append(("training loss not finite", detail))
                    return Trained(start, start_loss, start_loss, tuple(losses), tuple(self.events))
                mover.move()
            losses.append(self.held_out_loss(values, held))
            since += 1
            if losses[-1] < best_loss:
                best_loss, since = losses[-1], 0
                best = {name: tuple(v.detach().clone() for v in tensors) for name, tensors in values.items()}
            if training.patience and since >= training.patience:
                break
        return Trained(best, start_loss, best_loss, tuple(losses), tuple(self.events))

    def held_out_loss(self, values: Mapping[str, Values], held: list[int]) -> float:
        """Mean loss of the samples."""

        def add_up() -> float:
            with torch.no_grad():
                weights = {name: part.weight(values[name]) for name, part in self.parts.items()}
                return sum(float(self._loss(weights, share, len(held))) for share in self._shares(held))

        return self._within_memory(add_up)

    def _step(self, values: Mapping[str, Values], chosen: list[int]) -> bool:
        """Leave the gradients of a batch's mean loss in the values; False if anything is not finite."""

        def gradients() -> bool:
            for tensor in _all(values):
                tensor.grad = None
            with torch.enable_grad():
                weights = {name: part.weight(values[name]) for name, part in self.parts.items()}
                # the weights are made once per step: what arrives at them from each share is added up first
                leaves = {name: weight.detach().requires_grad_(True) for name, weight in weights.items()}
                total = 0.0
                for share in self._shares(chosen):
                    loss = self._loss(leaves, share, len(chosen))
                    loss.backward()
                    total += float(loss.detach())
            if not math.isfinite(total):
                return False
            arrived = [(weights[name], leaf.grad) for name, leaf in leaves.items() if leaf.grad is not None]
            torch.autograd.backward([weight for weight, _ in arrived], [grad for _, grad in arrived])
            return all(bool(torch.isfinite(t.grad).all()) for t in _all(values) if t.grad is not None)

        return self._within_memory(gradients)

    def _loss(self, weights: Mapping[str, Tensor], share: Sequence[int], whole: int) -> Tensor:
        output = self.forward(weights, self.samples.inputs(share))
        errors = [(output - target(share)).square().mean() for target in self.samples.targets]
        return torch.stack(errors).sum() * (len(share) / whole / self.unit)

    def _shares(self, chosen: Sequence[int]) -> list[Sequence[int]]:
        """In powers of two, at most `at_once` long."""
        shares, begin = [], 0
        while begin < len(chosen):
            size = min(self.at_once, 1 << ((len(chosen) - begin).bit_length() - 1))
            shares.append(chosen[begin : begin + size])
            begin += size
        return shares

    def _within_memory(self, work: Callable[[], R]) -> R:
        while True:
            try:
                return work()
            except RuntimeError as error:  # torch.OutOfMemoryError is one too
                if not any(text in str(error).lower() for text in _OUT_OF_MEMORY):
                    raise
                if self.at_once == 1:
                    raise MemoryError("no memory to train this block on a single sample: shorten them") from None
            self.at_once //= 2
            self.events.append(("training batch halved", f"no memory: {self.at_once} samples at once from here on"))

    def _check_repeatable(self, start: Mapping[str, Values], sample: int) -> None:
        with torch.no_grad():
            weights = {name: part.weight(start[name]) for name, part in self.parts.items()}
            x = self.samples.inputs([sample])
            one, other = self.forward(weights, x), self.forward(weights, x)
        if not torch.equal(one.nan_to_num(), other.nan_to_num()):
            raise ValueError("the block gives two outputs for one input: is dropout left on? Training needs one answer")


class _Mover:
    """The optimiser's step over all values, each by its rule, at the rate the schedule has reached."""

    def __init__(
        self, values: Mapping[str, Values], rules: Mapping[str, tuple[Rule, ...]], schedule: str, steps: int
    ) -> None:
        self.pairs = [(v, rule) for name in values for v, rule in zip(values[name], rules[name], strict=True)]
        adam = [{"params": [v], "lr": rule.rate, "rate": rule.rate} for v, rule in self.pairs if rule.kind == "adam"]
        self.adam = torch.optim.AdamW(adam, weight_decay=0.0) if adam else None
        self.schedule, self.steps, self.done = schedule, max(1, steps), 0

    @torch.no_grad()
    def move(self) -> None:
        """One step along the gradients."""
        share = self.done / self.steps
        factor = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[self.schedule]
        self.done += 1
        if self.adam is not None:
            for group in self.adam.param_groups:
                group["lr"] = group["rate"] * factor
            self.adam.step()
        for value, rule in self.pairs:
            if rule.kind == "sign" and value.grad is not None:
                value.sub_(value.grad.sign(), alpha=rule.rate * factor)
            if math.isfinite(rule.low) or math.isfinite(rule.high):
                value.clamp_(rule.low, rule.high)


def _all(values: Mapping[str, Values]) -> list[Tensor]:
    return [tensor for tensors in values.values() for tensor in tensors]
