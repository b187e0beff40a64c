"""How are all the quantized weights of a block trained together? train(links, parts, samples, training) -> Trained.

A link is a function of its weights and its input: a block alone, or the blocks of a model in a row. What is trained is
hidden behind `Part`. Nothing here knows a recipe, a module or a file. The loss is the squared error of the output
against one or more targets, in units of the first target's mean square, or whatever the samples say. What is returned
is never worse than the start on samples that were not trained on.
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
Loss = Callable[[Tensor, Tensor], Tensor]
"""(output, target) -> the mean over samples and tokens."""
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


@dataclass(frozen=True, eq=False)
class Link:
    """A block of a chain: its function, and the parts it is made of."""

    forward: Forward
    parts: Mapping[str, Part]


@dataclass(frozen=True)
class Training:
    """`batch`: samples per step, a power of two; the block is called with that many samples, or a power of two fewer.
    `schedule`: rates stay, or fall to zero over all steps. `held_out`: share of the samples never trained on, at least
    one; they are asked after every epoch. `patience`: epochs without a gain before it stops, 0 = never. `autocast`: the
    links' products in bfloat16, for training alone: the held-out samples are asked in fp32."""

    epochs: int
    batch: int = 8
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    held_out: float = 0.125
    patience: int = 0
    seed: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    autocast: bool = False

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
    """`count` samples: what the first link reads, and what the last one's output is compared with. `loss`: None = the
    squared error in units of the first target's mean square."""

    count: int
    inputs: Read
    targets: tuple[Read, ...]
    loss: Loss | None = None


@dataclass(frozen=True, eq=False)
class Trained:
    """The best values seen, by layer, and the held-out losses: at the start, after each epoch, the best.
    `events`: (kind, detail) of what a report must say."""

    values: Mapping[str, Values]
    start_loss: float
    best_loss: float
    losses: tuple[float, ...] = ()
    events: tuple[tuple[str, str], ...] = ()


def train(
    links: Sequence[Link], samples: Samples, training: Training, told: Callable[[int, int, float], None] | None = None
) -> Trained:
    """Train the parts of all links together for `training.epochs` passes over the samples that are not held out.

    Of a chain one link's weights are in memory at a time: every link but the last is computed once without and once
    with a graph. `told`: after every epoch, and at the start, how many are done, of how many, and the held-out loss.
    A loss that is not finite ends it with the start, a lack of memory halves what goes through a link at once; both
    are events. Raises ValueError if a link answers the same question twice differently, or with fewer than two
    samples; MemoryError if not even one sample fits.
    """
    if samples.count < 2:
        raise ValueError(f"{samples.count} sample to train on; wanted at least 2: one is held out")
    generator = torch.Generator().manual_seed(training.seed)
    order = torch.randperm(samples.count, generator=generator).tolist()
    kept = training.kept(samples.count)
    run = _Run(links, samples, training.batch, told, training.autocast)
    return run.fit(order[:kept], order[kept:], training, generator)


@dataclass(eq=False)
class _Run:
    links: Sequence[Link]
    samples: Samples
    at_once: int
    told: Callable[[int, int, float], None] | None
    autocast: bool = False
    unit: float = 1.0
    events: list[tuple[str, str]] = field(default_factory=list)

    def fit(self, held: list[int], rest: list[int], training: Training, generator: torch.Generator) -> Trained:
        parts = {name: part for link in self.links for name, part in link.parts.items()}
        start = {name: part.start for name, part in parts.items()}
        rules = {name: part.rules for name, part in parts.items()}
        if self.samples.loss is None:
            self.unit = max(float(self.samples.targets[0](held).square().mean()), 1e-30)
        self._check_repeatable(start, held[0])
        start_loss = self.held_out_loss(start, held)
        if not math.isfinite(start_loss):
            self.events.append(("training skipped", "the block's loss is not finite before training"))
            return Trained(start, start_loss, start_loss, (), tuple(self.events))
        if self.told is not None:
            self.told(0, training.epochs, start_loss)
        values = {
            name: tuple(
                v.clone().requires_grad_(rule.rate > 0) for v, rule in zip(start[name], rules[name], strict=True)
            )
            for name in parts
        }
        best, best_loss, since = start, start_loss, 0
        losses: list[float] = []
        steps = training.epochs * -(-len(rest) // training.batch)
        mover = _Mover(values, rules, training, steps)
        for epoch in range(training.epochs):
            shuffled = [rest[i] for i in torch.randperm(len(rest), generator=generator).tolist()]
            for begin in range(0, len(shuffled), training.batch):
                if not self._step(values, shuffled[begin : begin + training.batch]):
                    detail = f"in epoch {epoch + 1}: the block keeps what it had before training"
                    self.events.append(("training loss not finite", detail))
                    return Trained(start, start_loss, start_loss, tuple(losses), tuple(self.events))
                mover.move()
            losses.append(self.held_out_loss(values, held))
            if self.told is not None:
                self.told(epoch + 1, training.epochs, losses[-1])
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
                shares = self._shares(held)
                hidden = self._forward(values, shares, self.links)[-1]
                return sum(float(self._loss(x, share, len(held))) for x, share in zip(hidden, shares, strict=True))

        return self._within_memory(add_up)

    def _step(self, values: Mapping[str, Values], chosen: list[int]) -> bool:
        """Leave the gradients of a batch's mean loss in the values; False if anything is not finite."""

        def gradients() -> bool:
            for tensor in _all(values):
                tensor.grad = None
            shares = self._shares(chosen)
            hidden = self._forward(values, shares, self.links[:-1])
            arriving: list[Tensor] = []
            total = 0.0
            for k in reversed(range(len(self.links))):
                with torch.enable_grad():
                    weights = _weights(self.links[k], values)
                    # made once per step and link: what arrives at them from each share is added up first
                    leaves = {n: weight.detach().requires_grad_(weight.requires_grad) for n, weight in weights.items()}
                    for j, share in enumerate(shares):
                        x = hidden[k][j].requires_grad_(k > 0)
                        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
                            output = self.links[k].forward(leaves, x).to(x.dtype)
                        if k + 1 == len(self.links):
                            loss = self._loss(output, share, len(chosen))
                            if loss.requires_grad:  # not where every rate is 0
                                loss.backward()
                            total += float(loss.detach())
                        else:
                            output.backward(arriving[j])
                        if k > 0:
                            assert x.grad is not None
                            arriving[j : j + 1] = [x.grad]
                if not math.isfinite(total):
                    return False
                arrived = [(weights[name], leaf.grad) for name, leaf in leaves.items() if leaf.grad is not None]
                if arrived:
                    torch.autograd.backward([weight for weight, _ in arrived], [grad for _, grad in arrived])
                hidden.pop()
            return all(bool(torch.isfinite(t.grad).all()) for t in _all(values) if t.grad is not None)

        return self._within_memory(gradients)

    def _forward(
        self, values: Mapping[str, Values], shares: Sequence[Sequence[int]], links: Sequence[Link]
    ) -> list[list[Tensor]]:
        """What each link reads and the last one returns, by share, without a graph."""
        hidden = [[self.samples.inputs(share) for share in shares]]
        with torch.no_grad():
            for link in links:
                weights = _weights(link, values)
                hidden.append([link.forward(weights, x) for x in hidden[-1]])
        return hidden

    def _loss(self, output: Tensor, share: Sequence[int], whole: int) -> Tensor:
        measure = self.samples.loss or torch.nn.functional.mse_loss
        errors = [measure(output, target(share)) for target in self.samples.targets]
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
        one, other = (self._forward(start, [[sample]], self.links)[-1][0] for _ in range(2))
        if not torch.equal(one.nan_to_num(), other.nan_to_num()):
            raise ValueError("the block gives two outputs for one input: is dropout left on? Training needs one answer")


class _Mover:
    """The optimiser's step over all values, each by its rule, at the rate the schedule has reached."""

    def __init__(
        self, values: Mapping[str, Values], rules: Mapping[str, tuple[Rule, ...]], training: Training, steps: int
    ) -> None:
        pairs = [(v, rule) for name in values for v, rule in zip(values[name], rules[name], strict=True)]
        self.pairs = [(v, rule) for v, rule in pairs if rule.rate > 0]
        by_rate: dict[float, list[Tensor]] = {}
        for value, rule in self.pairs:
            if rule.kind == "adam":
                by_rate.setdefault(rule.rate, []).append(value)
        adam = [{"params": tensors, "lr": rate, "rate": rate} for rate, tensors in by_rate.items()]
        self.adam = torch.optim.AdamW(adam, betas=training.betas, weight_decay=0.0, fused=True) if adam else None
        self.schedule, self.steps, self.done = training.schedule, max(1, steps), 0

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


def _weights(link: Link, values: Mapping[str, Values]) -> dict[str, Tensor]:
    return {name: part.weight(values[name]) for name, part in link.parts.items()}


def _all(values: Mapping[str, Values]) -> list[Tensor]:
    return [tensor for tensors in values.values() for tensor in tensors]
