"""Perplexity on a text and divergence from a reference: `evaluate` measures both in one pass.

Both models see the same windows in the same batches. Log-softmax is taken in float32, some rows at a time, so a large
vocabulary costs a few buffers of 64 MiB.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitquilt.core.types import all_finite
from bitquilt.data.calibration import load_tokenizer
from bitquilt.data.tokens import token_stream, window_bos
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.config import config_of
from bitquilt.model.structure import is_encoder_decoder
from bitquilt.report.evaluation import divergence, loading, perplexity
from bitquilt.report.evaluation.checkpoint_size import ModelSize, model_size
from bitquilt.report.evaluation.perplexity import Window

# Tokens of a window unless the caller gives them, as in the papers; a shorter context clips it.
DEFAULT_SEQ_LEN = 2048
# Elements of one float32 buffer of log-probabilities: 64 MiB, 131 rows of a vocabulary of 128k.
_CHUNK = 2**24
# Elements of one batch of logits unless the caller gives a batch size: 512 MiB in float32.
_LOGITS = 2**27

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of one model on one text.

    `cross_entropy` and `kl_*`, KL(reference || model), are in nats per token; without a reference the latter are None.
    `tokens` counts predicted tokens. `stride` is None for disjoint windows. `bos`: every window begins with BOS. The
    last three fields describe the model's size, None if unknown."""

    perplexity: float
    cross_entropy: float
    kl_mean: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None
    reference_perplexity: float | None = None
    tokens: int
    seq_len: int
    stride: int | None = None
    bos: bool = False
    bpw: float | None = None
    nominal_bits: float | None = None
    bytes: int | None = None

    def to_json(self) -> dict[str, float | int | None]:
        """Return the fields by name; an infinite perplexity, which JSON cannot write, becomes None."""
        fields = dataclasses.asdict(self)
        infinite = [key for key in ("perplexity", "reference_perplexity") if fields[key] == math.inf]
        return fields | dict.fromkeys(infinite)

    def protocol(self) -> str:
        """The protocol in words, to print next to the figures."""
        return protocol_text(self.seq_len, self.stride, self.tokens, self.bos)


def protocol_text(seq_len: int | None, stride: int | None, tokens: int | None, bos: bool) -> str:
    """A protocol in words. Windows without BOS are not mentioned: token ids and many models have none."""
    step = "" if stride is None else f", stride {stride}"
    return f"{seq_len}-token windows{' with BOS' if bos else ''}{step}, {tokens} tokens"


def evaluate(
    model: Any,
    text: str | Path | Tensor,
    *,
    reference: Any = None,
    tokenizer: Any = None,
    seq_len: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    column: str | None = None,
    bos: bool = True,
    batch_size: int | None = None,
    size: ModelSize | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Measure the perplexity of `model` on `text` and, given a `reference`, the divergence from it.

    A model is loaded already, or a path or hub id to load to `device` (default: CUDA if there is one) in `dtype`
    (default: float32 on a CPU, else as stored). `text` is a source of `bitquilt.data.tokens` or token ids [tokens], cut
    after `max_tokens`. `seq_len`: tokens per window (default: the model's context, at most 2048). `stride`: use the
    strided protocol. `column`: the column of a data set to read. `bos`: begin every window of a text with BOS, where
    the tokenizer adds it to a document. `batch_size` in windows affects only speed and memory. `size` replaces what
    `model_size` finds. `progress(done, total, perplexity)` is called per batch, `notify` with skipped rows.

    Raises UserError for a model that is not a causal LM, a window beyond the context, a text that is too short, two
    vocabularies, and logits that are not finite."""
    subject = loading.as_model(model, device, dtype)
    other = None if reference is None else loading.as_model(reference, device, dtype)
    models = [subject] if other is None else [subject, other]
    seq_len, vocab = _window_length(models, seq_len), _common_vocabulary(models)
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; wanted at least 1")
    if tokenizer is None and isinstance(model, str | Path):
        tokenizer = load_tokenizer(open_checkpoint(model).folder)
    stream = token_stream(text, tokenizer, max_tokens, vocab, column, notify)
    first = window_bos(text, tokenizer, vocab) if bos else None
    planned = perplexity.plan_windows(stream.numel(), seq_len, stride)
    batch_size = batch_size or max(1, min(16, _LOGITS // (seq_len * (vocab or 1))))
    with _evaluating(models):
        if is_encoder_decoder(subject):
            notify(f"{type(subject).__name__} is an encoder-decoder: the loss is that of writing the text it reads")
        for each in models:
            loading.check_causal(each, stream[:seq_len])
        scores = list(_score(subject, other, stream, planned, batch_size, progress, first))
    losses, kl, agree, expected = (torch.cat(column) for column in zip(*scores, strict=True))
    cross_entropy, size = losses.to(torch.float64).mean().item(), size or model_size(model)
    return Evaluation(
        perplexity=perplexity.from_mean(cross_entropy),
        cross_entropy=cross_entropy,
        reference_perplexity=perplexity.from_mean(expected.double().mean().item()) if other is not None else None,
        tokens=losses.numel(),
        seq_len=seq_len,
        stride=stride,
        bos=first is not None,
        **({} if other is None else dataclasses.asdict(divergence.summarize(kl, agree))),
        **({} if size is None else dataclasses.asdict(size)),
    )


def _window_length(models: list[Any], seq_len: int | None) -> int:
    limits = [length for model in models if (length := config_of(model).context_length) is not None]
    context = min(limits, default=None)
    if seq_len is None:
        return min(context or DEFAULT_SEQ_LEN, DEFAULT_SEQ_LEN)
    if context is not None and seq_len > context:
        raise UserError(f"seq_len is {seq_len}, but the model's context is {context} tokens; give at most {context}")
    return seq_len


def _common_vocabulary(models: list[Any]) -> int | None:
    sizes = [config_of(model).vocabulary for model in models]
    if len(set(sizes)) > 1:
        raise UserError(
            f"the model's vocabulary has {sizes[0]} tokens, but the reference's has {sizes[1]}; "
            "give the reference that the model was made from"
        )
    return sizes[0]


@contextlib.contextmanager
def _evaluating(models: list[Any]) -> Iterator[None]:
    """Switch off dropout and gradients inside, and restore each model's training flag afterwards."""
    training = [model.training for model in models]
    try:
        with torch.no_grad():
            for model in models:
                model.eval()
            yield
    finally:
        for model, flag in zip(models, training, strict=True):
            model.train(flag)


def _score(
    model: Any,
    reference: Any,
    stream: Tensor,
    planned: list[Window],
    batch_size: int,
    progress: Progress | None,
    bos: int | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield losses, divergences, top-1 agreements and the reference's losses of each window, [targets] each."""
    loss, tokens, done = 0.0, 0, 0
    for batch in _batches(planned, batch_size):
        ids = torch.stack([stream[window.start : window.end] for window in batch])
        if bos is not None:
            ids[:, 0] = bos
        logits = loading.logits_of(model, ids)
        expected = None if reference is None else loading.logits_of(reference, ids).to(logits.device)
        if expected is not None and expected.shape != logits.shape:
            raise UserError(
                f"the model gives {logits.shape[-1]} logits per token, but the reference gives {expected.shape[-1]}; "
                "give the reference that the model was made from"
            )
        for row, window in enumerate(batch):
            first = window.first_target - window.start
            # position t predicts token t + 1
            rows = slice(first - 1, ids.shape[1] - 1)
            scores = _score_rows(
                logits[row, rows],
                None if expected is None else expected[row, rows],
                ids[row, first:].to(logits.device),
                f"window {done + row} (tokens {window.start} to {window.end - 1} of the text)",
            )
            loss += scores[0].sum(dtype=torch.float64).item()
            tokens += scores[0].numel()
            yield scores
        done += len(batch)
        if progress is not None:
            progress(done, len(planned), perplexity.from_mean(loss / tokens))


def _batches(planned: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Yield runs of at most `batch_size` windows of equal length; a shorter last one comes alone."""
    batch: list[Window] = []
    for window in planned:
        if batch and (len(batch) == batch_size or window.end - window.start != batch[0].end - batch[0].start):
            yield batch
            batch = []
        batch.append(window)
    yield batch


def _score_rows(
    logits: Tensor, reference: Tensor | None, targets: Tensor, where: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = max(1, _CHUNK // logits.shape[-1])
    losses, kl, agree, theirs = [], [torch.empty(0)], [torch.empty(0, dtype=torch.bool)], [torch.empty(0)]
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        log_probs = _log_probs(logits[part], "the model", where)
        losses.append(perplexity.nll(log_probs, targets[part]).cpu())
        if reference is not None:
            expected = _log_probs(reference[part], "the reference", where)
            kl.append(divergence.kl_divergence(expected, log_probs).cpu())
            agree.append(divergence.same_top1(expected, log_probs).cpu())
            theirs.append(perplexity.nll(expected, targets[part]).cpu())
    return torch.cat(losses), torch.cat(kl), torch.cat(agree), torch.cat(theirs)


def _log_probs(logits: Tensor, whose: str, where: str) -> Tensor:
    if not all_finite(logits):
        raise UserError(
            f"{whose} gives NaN or infinite logits in {where}; load it in float32 or bfloat16, "
            "or find a damaged layer with `bitquilt inspect`"
        )
    return logits.float().log_softmax(-1)
