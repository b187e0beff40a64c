"""The drift of a quantized model from the full-precision one: against whole models in memory, by family, resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import bitquilt
from bitquilt import UserError
from bitquilt.core.events import BlockDone
from bitquilt.core.types import LayerStats
from bitquilt.data.calibration import load_tokenizer
from bitquilt.data.tokens import token_stream
from bitquilt.model.linear import QuantizedLinear
from bitquilt.stream.drift import InputStage, collect_pairs, find_stages, full_copy, observe_pass
from bitquilt.stream.hidden_states import CalibratedStates
from tests.stream.watching import watching_recipe

REPAIRING = {"recipe": "gptq", "bits": 2, "alpha": 0.5, "stream_alpha": 0.5, "group_order": True}


def inputs_and_streams(model: nn.Module, names: list[str], ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each layer reads, and each block's hidden states, in one ordinary forward pass, `[tokens, width]`."""
    inputs: dict[str, Tensor] = {}
    streams: dict[str, Tensor] = {}

    def flat(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, tensor.shape[-1]).clone()

    def keep(where: dict[str, Tensor], name: str) -> Callable[..., None]:
        return lambda _module, args: where.__setitem__(name, flat(args[0]))

    hooks = [model.get_submodule(n).register_forward_pre_hook(keep(inputs, n)) for n in names]
    for i in range(2):
        block = model.get_submodule(f"model.layers.{i}")
        hooks.append(block.register_forward_pre_hook(keep(streams, f"model.layers.{i}.self_attn.o_proj")))
        norm = block.get_submodule("post_attention_layernorm")
        hooks.append(norm.register_forward_pre_hook(keep(streams, f"model.layers.{i}.mlp.down_proj")))
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return inputs, streams


def test_the_drift_is_that_of_whole_models_in_memory(
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    token_file: Path,
    tmp_path: Path,
) -> None:
    """Layer after layer is replaced in a copy of the model, in the order of the run; both are run on all tokens."""
    recipe, measured = watching_recipe(alpha=0.5, stream_alpha=0.5)
    quantize_tiny(make_model("llama"), tmp_path / "out", recipe, batch_size=4)
    ids = token_stream(token_file, load_tokenizer(token_file.parent)).view(6, 16)
    full = AutoModelForCausalLM.from_pretrained(make_model("llama"))
    partly = AutoModelForCausalLM.from_pretrained(make_model("llama"))
    solved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    names = list(measured)
    expected, expected_streams = inputs_and_streams(full, names, ids)
    done: list[str] = []
    for name in names:
        stats = measured[name]
        if not any(measured[other] is stats for other in done[-1:]):  # a new input: what came before is quantized
            for other in done:
                module = solved.get_submodule(other)
                assert isinstance(module, QuantizedLinear)
                partly.get_submodule(other).weight.data = module.dequantize()
        inputs, streams = inputs_and_streams(partly, names, ids)
        x = inputs[name]
        scale = float(stats.hessian.abs().max())
        assert float((stats.hessian - x.t() @ x).abs().max()) < 1e-4 * scale
        assert stats.drift is not None
        assert float((stats.drift - (expected[name] - x).t() @ x).abs().max()) < 1e-4 * scale
        if name in streams:
            drift = (expected_streams[name] - streams[name]).t() @ x
            assert stats.stream_drift is not None
            assert float((stats.stream_drift - drift).abs().max()) < 1e-3 * float(drift.abs().max()) + 1e-3
        else:
            assert stats.stream_drift is None
        done.append(name)
    assert len(done) == 14


@pytest.mark.parametrize(("family", "more"), [("llama", 0), ("gemma2", 1)])
def test_a_stage_that_reaches_the_output_advances_the_full_precision_model(
    family: str,
    more: int,
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pass of its own costs a fifth of all passes; gemma2 needs it, for no stream is read there. The last block's
    outputs are read by nobody."""
    sent: list[str] = []

    def counting(self: CalibratedStates, i: int, block: nn.Module, model: Any) -> None:
        sent.append(model)
        advance(self, i, block, model)

    advance = CalibratedStates._send
    monkeypatch.setattr(CalibratedStates, "_send", counting)
    quantize_tiny(make_model(family), tmp_path / "out", **REPAIRING)
    assert sent.count("quantized") == 1
    assert sent.count("full") == more


TAPS = {
    "llama": {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": ""},
    "gemma2": {},  # norms stand between the layers and the stream
    "phi3": {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": ""},
    "gpt2": {"attn.c_proj": "ln_2", "mlp.c_proj": ""},
    "gpt-neox": {"attention.dense": "", "mlp.dense_4h_to_h": ""},  # both join at the end
    "opt": {"self_attn.out_proj": "final_layer_norm", "fc2": ""},
    "mixtral": {"self_attn.o_proj": "post_attention_layernorm"},
    "bert": {"attention.output.dense": "attention.output.LayerNorm", "output.dense": "output.LayerNorm"},
}


@pytest.mark.parametrize("family", TAPS)
def test_streams_are_found_by_looking(
    family: str,
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[str, str] = {}

    def watching(*args: Any) -> list[InputStage]:
        stages = find_stages(*args)
        for stage in stages:
            found.update(stage.taps)
        return stages

    monkeypatch.setattr("bitquilt.stream.block.find_stages", watching)
    result = quantize_tiny(make_model(family), tmp_path / "out", **REPAIRING)
    assert found == TAPS[family]
    assert result.report["logit_difference"] < 1e-4


def test_repairing_runs_continue_with_the_same_bytes(
    make_model: Callable[..., Path], quantize_tiny: Callable[..., bitquilt.Result], tmp_path: Path
) -> None:
    source = make_model("llama", num_hidden_layers=3)
    whole = quantize_tiny(source, tmp_path / "whole", **REPAIRING, include_head=True).folder

    class Interrupted(Exception):
        pass

    for _ in range(3):

        def interrupt(event: object) -> None:
            if isinstance(event, BlockDone):
                raise Interrupted

        with pytest.raises(Interrupted):
            quantize_tiny(source, tmp_path / "out", **REPAIRING, include_head=True, observer=interrupt)
    out = quantize_tiny(source, tmp_path / "out", **REPAIRING, include_head=True).folder
    names = [path.name for path in whole.iterdir() if path.name != "report.json"]
    assert len(names) > 5
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (tmp_path / "out.work").exists()


class Routed(nn.Module):
    """Half of the tokens go to an expert; one layer is called twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert, self.twice, self.never = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.first(x)
        self.expert(y.reshape(-1, 8)[::2])
        return y + self.twice(self.twice(y))


def test_layers_whose_tokens_are_not_the_blocks_are_unpaired() -> None:
    block = Routed()
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stages = find_stages(block, ["never", "twice", "first", "expert"], lambda: block(x), True)
    assert [(stage.names, stage.paired) for stage in stages] == [
        (("first",), True),
        (("expert", "twice", "never"), False),
    ]
    assert stages[0].taps == {"first": ""} or "expert" not in stages[0].taps


def test_a_pass_stops_when_everything_has_been_seen() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    passed: list[int] = []
    block[1].register_forward_hook(lambda *_: passed.append(1))
    with torch.no_grad():
        seen = observe_pass(block, InputStage(("0",), True, {}), lambda: block(x))
    assert torch.equal(seen.inputs["0"], x[0])
    assert passed == []


def test_shards_of_pairs_add_up_and_nan_names_the_layer() -> None:
    block = nn.Sequential(nn.Linear(4, 6, bias=False))
    other = full_copy(block)
    assert other[0].weight is block[0].weight
    stage = InputStage(("0",), True, {})
    x, full = torch.randn(2, 4, 5, 4, generator=torch.Generator().manual_seed(0))

    def stats(rows: slice) -> LayerStats:
        with torch.no_grad():
            there = observe_pass(other, stage, lambda: other(full[rows]))
            here = observe_pass(block, stage, lambda: block(x[rows]))
        return collect_pairs(stage, [(there, here)], sample=20, tokens=20)["0"]

    whole, parts = stats(slice(0, 4)), stats(slice(0, 2)) + stats(slice(2, 4))
    assert whole.drift is not None
    assert parts.drift is not None
    torch.testing.assert_close(parts.drift, whole.drift)
    with pytest.raises(ValueError, match="one shard has no drift; collect it for every shard"):
        _ = whole + LayerStats(whole.hessian, 20)
    full[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="the input of layer 0 holds NaN"):
        stats(slice(0, 4))
