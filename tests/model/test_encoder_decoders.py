"""Encoder-decoders: both stacks are quantized, the decoder on the quantized encoder's output."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import bitquilt
from bitquilt import Result, UserError
from bitquilt.core.budget import Budget
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.structure import find_towers, open_skeleton
from bitquilt.recipes.quilt import Quilt
from bitquilt.stream.block_calls import learn_calls
from tests.model.survey_models import ENCODER_DECODERS, folders, survey_model, tokens

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """See `folders`."""
    return folders(survey_model, tmp_path_factory)


def written_again(model: transformers.PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, labels=ids).logits
    return found


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_both_stacks_are_computed_as_the_model_does(name: str, folder: Folder) -> None:
    skeleton, full = open_skeleton(open_checkpoint(folder(name))), survey_model(name)
    parents = [path.rpartition(".")[0] for path in skeleton.blocks]
    assert len(parents) == 4
    assert "encoder" in parents[0] == parents[1] != parents[2] == parents[3]
    assert find_towers(skeleton.model, skeleton.blocks) == ()
    batches = [tokens(2, 16, 1), tokens(2, 16, 2), tokens(3, 9, 3)]  # T5's table of positions follows the shape
    with skeleton.resident(""):
        calls = learn_calls(skeleton, batches, torch.device("cpu"))
        assert [calls.width(i) for i in range(5)] == [64, 64, 64, 64, 32]
        for ids in batches:
            hidden = calls.start(ids)
            for i, path in enumerate(skeleton.blocks):
                with skeleton.resident(path) as block:
                    hidden = calls.run(i, block, hidden)
            torch.testing.assert_close(calls.finish(ids, hidden), written_again(full, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_batch_size_changes_nothing(
    name: str, folder: Folder, quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    errors = {}
    for size in (1, 3, 8):
        result = quantize_tiny(folder(name), tmp_path / f"{size}", "gptq", batch_size=size)
        errors[size] = sum(layer["output_error"] for layer in result.report["layers"].values())
    linears = {n for n, m in survey_model(name).named_modules() if type(m) is nn.Linear and not n.startswith("lm_head")}
    assert result.report["layers"].keys() == linears
    assert bitquilt.plan(folder(name), "gptq", bits=3, group_size=8).planned.layouts.keys() == linears
    # sums in another order may flip a code, of a few hundred per layer
    assert errors[3] == pytest.approx(errors[1], rel=0.02)
    assert errors[8] == pytest.approx(errors[1], rel=0.02)


def test_every_walk_over_the_blocks_goes_through_both(
    folder: Folder, quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    recipe = Quilt(bits=3, group_size=16, effort="best", epochs=1, tune_epochs=1, passes=0)
    result = quantize_tiny(folder("t5"), tmp_path / "out", recipe, budget=Budget.of(bpw=5), samples=3, seq_len=8)
    assert result.report["logit_difference"] <= 1e-5
    assert result.report["tuning"]["loss"] <= result.report["tuning"]["start_loss"]
    assert result.report["prediction"]["perplexity_full_precision"] is None


def test_its_loss_is_that_of_writing_the_text_it_reads(
    folder: Folder, quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    source, told = folder("bart"), list[str]()
    out = quantize_tiny(source, tmp_path / "out", "rtn").folder
    text = tokens(1, 16, 5)[0]
    found = bitquilt.evaluate(str(out), text, seq_len=16, reference=str(source), notify=told.append)
    logits = written_again(bitquilt.load(out), text[None])[0]
    expected = nn.functional.cross_entropy(logits[1:], text[1:])  # the first token of a window is never scored
    assert found.cross_entropy == pytest.approx(float(expected), rel=1e-4)
    assert found.kl_mean is not None
    assert found.kl_mean > 0
    assert "encoder-decoder" in told[0]


def test_what_an_encoder_decoder_cannot_do_is_refused(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="writes none of its own; give --calibration FILE"):
        bitquilt.quantize(folder("bart"), "gptq", "self", tmp_path / "out", samples=2, seq_len=8)
    config = transformers.WhisperConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_source_positions=16,
        max_target_positions=16,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "whisper")
    with pytest.raises(UserError, match="reads input_features, not token ids"):
        bitquilt.quantize(tmp_path / "whisper", "rtn", bits=4, out=tmp_path / "out")
