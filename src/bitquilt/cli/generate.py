"""`bitquilt generate DIR --prompt TEXT`: continue a prompt. `write_text` does the same for a loaded model."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import transformers
from torch import Tensor
from typer import Option

from bitquilt.cli.options import AnyModel, Device, DtypeOption, TrustCode
from bitquilt.cli.output import calm, stderr
from bitquilt.data.calibration import load_tokenizer
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.config import config_of
from bitquilt.model.safety import trusted_text
from bitquilt.model.structure import vocabulary_size
from bitquilt.report.evaluation.loading import as_model, check_causal, check_finite, logits_of
from bitquilt.serve.generation import Generation, TokenDecoder, start_generation
from bitquilt.stream.devices import choose_device

_NOT_PLAIN = Generation(None, None, "the model's own settings ask for more than temperature, top-k and top-p")
_PROBE = 8  # tokens of the prompt that are computed once more to see that the model's numbers are numbers
_TOP_K = 50  # the default of transformers


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens, and how many at most; a temperature of 0 takes the likeliest token."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    seed: int = 0


class _Streamer(transformers.TextStreamer):
    """Print text as it is written, on a terminal without control characters: a model may write any token."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(trusted_text(text) if sys.stdout.isatty() else text, stream_end)


def generate(
    folder: AnyModel,
    prompt: Annotated[str, Option("--prompt", "-p", help="Text for the model to continue.")],
    max_new_tokens: Annotated[int, Option("--max-new-tokens", "-n", min=1, help="Most tokens to write.")] = 128,
    temperature: Annotated[float, Option(min=0.0, help="Randomness; 0 always takes the likeliest token.")] = 0.8,
    seed: Annotated[int, Option(help="Random seed: the same seed writes the same text.")] = 0,
    dtype: DtypeOption = None,
    device: Device = "auto",
    trust_remote_code: TrustCode = False,
) -> None:
    """Load the model and stream the text."""
    where = choose_device(device)
    with calm():
        checkpoint = open_checkpoint(folder)
        tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code)
        if tokenizer is None:
            raise UserError(f"{folder} has no tokenizer; put the model's tokenizer files in this folder")
        model = as_model(checkpoint.folder, where, None if dtype is None else dtype.value, trust_remote_code)
        streamer = _Streamer(tokenizer, skip_special_tokens=True)
        write_text(model, tokenizer, prompt, Sampling(max_new_tokens, temperature, seed), streamer)


def write_text(
    model: Any, tokenizer: Any, prompt: str, sampling: Sampling, streamer: transformers.TextStreamer | None = None
) -> str:
    """Return the prompt and its continuation; the global random state stays as it was.

    Raises UserError for an empty prompt without a token to begin with, a prompt that fills the context, and a model
    that is not causal."""
    ids = _encode(tokenizer, prompt).to(model.device)
    if (highest := int(ids.max())) >= (known := vocabulary_size(model)):
        raise UserError(
            f"the tokenizer turns the prompt into ids up to {highest}, and the model knows 0 to {known - 1}; use the "
            "tokenizer that belongs to the model"
        )
    most = min(sampling.max_new_tokens, _room(model, ids.shape[1]) or sampling.max_new_tokens)
    if most < sampling.max_new_tokens:
        stderr.print(f"the model's context leaves room for {most} tokens instead of {sampling.max_new_tokens}")
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
        check_causal(model, ids[0])
        check_finite(model, logits_of(model, ids[:, :_PROBE]), ids[0, :_PROBE])
        torch.manual_seed(sampling.seed)
        generation = start_generation(model, ids[0], ids.shape[1] + most) if _plain(model) else _NOT_PLAIN
        if generation.decoder is not None and generation.logits is not None:
            choose = _choice(model, sampling.temperature)
            written = _decode(generation.decoder, generation.logits, ids[0], most, choose, streamer)
            return str(tokenizer.decode(written, skip_special_tokens=True))
        if model.device.type != "cpu":
            stderr.print(f"using transformers' own loop, which is slower: {generation.why}")
        warm = sampling.temperature > 0
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            pad_token_id=padding,
            streamer=streamer,
            do_sample=warm,
            **({"temperature": sampling.temperature} if warm else {}),
        )
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


def _plain(model: Any) -> bool:
    """Whether the model's generation settings hold only what `_choice` handles, so no penalties for instance."""
    known = {"bos_token_id", "eos_token_id", "pad_token_id", "temperature", "top_k", "top_p", "do_sample"}
    length = {"max_length", "max_new_tokens", "min_length", "transformers_version", "use_cache"}
    asked = {name for name, value in model.generation_config.to_diff_dict().items() if value is not None}
    return not {name for name in asked if not name.startswith(("_", "output_"))} - known - length


def _choice(model: Any, temperature: float) -> Callable[[Tensor], int]:
    """Return a function from logits to the next token that chooses as `model.generate` does."""
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    config = model.generation_config
    top_k = _TOP_K if config.top_k is None else config.top_k
    steps = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(temperature)])
    if top_k:
        steps.append(transformers.TopKLogitsWarper(top_k))
    if config.top_p is not None and config.top_p < 1:
        steps.append(transformers.TopPLogitsWarper(config.top_p))
    nothing = torch.empty((1, 0), dtype=torch.int64)
    return lambda logits: int(torch.multinomial(steps(nothing, logits[None]).softmax(-1), 1))


def _decode(
    decoder: TokenDecoder,
    logits: Tensor,
    ids: Tensor,
    most: int,
    choose: Callable[[Tensor], int],
    streamer: transformers.TextStreamer | None,
) -> list[int]:
    """Return the prompt's tokens and up to `most` more, up to one that ends a text."""
    ends = decoder.model.generation_config.eos_token_id
    stop = {ends} if isinstance(ends, int) else set(ends or ())
    written = ids.tolist()
    if streamer is not None:
        streamer.put(ids)
    for i in range(most):
        written.append(choose(logits))
        if streamer is not None:
            streamer.put(torch.tensor(written[-1:]))
        if written[-1] in stop or i == most - 1:
            break
        logits = decoder.step(written[-1])
    if streamer is not None:
        streamer.end()
    return written


def _encode(tokenizer: Any, prompt: str) -> Tensor:
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        if tokenizer.bos_token_id is None:
            raise UserError("the prompt is empty and the tokenizer has no token to begin a text with; give a --prompt")
        ids = [tokenizer.bos_token_id]
    return torch.tensor([ids])


def _room(model: Any, used: int) -> int | None:
    """Tokens that still fit the context; None without a limit. Raises UserError if none fits."""
    context = config_of(model).context_length
    if context is None:
        return None
    if used >= context:
        raise UserError(
            f"the prompt has {used} tokens and the model's context {context}: there is no room to write; shorten it"
        )
    return context - used
