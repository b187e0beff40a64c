"""Blocks that receive something of the tokens besides hidden states: per-layer inputs, the embedding, token ids, and
keys and values of earlier blocks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from bitquilt import Result, UserError
from bitquilt.core.budget import Budget
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.structure import open_skeleton
from bitquilt.recipes.quilt import Quilt
from bitquilt.stream import workdir
from bitquilt.stream.block_calls import learn_calls
from bitquilt.stream.calls.columns import SMALL_SHAPES, TokenTensor, lives, token_tensor
from bitquilt.stream.loop import quantize_block as true_quantize_block
from tests.model.survey_models import folders, tokens

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_PER_LAYER = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 6,
}
CONFIGS: dict[str, dict[str, Any]] = {
    # hidden states [streams, batch, tokens, width], per-layer inputs, shared keys and values
    "gemma3n_text": {
        **_TEXT,
        **_PER_LAYER,
        "num_hidden_layers": 2,
        "num_kv_shared_layers": 1,
        "layer_types": ["full_attention"] * 2,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 2,
    },
    "gemma4_text": {**_TEXT, **_PER_LAYER, "global_head_dim": 8},
    # the embedding, in every block
    "zamba2": {
        **_TEXT,
        "num_hidden_layers": 2,
        "layers_block_type": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "adapter_rank": 4,
        "use_mamba_kernels": False,
    },
    # hidden states [batch, tokens, streams, width], token ids that choose experts
    "deepseek_v4": {
        **_TEXT,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "sliding_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
        "sliding_window": 6,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "hc_mult": 2,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 4,
    },
}
Folder = Callable[[str], Path]


def build(name: str) -> transformers.PreTrainedModel:
    """A random model in memory."""
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 and "A_log" not in key and "dt" not in key:
                torch.nn.init.normal_(parameter, mean=0.0 if key.endswith("bias") else 1.0, std=0.1)
        for key, buffer in model.named_buffers():
            if key.endswith("tid2eid"):  # zeros: every token would choose the same experts
                buffer.copy_(torch.randint(0, 4, buffer.shape))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """See `folders`."""
    return folders(build, tmp_path_factory)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_batch_is_computed_with_its_own_tokens(name: str, folder: Folder) -> None:
    skeleton, full = open_skeleton(open_checkpoint(folder(name))), build(name)
    batches = [tokens(2, 16, 1), tokens(2, 16, 2), tokens(3, 9, 3)]
    with skeleton.resident(""):
        calls = learn_calls(skeleton, batches, torch.device("cpu"))
        for ids in batches:
            hidden = calls.start(ids)
            for i, path in enumerate(skeleton.blocks):
                assert hidden.shape == (*ids.shape, calls.width(i))
                with skeleton.resident(path) as block:
                    hidden = calls.run(i, block, hidden)
            with torch.no_grad():
                torch.testing.assert_close(calls.finish(ids, hidden), full(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_columns_end_with_the_last_block_that_reads_them(folder: Folder) -> None:
    skeleton = open_skeleton(open_checkpoint(folder("gemma4_text")))
    with skeleton.resident(""):
        calls = learn_calls(skeleton, [tokens(2, 16, 1)], torch.device("cpu"))
    kept = 2 * 2 * 8  # keys and values of two heads, of blocks 0 and 1, read by blocks 2 and 3
    assert [calls.width(i) - 32 for i in range(5)] == [4 * 8, 3 * 8 + kept, 2 * 8 + 2 * kept, 8 + kept, 0]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_batch_size_changes_nothing(
    name: str, folder: Folder, quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    errors = {}
    for size in (1, 3, 8):
        result = quantize_tiny(folder(name), tmp_path / f"{size}", "gptq", batch_size=size)
        assert result.report["logit_difference"] <= 1e-5
        found = [layer["output_error"] for layer in result.report["layers"].values()]
        errors[size] = sum(error for error in found if error is not None)  # None: an adapter of another block
    # sums in another order may flip a code, of a few hundred per layer
    assert errors[3] == pytest.approx(errors[1], rel=0.02)
    assert errors[8] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_walk_over_the_blocks_uses_them(
    name: str, folder: Folder, quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    """Sensitivities backwards through the blocks, drift between two models, training by block and of all blocks."""
    recipe = Quilt(bits=3, group_size=16, effort="best", epochs=1, tune_epochs=1, passes=0)
    result = quantize_tiny(folder(name), tmp_path / "out", recipe, budget=Budget.of(bpw=5), samples=3, seq_len=8)
    assert result.report["logit_difference"] <= 1e-5
    assert result.report["tuning"]["loss"] <= result.report["tuning"]["start_loss"]


def test_a_killed_run_continues_with_the_same_bytes(
    folder: Folder,
    quantize_tiny: Callable[..., Result],
    read_tensors: Callable[[Path], dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    source = folder("gemma4_text")
    once = read_tensors(quantize_tiny(source, tmp_path / "once", "gptq").folder)

    def killed(states: Any, block: Any, observe: Any) -> Any:
        if block.number == 2:
            raise KeyboardInterrupt
        return true_quantize_block(states, block, observe)

    monkeypatch.setattr("bitquilt.stream.loop.quantize_block", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize_tiny(source, tmp_path / "out", "gptq")
    monkeypatch.undo()
    again = read_tensors(quantize_tiny(source, tmp_path / "out", "gptq").folder)
    assert again.keys() == once.keys()
    assert all(torch.equal(again[name], once[name]) for name in once)


def test_the_disk_is_asked_for_the_columns_too(
    folder: Folder, quantize_tiny: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = 2 * 4 * 6 * 16 * 32  # twice the calibration's hidden states
    usage = workdir.shutil.disk_usage(tmp_path)._replace(free=plain)
    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="calibration activations need"):
        quantize_tiny(folder("gemma4_text"), tmp_path / "out", "gptq")


def test_axes_are_those_that_follow_the_ids() -> None:
    made = [torch.zeros(4, tokens, 8, rows, dtype=torch.int64) for rows, tokens in SMALL_SHAPES]
    found = token_tensor(made)
    assert found == TokenTensor(samples=3, tokens=1, sizes=(4, 8), dtype=torch.int64)
    assert found.columns(made[0]).shape == (*SMALL_SHAPES[0], 32)
    value = torch.randint(0, 99, (4, 6, 8, 5))
    assert torch.equal(found.tensor(found.columns(value)), value)
    for shape in ((lambda rows, length: (rows, 4)), (lambda rows, length: (rows, length, length))):
        assert token_tensor([torch.zeros(shape(*small)) for small in SMALL_SHAPES]) is None
    assert lives([0, 2], [1, 2], 3) == ((0,), (0,), (1,), ())
