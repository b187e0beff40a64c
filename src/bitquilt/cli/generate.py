"""`bitquilt generate DIR --prompt TEXT`: the model writes."""

from typing import Annotated, Any

import torch
from transformers import TextStreamer
from typer import Argument, Option

from bitquilt.cli.eval import DtypeOption
from bitquilt.cli.output import calm, stderr
from bitquilt.errors import UserError
from bitquilt.evaluation.loading import as_model, check_causal, context_length
from bitquilt.models.checkpoint import open_checkpoint
from bitquilt.runtime.calibration import load_tokenizer


def generate(
    folder: Annotated[str, Argument(metavar="DIR", help="Model folder or hub id, quantized or not.")],
    prompt: Annotated[str, Option("--prompt", "-p", help="What the model continues.")],
    max_new_tokens: Annotated[int, Option("--max-new-tokens", "-n", min=1, help="When to stop, at the latest.")] = 128,
    temperature: Annotated[float, Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    seed: Annotated[int, Option(help="The same seed writes the same text.")] = 0,
    dtype: DtypeOption = None,
) -> None:
    """Continue a prompt; the text streams to stdout."""
    with calm():
        checkpoint = open_checkpoint(folder)
        tokenizer = load_tokenizer(checkpoint.folder)
        if tokenizer is None:
            raise UserError(f"{folder} has no tokenizer; put the tokenizer files of the model beside its weights")
        model = as_model(checkpoint.folder, None, None if dtype is None else dtype.value)
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


def _encode(tokenizer: Any, prompt: str) -> torch.Tensor:
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        if tokenizer.bos_token_id is None:
            raise UserError("the prompt is empty and the tokenizer has no token to begin a text with; give a prompt")
        ids = [tokenizer.bos_token_id]
    return torch.tensor([ids])


def _room(model: Any, used: int) -> int | None:
    """Tokens that still fit into the context; None without a limit."""
    context = context_length(model)
    if context is None:
        return None
    if used >= context:
        raise UserError(f"the prompt has {used} tokens, the model's context {context}: no room to write; shorten it")
    return context - used
