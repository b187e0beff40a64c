"""`evaluate` against a computation by hand, and every model and text it must refuse."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from bitquilt.errors import UserError
from bitquilt.report.evaluation import ModelSize, evaluate

from .conftest import VOCAB, tiny_llama

SHARED = Path(os.environ.get("BITQUILT_SHARED", Path(__file__).parents[3] / "../shared"))


def naive_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of tokens 1.. of one window, as simply as it can be written."""
    model.eval()
    with torch.no_grad():
        logits = model(ids[None]).logits[0].double()
    return nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")


def test_perplexity_is_that_of_disjoint_windows(model: nn.Module, stream: Tensor) -> None:
    found = evaluate(model, stream, seq_len=16)
    losses = torch.cat([naive_losses(model, stream[start : start + 16]) for start in range(0, 96, 16)])
    assert found.perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert found.cross_entropy == pytest.approx(losses.mean().item(), rel=1e-5)
    assert (found.tokens, found.seq_len, found.stride) == (90, 16, None)
    assert found.kl_mean is None
    assert found.top1_agreement is None


def test_the_stride_scores_new_tokens_from_a_longer_past(model: nn.Module, stream: Tensor) -> None:
    found = evaluate(model, stream, seq_len=16, stride=6)
    losses = [naive_losses(model, stream[:16])]
    for start in range(6, 97, 6):
        end = min(start + 16, 103)
        losses.append(naive_losses(model, stream[start:end])[16 - 6 - 1 :])
        if end == 103:
            break
    expected = torch.cat(losses)
    assert found.tokens == len(expected) == 102
    assert found.perplexity == pytest.approx(expected.mean().exp().item(), rel=1e-5)
    assert found.protocol() == "16-token windows, stride 6, 102 tokens"


def test_divergence_is_that_of_the_two_naive_models(model: nn.Module, other: nn.Module, stream: Tensor) -> None:
    found = evaluate(model, stream, reference=other, seq_len=16)
    kl, agree = [], []
    with torch.no_grad():
        for start in range(0, 96, 16):
            ids = stream[start : start + 16][None]
            p, q = (m.eval()(ids).logits[0, :-1].double().log_softmax(-1) for m in (other, model))
            kl.append((p.exp() * (p - q)).sum(-1))
            agree.append(p.argmax(-1) == q.argmax(-1))
    values = torch.cat(kl).numpy()
    assert found.kl_mean == pytest.approx(values.mean(), rel=1e-4)
    assert found.kl_median == pytest.approx(np.median(values), rel=1e-4)
    assert found.kl_p99 == pytest.approx(np.quantile(values, 0.99), rel=1e-4)
    assert found.kl_max == pytest.approx(values.max(), rel=1e-4)
    assert found.top1_agreement == pytest.approx(torch.cat(agree).double().mean().item())
    assert found.perplexity == evaluate(model, stream, seq_len=16).perplexity


def test_a_model_is_no_distance_from_itself(model: nn.Module, stream: Tensor) -> None:
    found = evaluate(model, stream, reference=model, seq_len=32)
    assert (found.kl_mean, found.kl_median, found.kl_p99, found.kl_max) == (0, 0, 0, 0)
    assert found.top1_agreement == 1


def test_neither_batches_nor_chunks_change_the_figures(
    model: nn.Module, other: nn.Module, stream: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [evaluate(model, stream, reference=other, seq_len=16, stride=10, batch_size=size) for size in (1, 3, 64)]
    monkeypatch.setattr("bitquilt.report.evaluation.evaluator._CHUNK", 4 * VOCAB)
    found.append(evaluate(model, stream, reference=other, seq_len=16, stride=10))
    for one in found[1:]:
        assert one.to_json() == pytest.approx(found[0].to_json(), rel=1e-4)


def test_half_precision_logits_are_scored_in_float32(model: nn.Module, stream: Tensor) -> None:
    half = model.to(torch.bfloat16)
    found = evaluate(half, stream, seq_len=16)
    losses = torch.cat([naive_losses(half, stream[start : start + 16]) for start in range(0, 96, 16)])
    assert found.perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-5)


def test_max_tokens_cuts_the_stream(model: nn.Module, stream: Tensor) -> None:
    assert evaluate(model, stream, seq_len=16, max_tokens=40) == evaluate(model, stream[:40], seq_len=16)


def test_the_window_is_the_context_unless_asked_for(model: nn.Module, stream: Tensor) -> None:
    assert evaluate(model, stream).seq_len == 64
    assert evaluate(tiny_llama(0, max_position_embeddings=4096), stream.repeat(21)).seq_len == 2048


def test_training_and_the_generator_are_as_they_were(model: nn.Module, stream: Tensor) -> None:
    model.train()
    before = torch.get_rng_state()
    first, second = evaluate(model, stream, seq_len=16), evaluate(model, stream, seq_len=16)
    assert first == second  # no dropout
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_progress_is_told_of_every_batch(model: nn.Module, stream: Tensor) -> None:
    told: list[tuple[int, int, float]] = []
    found = evaluate(model, stream, seq_len=16, batch_size=4, progress=lambda *state: told.append(state))
    assert [state[:2] for state in told] == [(4, 6), (6, 6)]
    assert told[-1][2] == pytest.approx(found.perplexity)


def test_the_json_has_what_scripts_read(model: nn.Module, stream: Tensor) -> None:
    found = evaluate(model, stream, seq_len=16, reference=model, size=ModelSize(10, 2.5, 2.0))
    fields = json.loads(json.dumps(found.to_json()))
    assert set(fields) >= {"perplexity", "kl_mean", "kl_p99", "top1_agreement", "tokens", "seq_len"}
    assert (fields["bytes"], fields["bpw"], fields["nominal_bits"]) == (10, 2.5, 2.0)
    assert (evaluate(model, stream, seq_len=16).bpw, found.tokens) == (32, 90)


def test_an_endless_perplexity_is_null_in_json(model: nn.Module, stream: Tensor) -> None:
    with torch.no_grad():
        model.lm_head.weight *= 1e6  # type: ignore[union-attr, operator]
    found = evaluate(model, stream, seq_len=16)
    assert found.perplexity == math.inf
    assert found.to_json()["perplexity"] is None
    assert math.isfinite(found.cross_entropy)


def test_a_folder_is_loaded_with_its_tokenizer_and_size(tmp_path: Path, model: nn.Module, stream: Tensor) -> None:
    model.save_pretrained(tmp_path / "m")  # type: ignore[operator]
    save_file({"input_ids": stream}, tmp_path / "ids.safetensors")
    found = evaluate(tmp_path / "m", tmp_path / "ids.safetensors", reference=str(tmp_path / "m"), seq_len=16)
    assert found.perplexity == pytest.approx(evaluate(model, stream, seq_len=16).perplexity, rel=1e-5)
    assert found.kl_max == 0
    assert found.bpw == 32
    assert found.bytes == (tmp_path / "m" / "model.safetensors").stat().st_size
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="no tokenizer"):
        evaluate(tmp_path / "m", tmp_path / "a.txt", seq_len=16)


def test_a_window_beyond_the_context_is_refused(model: nn.Module, stream: Tensor) -> None:
    with pytest.raises(UserError, match="seq_len is 65, but the model's context is 64 tokens"):
        evaluate(model, stream, seq_len=65)
    short = tiny_llama(0, max_position_embeddings=32)
    with pytest.raises(UserError, match="context is 32"):
        evaluate(model, stream, reference=short, seq_len=64)


def test_two_vocabularies_are_refused(model: nn.Module, stream: Tensor) -> None:
    with pytest.raises(UserError, match="97 tokens, but the reference's has 98"):
        evaluate(model, stream, reference=tiny_llama(0, vocab_size=98), seq_len=16)
    wider = tiny_llama(0, vocab_size=98)
    wider.config.vocab_size = VOCAB
    with pytest.raises(UserError, match="97 logits per token, but the reference gives 98"):
        evaluate(model, stream, reference=wider, seq_len=16)


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path, model: nn.Module, stream: Tensor) -> None:
    stream[5] = VOCAB
    save_file({"input_ids": stream}, tmp_path / "ids.safetensors")
    with pytest.raises(UserError, match="wanted 0 to 96"):
        evaluate(model, tmp_path / "ids.safetensors", seq_len=16)
    with pytest.raises(UserError, match="wanted 0 to 96"):
        evaluate(model, stream, seq_len=16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_named_with_their_window(
    model: nn.Module, other: nn.Module, stream: Tensor, bad: float
) -> None:
    stream = stream % 90
    stream[37] = 95
    with torch.no_grad():
        model.model.embed_tokens.weight[95] = bad  # type: ignore[union-attr]
    where = r"in window 2 \(tokens 32 to 47 of the text\)"
    with pytest.raises(UserError, match=f"the model gives NaN or infinite logits {where}"):
        evaluate(model, stream, seq_len=16, batch_size=4)
    with pytest.raises(UserError, match=f"the reference gives NaN or infinite logits {where}"):
        evaluate(other, stream, reference=model, seq_len=16, batch_size=2)


def test_an_encoder_is_refused_for_what_it_does(stream: Tensor) -> None:
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertLMHeadModel(BertConfig(**fields, vocab_size=VOCAB))
    with pytest.raises(UserError, match="not a causal language model: a later token"):
        evaluate(encoder, stream, seq_len=16)
    with pytest.raises(UserError, match=r"gives no logits .* causal language model"):
        evaluate(encoder.bert, stream, seq_len=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_models_of_other_families_pass(stream: Tensor, dtype: torch.dtype) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    neox = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        )
    )
    for model in (gpt2, neox):
        found = evaluate(model.to(dtype), stream)
        assert found.seq_len == 32
        assert found.perplexity == pytest.approx(VOCAB, rel=0.2)  # random: near uniform


class _Letters:
    """A tokenizer of ids: BOS, which is 7, before a document, then an id a letter."""

    bos_token_id = 7

    def __call__(self, text: str, *, add_special_tokens: bool, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [7] * add_special_tokens + [ord(letter) % VOCAB for letter in text]}


@pytest.mark.parametrize(("name", "stride"), [("a.txt", None), ("a.jsonl", None), ("a.txt", 6)])
def test_windows_of_text_begin_with_bos(model: nn.Module, tmp_path: Path, name: str, stride: int | None) -> None:
    text = "the sea was calm and the ship went on " * 3
    (tmp_path / name).write_text(text if name == "a.txt" else json.dumps(text))
    ids = torch.tensor(_Letters()(text, add_special_tokens=name == "a.jsonl")["input_ids"])
    with_bos = evaluate(model, tmp_path / name, tokenizer=_Letters(), seq_len=16, stride=stride)
    without = evaluate(model, tmp_path / name, tokenizer=_Letters(), seq_len=16, stride=stride, bos=False)
    losses, scored = [], 1
    for start in range(0, len(ids) - 15, stride or 16):
        window = torch.cat([torch.tensor([7]), ids[start + 1 : start + 16]])
        losses.append(naive_losses(model, window)[max(scored, start + 1) - start - 1 :])
        scored = start + 16
    if stride is None:
        assert with_bos.perplexity == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-5)
    assert with_bos.tokens == without.tokens
    assert with_bos.bos
    assert with_bos.protocol().startswith("16-token windows with BOS, ")
    assert without.protocol().startswith("16-token windows, ")
    assert without == evaluate(model, ids, seq_len=16, stride=stride)
    assert with_bos.perplexity != without.perplexity


def test_a_model_without_a_config_is_measured_as_asked(stream: Tensor) -> None:
    class Uniform(nn.Module):
        device = torch.device("cpu")

        def forward(self, ids: Tensor, **kwargs: Any) -> Any:
            return SimpleNamespace(logits=torch.zeros(*ids.shape, VOCAB))

    assert evaluate(Uniform(), stream, seq_len=16).perplexity == pytest.approx(VOCAB, rel=1e-5)


def test_folders_that_hold_no_causal_model(tmp_path: Path, model: nn.Module, stream: Tensor) -> None:
    with pytest.raises(UserError, match="no folder at"):
        evaluate(tmp_path / "none", stream)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 .* model.layers.1.mlp.up_proj.weight"):
        evaluate(tmp_path, stream)


def test_options_out_of_range(model: nn.Module, stream: Tensor) -> None:
    with pytest.raises(UserError, match="batch_size is 0"):
        evaluate(model, stream, batch_size=0)
    with pytest.raises(UserError, match="has 10 tokens, and one window needs 16"):
        evaluate(model, stream, seq_len=16, max_tokens=10)
    with pytest.raises(UserError, match="max_tokens is 0"):
        evaluate(model, stream, max_tokens=0)


@pytest.mark.parametrize(
    ("name", "text", "tokens", "bos", "perplexity"),
    [
        ("stories260k", "tinystories/evaluation.jsonl", 12_000, False, 4.45),
        ("stories260k", "tinystories/evaluation.jsonl", 12_000, True, 5.02),
        ("babyllama-1m-chars", "tinystories/evaluation.jsonl", 12_000, False, 2.29),
        ("demo", "books/evaluation.txt", 20_000, True, 56.0),  # its tokenizer adds none
    ],
)
def test_known_figures_of_trained_models(name: str, text: str, tokens: int, bos: bool, perplexity: float) -> None:
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here; set BITQUILT_SHARED to the folder with models/ and text/")
    found = evaluate(folder, SHARED / "text" / text, seq_len=256, max_tokens=tokens, bos=bos)
    assert found.perplexity == pytest.approx(perplexity, rel=0.01)
    assert found.tokens == tokens // 256 * 255
