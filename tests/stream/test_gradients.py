"""Gradients of real blocks: exact traces by automatic differentiation, batches, what falls back and says so."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitquilt.core.types import LayerStats
from bitquilt.model.structure import linear_layers
from bitquilt.stream.gradients import attention_aware, collect_gradients


def llama_block(build_model: Any, tokens: int = 5, samples: int = 4) -> tuple[nn.Module, Any, Tensor]:
    """The first block, how to run it, and inputs `[samples, tokens, 32]`."""
    model = build_model("llama").requires_grad_(False)
    block = model.model.layers[0]
    hidden = torch.randn(samples, tokens, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(tokens).unsqueeze(0)
    rotary = model.model.rotary_emb(hidden, positions)

    def run(x: Tensor) -> Tensor:
        output = block(x, position_embeddings=rotary)
        return output if isinstance(output, Tensor) else output[0]

    return block, run, hidden


def passes(run: Any, hidden: Tensor, batch: int) -> Iterator[Tensor]:
    return (run(hidden[i : i + batch]) for i in range(0, len(hidden), batch))


def exact_trace(block: nn.Module, run: Any, x: Tensor, name: str, sub_block: str) -> float:
    """2 |J|^2 with J by one backward pass per output of the sub-block."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    weight = block.get_submodule(name).weight.requires_grad_(True)
    handle = block.get_submodule(sub_block).register_forward_hook(keep)
    total = 0.0
    with torch.enable_grad():
        run(x)
        for value in seen[0].flatten():
            (gradient,) = torch.autograd.grad(value, weight, retain_graph=True)
            total += 2 * float(gradient.double().square().sum())
    handle.remove()
    weight.requires_grad_(False)
    return total


@pytest.mark.parametrize(
    ("name", "sub_block"),
    [
        ("self_attn.q_proj", "self_attn"),
        ("self_attn.k_proj", "self_attn"),
        ("self_attn.v_proj", "self_attn"),
        ("self_attn.o_proj", "self_attn"),
        ("mlp.gate_proj", "mlp"),
        ("mlp.down_proj", "mlp"),
    ],
)
def test_traces_of_a_real_block(build_model, name, sub_block):
    block, run, hidden = llama_block(build_model)
    linears = {name: block.get_submodule(name)}
    found = collect_gradients(block, linears, passes(run, hidden, 2), hessian=True, probes=48)[name]
    expected = sum(exact_trace(block, run, hidden[i : i + 1], name, sub_block) for i in range(len(hidden)))
    assert found.trace == pytest.approx(expected, rel=0.15)
    out = linears[name].weight.shape[0]
    assert 2 * out * float(found.hessian.trace()) == pytest.approx(found.trace, rel=1e-4)
    assert found.reason == ""


def test_of_the_output_projection_the_hessian_is_the_inputs(build_model):
    block, run, hidden = llama_block(build_model, tokens=12, samples=8)
    linears = {"o": block.self_attn.o_proj}
    inputs: list[Tensor] = []
    handle = block.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].flatten(0, 1)))
    found = collect_gradients(block, linears, passes(run, hidden, 8), hessian=True, probes=64)["o"]
    handle.remove()
    plain = inputs[0].t() @ inputs[0]
    assert float((found.hessian - plain).norm() / plain.norm()) < 0.1
    assert found.trace == pytest.approx(2 * 32 * float(plain.trace()), rel=0.1)


def test_batches_change_nothing_and_nothing_is_left_behind(build_model):
    block, run, hidden = llama_block(build_model)
    linears = linear_layers(block)
    one = collect_gradients(block, linears, passes(run, hidden, 1), hessian=True)
    four = collect_gradients(block, linears, passes(run, hidden, 4), hessian=True)
    assert len(one) == 7
    for name in linears:
        assert one[name].trace == pytest.approx(four[name].trace, rel=1e-4)
        torch.testing.assert_close(one[name].hessian, four[name].hessian, rtol=1e-3, atol=1e-3)
    assert not any(module._forward_hooks for module in block.modules())
    assert not any(parameter.requires_grad for parameter in block.parameters())
    traces = collect_gradients(block, linears, passes(run, hidden, 4), hessian=False)
    assert all(value.hessian is None and value.reason == "" for value in traces.values())
    assert traces["mlp.up_proj"].trace == four["mlp.up_proj"].trace


def test_layers_outside_attention_can_be_measured_at_their_own_output(build_model):
    block, run, hidden = llama_block(build_model)
    linears = linear_layers(block)
    both = collect_gradients(block, linears, passes(run, hidden, 4), hessian=True)
    found = collect_gradients(block, linears, passes(run, hidden, 4), hessian=True, attention_only=True)
    squares = dict.fromkeys(linears, 0.0)

    def watch(name):
        return lambda _m, args: squares.update({name: squares[name] + float(args[0].double().square().sum())})

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    run(hidden)
    for handle in handles:
        handle.remove()
    for name, value in found.items():
        assert value.reason == ""
        if name.startswith("self_attn."):
            assert value.trace == both[name].trace
            assert torch.equal(value.hessian, both[name].hessian)
        else:
            assert value.trace == pytest.approx(2 * len(linears[name].weight) * squares[name])
            assert value.hessian is None
    stats = {name: LayerStats(torch.eye(1), 4) for name in found}
    mixed, events = attention_aware(stats, found)
    assert {name for name in found if mixed[name] is stats[name]} == {n for n in found if n.startswith("mlp.")}
    assert events == []


def test_sequences_of_one_token_say_nothing_about_queries_and_keys(build_model):
    block, run, hidden = llama_block(build_model, tokens=1)
    found = collect_gradients(block, linear_layers(block), passes(run, hidden, 4), hessian=True)
    silent = {name for name, value in found.items() if value.reason}
    assert silent == {"self_attn.q_proj", "self_attn.k_proj"}
    assert all("zero on all tokens" in found[name].reason for name in silent)
    stats = {name: LayerStats(torch.eye(32), 4) for name in found}
    mixed, events = attention_aware(stats, found)
    assert {event.layer for event in events} == silent
    assert all((mixed[name] is stats[name]) == (name in silent) for name in found)


class Odd(nn.Module):
    """A block whose parts misbehave on request; its layers are `inner.first` and `last`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.first = nn.Linear(8, 8)
        self.inner.forward = self._inner
        self.last = nn.Linear(8, 8)
        self.kind = kind
        self.requires_grad_(False)

    def _inner(self, x: Tensor) -> Any:
        y = self.inner.first(x)
        if self.kind == "in place":
            y.add_(1.0)
        if self.kind == "detached":
            y = y.detach()
        return {"hidden": y} if self.kind == "dictionary" else y

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.last(y["hidden"] if self.kind == "dictionary" else y)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("dictionary", "cannot be watched"),
        ("detached", "cannot be watched"),
        ("in place", "no backward pass"),
        ("well", ""),
    ],
)
def test_what_cannot_be_measured_falls_back_and_says_why(kind, reason):
    block = Odd(kind)
    hidden = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    linears = {"b.inner.first": block.inner.first, "b.last": block.last}
    found = collect_gradients(block, linears, passes(block, hidden, 3), hessian=True)
    first = found["b.inner.first"]
    assert reason in first.reason
    assert bool(first.reason) == bool(reason)
    assert first.trace > 0
    if kind != "in place":
        assert found["b.last"].hessian is not None


def test_a_layer_that_no_token_reached():
    block = Odd("well")
    spare = nn.Linear(8, 8).requires_grad_(False)
    block.inner.spare = spare
    hidden = torch.randn(3, 4, 8)
    found = collect_gradients(block, {"b.spare": spare}, passes(block, hidden, 3), hessian=True)
    assert found["b.spare"].reason == "no token reached it"
