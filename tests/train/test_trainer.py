"""The trainer on a small function of tensors: it learns, never returns worse than the start, says what went wrong."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bitquilt.train.problem import Link, Rule, Trained, TrainingSamples, TrainingSettings
from bitquilt.train.trainer import train

RULE = Rule(1e-2)


@dataclass(frozen=True, eq=False)
class Scaled:
    """The simplest part: a weight times a factor per row."""

    base: Tensor
    rule: Rule = RULE

    @property
    def start(self) -> tuple[Tensor, ...]:
        return (torch.ones(len(self.base), 1),)

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (self.rule,)

    def weight(self, values: tuple[Tensor, ...]) -> Tensor:
        return self.base * values[0]


G = torch.Generator().manual_seed(0)
INPUTS = torch.randn(16, 5, 6, generator=G)
WEIGHT = torch.randn(4, 6, generator=G)
TARGETS = INPUTS @ (1.3 * WEIGHT).t()


def forward(weights, hidden):
    return hidden @ weights["layer"].t()


def samples(count=16, inputs=INPUTS, targets=TARGETS):
    return TrainingSamples(count, lambda chosen: inputs[list(chosen)], (lambda chosen: targets[list(chosen)],))


def run(training, function=forward, part=None, data=None) -> Trained:
    return train((Link(function, {"layer": part or Scaled(WEIGHT)}),), data or samples(), training)


@pytest.mark.parametrize("rule", [Rule(3e-2), Rule(2e-2)])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_it_finds_the_factor(rule, schedule):
    trained = run(TrainingSettings(40, 4, schedule), part=Scaled(WEIGHT, rule))
    assert trained.best_loss < 0.01 * trained.start_loss
    assert len(trained.losses) == 40
    torch.testing.assert_close(trained.values["layer"][0], torch.full((4, 1), 1.3), rtol=0.05, atol=0)


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_order():
    one, again, other = (run(TrainingSettings(3, 2, seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(one.values["layer"][0], again.values["layer"][0])
    assert one.losses == again.losses
    assert not torch.equal(one.values["layer"][0], other.values["layer"][0])


def test_no_epochs_or_no_rate_is_the_start():
    for trained in (run(TrainingSettings(0)), run(TrainingSettings(3), part=Scaled(WEIGHT, Rule(0.0)))):
        assert torch.equal(trained.values["layer"][0], torch.ones(4, 1))
        assert trained.best_loss == trained.start_loss


def test_it_never_returns_worse_than_the_start_on_samples_it_did_not_train_on():
    """Training targets that lie: every step makes the held-out samples worse."""
    training = TrainingSettings(5, 4)
    held = torch.randperm(16, generator=torch.Generator().manual_seed(training.seed))[: training.kept(16)]
    lying = -TARGETS.clone()
    lying[held] = INPUTS[held] @ WEIGHT.t()
    trained = run(training, part=Scaled(WEIGHT, Rule(0.1)), data=samples(targets=lying))
    assert min(trained.losses) > trained.start_loss
    assert trained.best_loss == trained.start_loss
    assert torch.equal(trained.values["layer"][0], torch.ones(4, 1))


def test_the_last_epoch_is_kept_on_request_and_every_sample_trained_on():
    """Targets that lie but on the samples that would be held out: these are seen now, and what comes of it is kept."""
    training = TrainingSettings(6, 4, kept_epoch="last")
    held = torch.randperm(16, generator=torch.Generator().manual_seed(0))[: training.kept(16)]
    lying = -TARGETS.clone()
    lying[held] = INPUTS[held] @ WEIGHT.t()
    seen: list[int] = []

    def watched(chosen):
        seen.extend(chosen)
        return INPUTS[list(chosen)]

    data = TrainingSamples(16, watched, (lambda chosen: lying[list(chosen)],))
    trained = run(training, data=data)
    assert trained.best_loss == trained.losses[-1] > trained.start_loss
    assert bool((trained.values["layer"][0] < 1).all())
    assert set(seen) == set(range(16))
    assert training.trained(16) == 16


def test_a_loss_that_is_not_finite_falls_back_to_the_start():
    calls = []

    def breaking(weights, hidden):
        calls.append(1)
        output = forward(weights, hidden)
        return output * float("nan") if len(calls) > 12 else output

    trained = run(TrainingSettings(10, 4), breaking)
    assert torch.equal(trained.values["layer"][0], torch.ones(4, 1))
    assert trained.best_loss == trained.start_loss
    assert [kind for kind, _ in trained.events] == ["training loss not finite"]
    assert "in epoch" in trained.events[0][1]


def test_a_start_that_is_not_finite_is_kept_and_told():
    trained = run(TrainingSettings(2), lambda weights, hidden: forward(weights, hidden) / 0.0)
    assert [kind for kind, _ in trained.events] == ["training skipped"]


def test_a_block_with_dropout_is_refused():
    generator = torch.Generator().manual_seed(0)

    def noisy(weights, hidden):
        return forward(weights, hidden) * torch.rand(hidden.shape[0], 1, 1, generator=generator)

    with pytest.raises(ValueError, match="two outputs for one input; training needs one"):
        run(TrainingSettings(2), noisy)


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_a_batch_that_does_not_fit_is_halved_and_the_result_is_the_same(limit):
    def small(weights, hidden):
        if hidden.shape[0] > limit:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return forward(weights, hidden)

    halved, whole = run(TrainingSettings(3, 8), small), run(TrainingSettings(3, 8))
    assert [kind for kind, _ in halved.events] == ["training batch halved"] * {4: 1, 2: 2, 1: 3}[limit]
    assert f"{limit} samples at once" in halved.events[-1][1]
    torch.testing.assert_close(halved.values["layer"][0], whole.values["layer"][0], rtol=1e-4, atol=1e-5)


def test_no_memory_for_one_sample_and_other_errors_are_raised():
    def nothing_fits(weights, hidden):
        if torch.is_grad_enabled():
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(weights, hidden)

    with pytest.raises(MemoryError, match="a single sample"):
        run(TrainingSettings(1, 4), nothing_fits)

    def wrong(weights, hidden):
        if torch.is_grad_enabled():
            raise RuntimeError("shapes do not match")
        return forward(weights, hidden)

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(TrainingSettings(1, 4), wrong)


def test_the_block_is_only_called_with_powers_of_two():
    seen = set()

    def watching(weights, hidden):
        seen.add(hidden.shape[0])
        return forward(weights, hidden)

    run(TrainingSettings(2, 8, held_out=0.2), watching)  # 13 to train on: 8 + 4 + 1; 3 held out: 2 + 1
    assert seen == {1, 2, 4, 8}


def test_too_few_samples_and_impossible_settings_are_named():
    with pytest.raises(ValueError, match="1 sample to train on; wanted at least 2"):
        run(TrainingSettings(1), data=samples(1))
    assert run(TrainingSettings(1, 4), data=samples(2)).losses
    for settings, message in (
        ({"batch": 3}, "batch is 3; wanted a power of two"),
        ({"epochs": -1}, "epochs is -1"),
        ({"held_out": 1.0}, "held_out is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainingSettings(**{"epochs": 1, **settings})


def test_two_targets_are_added():
    both = TrainingSamples(16, lambda c: INPUTS[list(c)], (lambda c: TARGETS[list(c)], lambda c: -TARGETS[list(c)]))
    start = run(TrainingSettings(0), data=both).start_loss
    parts = [run(TrainingSettings(0), data=samples(targets=t)).start_loss for t in (TARGETS, -TARGETS)]
    assert start == pytest.approx(sum(parts), rel=1e-4)


def test_a_chain_is_trained_as_the_function_it_computes():
    """Two links, one recomputed: the same values as one link that does both; a batch in parts, too."""
    g = torch.Generator().manual_seed(2)
    first, second = torch.randn(6, 6, generator=g), torch.randn(4, 6, generator=g)
    data = samples(targets=torch.tanh(INPUTS @ (0.8 * first).t()) @ (1.2 * second).t())

    def one(weights, hidden):
        return torch.tanh(hidden @ weights["one"].t())

    def two(weights, hidden):
        return hidden @ weights["two"].t()

    parts = {"one": Scaled(first), "two": Scaled(second)}
    links = (Link(one, {"one": parts["one"]}), Link(two, {"two": parts["two"]}))
    whole = Link(lambda weights, hidden: two(weights, one(weights, hidden)), parts)
    training = TrainingSettings(6, 8)
    chained, together = train(links, data, training), train((whole,), data, training)
    assert together.best_loss < 0.9 * together.start_loss
    assert chained.losses == pytest.approx(together.losses, rel=1e-4)
    for name in parts:
        torch.testing.assert_close(chained.values[name], together.values[name], rtol=1e-4, atol=1e-5)

    def small(weights, hidden):
        if hidden.shape[0] > 2:
            raise RuntimeError("not enough memory: you tried to allocate 8 bytes")
        return two(weights, hidden)

    halved = train((links[0], Link(small, links[1].parts)), data, training)
    assert halved.losses == pytest.approx(together.losses, rel=1e-4)
    assert [kind for kind, _ in halved.events] == ["training batch halved"] * 2


def test_samples_can_bring_their_own_loss_and_every_epoch_is_told():
    told = []
    data = TrainingSamples(
        16, lambda c: INPUTS[list(c)], (lambda c: TARGETS[list(c)],), lambda out, to: (out - to).abs().mean()
    )
    trained = train(
        (Link(forward, {"layer": Scaled(WEIGHT)}),), data, TrainingSettings(3, 4), lambda *what: told.append(what)
    )
    held = torch.randperm(16, generator=torch.Generator().manual_seed(0))[:2]
    expected = (INPUTS[held] @ WEIGHT.t() - TARGETS[held]).abs().mean()
    assert trained.start_loss == pytest.approx(float(expected), rel=1e-5)
    losses = (trained.start_loss, *trained.losses)
    assert told == [(done, 3, loss) for done, loss in enumerate(losses)]


def test_a_value_without_a_rate_stays_and_is_not_asked_for_gradients():
    @dataclass(frozen=True, eq=False)
    class Two(Scaled):
        @property
        def start(self):
            return torch.ones(4, 1), torch.zeros(4, 6)

        @property
        def rules(self):
            return Rule(1e-2), Rule(0.0)

        def weight(self, values):
            assert not values[1].requires_grad
            return self.base * values[0] + values[1]

    trained = run(TrainingSettings(4, 4), part=Two(WEIGHT))
    assert trained.best_loss < trained.start_loss
    assert not trained.values["layer"][1].any()


def test_training_in_bfloat16_is_judged_in_float32():
    seen = []

    def watching(weights, hidden):
        output = forward(weights, hidden)
        seen.append((output.dtype, torch.is_grad_enabled()))
        return output

    trained = run(TrainingSettings(40, 4, autocast=True), watching, part=Scaled(WEIGHT, Rule(3e-2)))
    assert trained.best_loss < 0.01 * trained.start_loss
    assert set(seen) == {(torch.bfloat16, True), (torch.float32, False)}
