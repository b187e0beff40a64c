"""`bitquilt generate DIR --prompt TEXT`: the model writes."""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from typer import Argument, Option

from bitquilt.cli.eval import DtypeOption
from bitquilt.cli.options import WhereDevice
from bitquilt.cli.output import calm, stderr
from bitquilt.data.calibration import load_tokenizer
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.config import config_of
from bitquilt.report.evaluation.loading import as_model, check_causal
from bitquilt.serve.generation import Generation, TokenDecoder, start_generation
from bitquilt.stream.devices import choose_device

_NOT_PLAIN = Generation(None, None, "the model's own settings ask for more than temperature, top-k and top-p")


def generate(
    folder: Annotated[str, Argument(metavar="DIR", help="Model folder or hub id, quantized or not.")],
    prompt: Annotated[str, Option("--prompt", "-p", help="What the model continues.")],
    max_new_tokens: Annotated[int, Option("--max-new-tokens", "-n", min=1, help="When to stop, at the latest.")] = 128,
    temperature: Annotated[float, Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    seed: Annotated[int, Option(help="The same seed writes the same text.")] = 0,
    dtype: DtypeOption = None,
    device: WhereDevice = "auto",
) -> None:
    """Continue a prompt; the text streams to stdout."""
    where = choose_device(device)
    with calm():
        checkpoint = open_checkpoint(folder)
        tokenizer = load_tokenizer(checkpoint.folder)
        if tokenizer is None:
            raise UserError(f"{folder} has no tokenizer; put the tokenizer files of the model beside its weights")
        model = as_model(checkpoint.folder, where, None if dtype is None else dtype.value)
        write_text(
            model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )  # fmt: skip


def write_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    streamer: TextStreamer | None = None,
) -> str:
    """The prompt and what the model makes of it; the global random state is left as it was.

    UserError: an empty prompt without a token to begin with, a prompt that fills the context, no causal model."""
    ids = _encode(tokenizer, prompt).to(model.device)
    room = _room(model, ids.shape[1])
    if room is not None and room < max_new_tokens:
        stderr.print(f"the model's context leaves room for {room} tokens, not {max_new_tokens}")
        max_new_tokens = room
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
        check_causal(model, ids[0])
        torch.manual_seed(seed)
        generation = start_generation(model, ids[0], ids.shape[1] + max_new_tokens) if _plain(model) else _NOT_PLAIN
        if generation.decoder is not None and generation.logits is not None:
            choose = _choice(model, temperature)
            written = _decode(generation.decoder, generation.logits, ids[0], max_new_tokens, choose, streamer)
            return str(tokenizer.decode(written, skip_special_tokens=True))
        if model.device.type != "cpu":
            stderr.print(f"transformers' own loop writes, which is slower: {generation.why}")
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=padding,
            streamer=streamer,
            **sampling,
        )
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


def _plain(model: Any) -> bool:
    """Whether the model's own settings ask for nothing that `_choice` does not know, penalties for instance."""
    known = {"bos_token_id", "eos_token_id", "pad_token_id", "temperature", "top_k", "top_p", "do_sample"}
    length = {"max_length", "max_new_tokens", "min_length", "transformers_version", "use_cache"}
    asked = {name for name, value in model.generation_config.to_diff_dict().items() if value is not None}
    return not {name for name in asked if not name.startswith(("_", "output_"))} - known - length


def _choice(model: Any, temperature: float) -> Callable[[torch.Tensor], int]:
    """From logits to the next token, as `model.generate` chooses."""
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    config = model.generation_config
    top_k = 50 if config.top_k is None else config.top_k  # transformers' own default
    steps = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if config.top_p is not None and config.top_p < 1:
        steps.append(TopPLogitsWarper(config.top_p))
    nothing = torch.empty((1, 0), dtype=torch.int64)
    return lambda logits: int(torch.multinomial(steps(nothing, logits[None]).softmax(-1), 1))


def _decode(
    writer: TokenDecoder, logits: torch.Tensor, ids: torch.Tensor, most: int, choose: Callable[[torch.Tensor], int],
    streamer: TextStreamer | None,
) -> list[int]:  # fmt: skip
    """The prompt's tokens and up to `most` more, until one that ends a text."""
    ends = writer.model.generation_config.eos_token_id
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
        logits = writer.step(written[-1])
    if streamer is not None:
        streamer.end()
    return written


def _encode(tokenizer: Any, prompt: str) -> torch.Tensor:
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        if tokenizer.bos_token_id is None:
            raise UserError("the prompt is empty and the tokenizer has no token to begin a text with; give a prompt")
        ids = [tokenizer.bos_token_id]
    return torch.tensor([ids])


def _room(model: Any, used: int) -> int | None:
    """Tokens that still fit into the context; None without a limit."""
    context = config_of(model).context_length
    if context is None:
        return None
    if used >= context:
        raise UserError(f"the prompt has {used} tokens, the model's context {context}: no room to write; shorten it")
    return context - used
