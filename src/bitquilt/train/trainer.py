"""One trainer for a block or a whole model: `train` moves the values of all its weights together.

The loss is the squared error of the output against one or more targets, in units of the first target's mean square, or
the samples' own loss. The result is never worse than the start on samples that were not trained on, unless the last
epoch is asked for.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from bitquilt.train.problem import Link, Mover, TrainableWeight, Trained, TrainingSamples, TrainingSettings, Values

R = TypeVar("R")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def train(
    links: Sequence[Link],
    samples: TrainingSamples,
    training: TrainingSettings,
    told: Callable[[int, int, float], None] | None = None,
) -> Trained:
    """Train the weights of all links together for `training.epochs` passes over the samples that are not held out.

    One link's weights are in memory at a time: every link but the last is computed once without and once with a graph.
    `told` is called at the start and after every epoch with the epochs done, their number and the held-out loss.
    A loss that is not finite ends training with the values of the start. On out-of-memory the number of samples that go
    through a link at once is halved. Both record an event. Raises ValueError with fewer than two samples, or if a link
    gives two outputs for one input; MemoryError if not even one sample fits.
    """
    if samples.count < 2:
        raise ValueError(f"{samples.count} sample to train on; wanted at least 2, because one is held out")
    generator = torch.Generator().manual_seed(training.seed)
    order = torch.randperm(samples.count, generator=generator).tolist()
    kept = training.kept(samples.count)
    run = _Training(links, samples, training.batch, told, training.autocast)
    return run.fit(order[:kept], order[-training.trained(samples.count) :], training, generator)


@dataclass(eq=False)
class _Training:
    """One training: `at_once` samples go through a link, losses count in multiples of `unit`."""

    links: Sequence[Link]
    samples: TrainingSamples
    at_once: int
    told: Callable[[int, int, float], None] | None
    autocast: bool = False
    unit: float = 1.0
    events: list[tuple[str, str]] = field(default_factory=list)

    def fit(self, held: list[int], rest: list[int], training: TrainingSettings, generator: torch.Generator) -> Trained:
        """Train on the samples `rest` and keep the values of least loss on `held`."""
        parts = {name: part for link in self.links for name, part in link.parts.items()}
        values = {
            name: tuple(v.clone().requires_grad_(rule.rate > 0) for v, rule in zip(p.start, p.rules, strict=True))
            for name, p in parts.items()
        }
        if self.samples.loss is None:
            self.unit = max(float(self.samples.targets[0](held).square().mean()), 1e-30)
        self._check_repeatable(values, held[0])
        start_loss = self.held_out_loss(values, held)
        if not math.isfinite(start_loss):
            self.events.append(("training skipped", "the block's loss is not finite before training"))
            return Trained(_start(parts), start_loss, start_loss, (), tuple(self.events))
        if self.told is not None:
            self.told(0, training.epochs, start_loss)
        best: dict[str, Values] | None = None  # None = the start, which is cheaper to make again than to keep
        best_loss = start_loss
        losses: list[float] = []
        steps = training.epochs * -(-len(rest) // training.batch)
        mover = Mover(values, parts, training, steps)
        for epoch in range(training.epochs):
            shuffled = [rest[i] for i in torch.randperm(len(rest), generator=generator).tolist()]
            for begin in range(0, len(shuffled), training.batch):
                if not self._step(values, shuffled[begin : begin + training.batch]):
                    detail = f"in epoch {epoch + 1}: the block keeps its values from before training"
                    self.events.append(("training loss not finite", detail))
                    return Trained(_start(parts), start_loss, start_loss, tuple(losses), tuple(self.events))
                mover.move()
            losses.append(self.held_out_loss(values, held))
            if self.told is not None:
                self.told(epoch + 1, training.epochs, losses[-1])
            if losses[-1] < best_loss or training.kept_epoch == "last":
                best_loss = losses[-1]
                best = _copied(values, best)
        return Trained(best or _start(parts), start_loss, best_loss, tuple(losses), tuple(self.events))

    def held_out_loss(self, values: Mapping[str, Values], held: list[int]) -> float:
        """The mean loss of the samples `held`."""

        def add_up() -> float:
            with torch.no_grad():
                shares = self._shares(held)
                hidden = self._forward(values, shares, self.links)[-1]
                return sum(float(self._loss(x, share, len(held))) for x, share in zip(hidden, shares, strict=True))

        return self._within_memory(add_up)

    def _step(self, values: Mapping[str, Values], chosen: list[int]) -> bool:
        """Put the gradients of a batch's mean loss into the values; False if anything is not finite."""

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
                    # made once per step and link: the gradients of all shares are added up first
                    leaves = {n: weight.detach().requires_grad_(weight.requires_grad) for n, weight in weights.items()}
                    for j, share in enumerate(shares):
                        x = hidden[k][j].requires_grad_(k > 0)
                        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
                            output = self.links[k].forward(leaves, x).to(x.dtype)
                        if k + 1 == len(self.links):
                            loss = self._loss(output, share, len(chosen))
                            if loss.requires_grad:  # False where every rate is 0
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
        """The inputs of each link and the output of the last one, by share, without a graph."""
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
        """The samples cut into powers of two, at most `at_once` long."""
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
                    raise MemoryError("no memory to train on a single sample: use a smaller --seq-len") from None
            self.at_once //= 2
            self.events.append(("training batch halved", f"no memory: {self.at_once} samples at once from here on"))

    def _check_repeatable(self, start: Mapping[str, Values], sample: int) -> None:
        one, other = (self._forward(start, [[sample]], self.links)[-1][0] for _ in range(2))
        if not torch.equal(one.nan_to_num(), other.nan_to_num()):
            raise ValueError("the block gives two outputs for one input; training needs one: turn dropout off")


def _start(parts: Mapping[str, TrainableWeight]) -> dict[str, Values]:
    return {name: part.start for name, part in parts.items()}


def _copied(values: Mapping[str, Values], into: dict[str, Values] | None) -> dict[str, Values]:
    """Copy the current values, into the memory of an earlier copy if there is one."""
    if into is None:
        return {name: tuple(v.detach().clone() for v in tensors) for name, tensors in values.items()}
    for name, tensors in values.items():
        for v, copy in zip(tensors, into[name], strict=True):
            copy.copy_(v.detach())
    return into


def _weights(link: Link, values: Mapping[str, Values]) -> dict[str, Tensor]:
    return {name: part.weight(values[name]) for name, part in link.parts.items()}


def _all(values: Mapping[str, Values]) -> list[Tensor]:
    return [tensor for tensors in values.values() for tensor in tensors]
