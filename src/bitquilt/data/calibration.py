"""`make_calibration` returns the token ids that a run calibrates on, int64 `[samples, tokens]`.

The default source, `general`, comes with the package (`data/documents.py`). `self` lets the full-precision model write
its own text by seeded sampling: every language and format that the model knows, for the time and memory of writing it.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from bitquilt.core.settings import SELF, Calibration
from bitquilt.core.types import all_finite
from bitquilt.data.documents import check_source, content_hash
from bitquilt.data.tokens import token_stream, window_bos, windows
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import Checkpoint
from bitquilt.model.config import config_of
from bitquilt.model.transformers_logging import quiet_transformers

# Sequences sampled side by side: their key-value caches are what grows (1.1B Llama: 45 MB per 2048 tokens, so 35), and
# a token of a small model takes as long for 256 sequences as for 32.
_CACHE_BYTES, _SAMPLED_AT_ONCE = 3 * 2**29, 256

# Tokens per column of the widest matrix, and the least and most: a Hessian needs several times as many as columns.
_TOKENS_PER_COLUMN, _LEAST_TOKENS, _MOST_TOKENS = 20, 2**15, 2**18


def usual_samples(checkpoint: Checkpoint, seq_len: int) -> int:
    """Return how many sequences of `seq_len` tokens a run reads unless asked: by the columns of the widest matrix."""
    widest = max((info.shape[-1] for info in checkpoint.tensors.values() if len(info.shape) > 1), default=0)
    return -(-min(max(_TOKENS_PER_COLUMN * widest, _LEAST_TOKENS), _MOST_TOKENS) // seq_len)


def tokens_read(checkpoint: Checkpoint, calibration: Calibration) -> int:
    """Return the number of tokens that a run calibrates on, if its text has that many."""
    samples = calibration.samples or usual_samples(checkpoint, calibration.seq_len)
    return (samples + calibration.self_samples) * calibration.seq_len


def clip_to_context(calibration: Calibration, checkpoint: Checkpoint) -> tuple[Calibration, str | None]:
    """Return the calibration with sequences that the model can take, and a notice if that shortens them."""
    limit, asked = checkpoint.model_config.context_length, calibration.seq_len
    if limit is None or asked <= limit:
        return calibration, None
    notice = f"calibration sequences are clipped from {asked} to the model's context of {limit} tokens"
    return replace(calibration, seq_len=limit), notice


def check_calibration(calibration: Calibration) -> None:
    """Raise UserError for a source that does not exist, before a model is fetched or built."""
    if not calibration.is_self:
        check_source(calibration.source, calibration.column)


def describe_source(source: str | Path, column: str | None = None) -> dict[str, Any]:
    """Return what identifies a source of text."""
    if str(source) == SELF:
        return {"source": SELF}
    named = {} if column is None else {"column": column}
    return {"source": str(source), "sha256": content_hash(source), **named}


def describe_calibration(calibration: Calibration) -> dict[str, Any]:
    """Return what identifies the calibration data in a fingerprint."""
    own = {"self_samples": calibration.self_samples} if calibration.self_samples else {}
    size = {"samples": calibration.samples, "seq_len": calibration.seq_len, "bos": calibration.bos}
    return {**describe_source(calibration.source, calibration.column), **size, **own}


def make_calibration(
    checkpoint: Checkpoint, calibration: Calibration, *, vocabulary: int, progress: Callable[[str], None]
) -> Tensor:
    """Return token ids `[samples + self_samples, seq_len]`; the last `self_samples` are written by the model.

    Without `calibration.samples` there are `usual_samples`, or as many as a shorter text has.

    Raises UserError if the source is empty, too short or not text, if ids leave the vocabulary, or if the model
    cannot write text (too large for the memory, or no causal language model).
    """

    def written(samples: int) -> Tensor:
        return sample_from_model(
            checkpoint,
            samples=samples,
            seq_len=calibration.seq_len,
            seed=calibration.seed,
            progress=progress,
            vocabulary=vocabulary,
        )

    count = calibration.samples or usual_samples(checkpoint, calibration.seq_len)
    if calibration.is_self:
        return written(count)
    progress(f"reading calibration text from {calibration.source}")
    tokenizer = None
    if Path(calibration.source).suffix.lower() != ".safetensors":  # ids need none, and it may be a broken one
        tokenizer = load_tokenizer(checkpoint.folder, calibration.trust_remote_code)
    bos = window_bos(calibration.source, tokenizer, vocabulary) if calibration.bos else None
    stream = token_stream(
        calibration.source,
        tokenizer,
        vocab_size=vocabulary,
        column=calibration.column,
        notify=progress,
    )
    if calibration.samples is None and count > (fit := max(1, len(stream) // calibration.seq_len)):
        progress(f"the text gives {fit} sequences of {calibration.seq_len} tokens; {count} are usual for this model")
        count = fit
    ids = windows(stream, calibration.seq_len, count, calibration.seed, bos)
    return torch.cat([ids, written(calibration.self_samples)]) if calibration.self_samples else ids


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer in the model's folder, or None without one.

    Raises UserError for files that make no tokenizer, and for a tokenizer with Python code of its own unless it is
    trusted: nothing from a model's folder runs unasked.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
            tokenizer("a")  # a setting of a wrong kind, such as a maximal length, is met when it is used
            return tokenizer
        except Exception as error:  # tokenizers raises bare Exception, each family what its parser raises
            reason = str(error).strip().splitlines() or [""]
            if "trust_remote_code" in str(error):
                raise UserError(
                    f"the tokenizer in {folder} comes with Python code of its own, which was not run; read the code, "
                    "then pass --trust-remote-code (trust_remote_code=True), or give token ids in a .safetensors file"
                ) from None
            raise UserError(
                f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {reason[0]}); copy the model's "
                "tokenizer files again, or give token ids in a .safetensors file"
            ) from None


@torch.no_grad()
def sample_from_model(
    checkpoint: Checkpoint,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    vocabulary: int,
    progress: Callable[[str], None],
) -> Tensor:
    """Let the full-precision model write sequences at temperature 1, `[samples, seq_len]`.

    A separate generator leaves the global random state alone. The whole model is in memory while it writes.
    """
    from transformers import AutoModelForCausalLM

    from bitquilt.model.transformers_model import class_of, load_pretrained

    kind = class_of(checkpoint.model_config.architectures)
    if kind is not AutoModelForCausalLM and not kind.can_generate():
        raise UserError(
            f"{checkpoint.name} is not a causal language model (its config names {kind.__name__}), so it cannot write "
            "its own calibration text; give --calibration FILE, and no --self-samples"
        )
    if checkpoint.model_config.encoder_decoder:
        raise UserError(
            f"{checkpoint.name} is an encoder-decoder, which answers texts and writes none of its own; give "
            "--calibration FILE, and no --self-samples"
        )
    _check_memory(checkpoint)
    with quiet_transformers():
        model = load_pretrained(kind, checkpoint, dtype="auto")
    if model.dtype == torch.float16:
        model = model.float()  # half precision is slow and overflows on CPUs
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    parts = []
    each = config_of(model).cache_bytes(seq_len)
    at_once = min(_SAMPLED_AT_ONCE, max(1, _CACHE_BYTES // max(1, each)))
    for start in range(0, samples, at_once):
        progress(f"the model writes its calibration text: {start} of {samples} sequences of {seq_len} tokens")
        first = first_tokens(checkpoint, min(at_once, samples - start), vocabulary, generator)
        parts.append(_sample(model, first, seq_len, generator))
    return torch.cat(parts)


def first_tokens(checkpoint: Checkpoint, count: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Return the first tokens `[count, 1]` of self-written text: BOS, or random tokens for a model without BOS."""
    bos = checkpoint.model_config.bos
    if bos is None:
        return torch.randint(0, vocabulary, (count, 1), generator=generator)
    return torch.full((count, 1), bos)


def _sample(model: Any, first: Tensor, length: int, generator: torch.Generator) -> Tensor:
    ids, cache, token = [first], None, first
    for _ in range(length - 1):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        if not all_finite(logits):
            raise UserError("the full-precision model's logits hold NaN or Inf: its weights are damaged or overflow")
        token = torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)
        ids.append(token)
    return torch.cat(ids, dim=1)


def _check_memory(checkpoint: Checkpoint) -> None:
    # fp16 weights become fp32 once they are loaded: twice their size
    widened = sum(info.nbytes for info in checkpoint.tensors.values() if info.dtype == "F16")
    wanted = int(1.2 * (checkpoint.nbytes + widened))
    available = psutil.virtual_memory().available
    if wanted > available:
        raise UserError(
            f"the model takes {wanted / 1e9:.1f} GB and {available / 1e9:.1f} GB of memory are free: it cannot write "
            "its own calibration text; give --calibration FILE (and no --self-samples), which needs one block at a time"
        )
