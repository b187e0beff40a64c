"""The model's own calibration text: seeded, of the right shape, and only from models that can write."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from bitquilt import Calibration, Result, UserError
from bitquilt.cli.demo import DEMO_MODEL
from bitquilt.data import calibration
from bitquilt.data.calibration import describe_source, load_tokenizer, make_calibration, usual_samples
from bitquilt.data.tokens import token_stream
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.stream.workdir import write_tensors

VOCAB = 64


def sample(folder: Path, seed: int = 0, samples: int = 18, seq_len: int = 12) -> Tensor:
    said: list[str] = []
    ids = make_calibration(
        open_checkpoint(folder),
        Calibration("self", samples=samples, seq_len=seq_len, seed=seed),
        vocabulary=VOCAB,
        progress=said.append,
    )
    assert said
    assert f"of {samples} sequences of {seq_len} tokens" in said[0]
    return ids


def test_text_is_seeded_and_of_the_right_shape(make_model: Callable[..., Path]) -> None:
    folder = make_model()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    ids = sample(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert ids.shape == (18, 12)
    assert ids.dtype == torch.int64
    assert 0 <= int(ids.min()) <= int(ids.max()) < VOCAB
    assert set(ids[:, 0].tolist()) == {1}  # the BOS token
    torch.manual_seed(2)
    assert torch.equal(sample(folder), ids)
    assert not torch.equal(sample(folder, seed=1), ids)
    assert len({tuple(row) for row in ids.tolist()}) == 18


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_text_is_drawn_from_the_models_distribution(dtype: torch.dtype, make_model: Callable[..., Path]) -> None:
    """What the model wrote is likelier to it than the same tokens in another order."""
    folder = make_model(dtype=dtype, initializer_range=0.4)
    ids = sample(folder, samples=16, seq_len=24)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def loss(tokens: Tensor) -> float:
        with torch.no_grad():
            return float(model(tokens, labels=tokens).loss)

    shuffled = torch.cat([ids[:, :1], ids[:, 1:].flip(1)], dim=1)
    assert loss(ids) < loss(shuffled) - 0.1


def test_a_model_without_bos_starts_at_random(make_model: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(make_model(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["bos_token_id"] = None
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    ids = sample(tmp_path / "model")
    assert len(set(ids[:, 0].tolist())) > 4
    assert torch.equal(sample(tmp_path / "model"), ids)


def test_an_encoder_cannot_write(
    make_model: Callable[..., Path], quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    match = r"not a causal language model.*BertForMaskedLM.*give --calibration FILE"
    with pytest.raises(UserError, match=match):
        sample(make_model("bert"))
    with pytest.raises(UserError, match=match):
        quantize_tiny(make_model("bert"), tmp_path / "out", calibration="self")


def test_a_model_larger_than_the_memory_is_refused(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(UserError, match=r"of memory are free.*give --calibration FILE"):
        sample(make_model())


def test_half_precision_needs_room_for_its_wide_copy(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype, factor in ((torch.float16, 2), (torch.bfloat16, 1)):
        folder = make_model("llama", dtype=dtype)
        enough = int(1.2 * factor * open_checkpoint(folder).nbytes) + 1
        monkeypatch.setattr("psutil.virtual_memory", lambda free=enough: SimpleNamespace(available=free))
        assert sample(folder, samples=1, seq_len=2).shape == (1, 2)
        monkeypatch.setattr("psutil.virtual_memory", lambda free=enough: SimpleNamespace(available=0.9 * free))
        with pytest.raises(UserError, match=r"of memory are free"):
            sample(folder, samples=1, seq_len=2)


def test_windows_of_a_file_depend_on_the_seed(make_model: Callable[..., Path], token_file: Path) -> None:
    def read(seed: int) -> Tensor:
        return make_calibration(
            open_checkpoint(make_model()),
            Calibration(token_file, samples=3, seq_len=16, seed=seed),
            vocabulary=VOCAB,
            progress=lambda _: None,
        )

    assert read(0).shape == (3, 16)
    assert torch.equal(read(0), read(0))
    assert not torch.equal(read(0), read(1))


def test_a_source_is_described_by_its_content(token_file: Path, tmp_path: Path) -> None:
    assert describe_source("self") == {"source": "self"}
    shutil.copyfile(token_file, tmp_path / "copy.safetensors")
    one, other = describe_source(token_file), describe_source(tmp_path / "copy.safetensors")
    assert one["sha256"] == other["sha256"]
    assert len(one["sha256"]) == 64


def test_sequences_of_a_text_begin_with_bos(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """The other tokens are those of the same windows without it."""
    folder = tmp_path / "model"
    shutil.copytree(make_model(), folder)
    tokenizer().save_pretrained(folder)
    text = tmp_path / "a.txt"
    text.write_text("word other " * 60)

    def read(bos: bool) -> Tensor:
        calibration = Calibration(text, samples=5, seq_len=12, bos=bos)
        return make_calibration(open_checkpoint(folder), calibration, vocabulary=VOCAB, progress=lambda _text: None)

    assert set(read(True)[:, 0].tolist()) == {2}
    assert 2 not in read(False)
    assert torch.equal(read(True)[:, 1:], read(False)[:, 1:])


def tokenizer() -> PreTrainedTokenizerFast:
    """Two words, and a BOS before each document."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, "word": 3, "other": 4, "<s>": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


def test_own_sequences_stand_behind_those_of_the_text(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder, text = make_model(), tmp_path / "text.safetensors"
    write_tensors(text, {"input_ids": torch.arange(200).remainder(VOCAB)})
    checkpoint = open_checkpoint(folder)

    def read(calibration: Calibration) -> Tensor:
        return make_calibration(checkpoint, calibration, vocabulary=VOCAB, progress=lambda _text: None)

    alone = read(Calibration(text, samples=5, seq_len=12))
    mixed = read(Calibration(text, samples=5, self_samples=7, seq_len=12))
    own = read(Calibration("self", samples=7, seq_len=12))
    assert torch.equal(mixed, torch.cat([alone, own]))


def test_own_sequences_beside_a_text_that_is_the_models_own_are_refused(
    make_model: Callable[..., Path], quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="give more samples instead of self_samples"):
        quantize_tiny(make_model(), tmp_path / "out", calibration="self", self_samples=4)
    with pytest.raises(UserError, match="self_samples is -1; wanted 0 or more"):
        quantize_tiny(make_model(), tmp_path / "out", self_samples=-1)


def test_a_cache_that_grows_large_is_sampled_in_smaller_parts(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences at once where the cache of two fills the memory set aside for it."""
    folder = make_model()
    checkpoint = open_checkpoint(folder)
    each = checkpoint.model_config.cache_bytes(12)
    monkeypatch.setattr(calibration, "_CACHE_BYTES", 2 * each)
    said: list[str] = []
    ids = make_calibration(
        checkpoint, Calibration("self", samples=5, seq_len=12), vocabulary=VOCAB, progress=said.append
    )
    assert ids.shape == (5, 12)
    assert [text.split(": ")[1].split()[0] for text in said] == ["0", "2", "4"]


@pytest.mark.parametrize("content", ["{", "{}", '{"model": 3}', "\x00", '{"version": "1.0", "model": {"type": "X"}}'])
def test_a_damaged_tokenizer_is_named_and_not_needed_for_ids(
    make_model: Callable[..., Path], token_file: Path, tmp_path: Path, content: str
) -> None:
    shutil.copytree(make_model(), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer in .*model cannot be read .*copy the model's tokenizer files"):
        load_tokenizer(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    asked = Calibration(token_file, samples=2, seq_len=4)
    assert make_calibration(checkpoint, asked, vocabulary=64, progress=lambda _: None).shape == (2, 4)


def test_text_comes_with_the_package(make_model: Callable[..., Path]) -> None:
    """Enough of it for the largest default, whatever the tokenizer; read without any setting."""
    tokens = token_stream("general", AutoTokenizer.from_pretrained(DEMO_MODEL))
    assert len(tokens) > calibration._MOST_TOKENS
    assert (
        describe_source("general")["sha256"]
        == describe_source(Path(calibration.__file__).with_name("general.jsonl"))["sha256"]
    )
    assert Calibration().source == "general"
    with pytest.raises(UserError, match=r"general is text and the model's folder has no tokenizer.*`self`"):
        make_calibration(open_checkpoint(make_model()), Calibration(), vocabulary=VOCAB, progress=str)


def test_the_number_of_sequences_follows_the_widest_matrix(make_model: Callable[..., Path], token_file: Path) -> None:
    checkpoint = open_checkpoint(make_model())
    assert usual_samples(checkpoint, 512) == 64  # the least
    wide = SimpleNamespace(tensors={"a": SimpleNamespace(shape=(8, 11008)), "b": SimpleNamespace(shape=(99999,))})
    assert usual_samples(wide, 512) == 430  # type: ignore[arg-type]
    widest = SimpleNamespace(tensors={"a": SimpleNamespace(shape=(8, 10**6))})
    assert usual_samples(widest, 512) == 512  # type: ignore[arg-type]
    said: list[str] = []
    ids = make_calibration(checkpoint, Calibration(token_file, seq_len=16), vocabulary=VOCAB, progress=said.append)
    assert f"the text gives {len(ids)} sequences of 16 tokens; 2048 are usual for this model" in said
