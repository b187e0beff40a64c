"""Token ids of a text: `token_stream` reads a source, `windows` picks samples; `starts_with_bos` and `window_bos`
decide about BOS.

A source is a file, a folder or a dataset of the hub (`data/documents.py`), or token ids:

    ids.safetensors      1-D or 2-D integers, named `input_ids` or the only tensor

Documents are tokenized one by one and concatenated.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitquilt.data.documents import PIECE_BYTES, WHOLE_BYTES, check_source, read_documents
from bitquilt.data.rows import Document
from bitquilt.errors import UserError


def token_stream(
    source: str | Path | Tensor,
    tokenizer: Callable[..., Any] | None,
    max_tokens: int | None = None,
    vocab_size: int | None = None,
    column: str | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> Tensor:
    """Return the first `max_tokens` token ids of `source` (by default all) as int64 [tokens], on the CPU.

    `source` is read only as far as needed; it may also be the ids themselves as a tensor. `column`: the field of a row
    to read. `notify` is told how many rows were skipped, and why. Raises UserError for an unreadable or empty source,
    text without a tokenizer, conversations without a chat template and ids outside `[0, vocab_size)`.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; wanted at least 1")
    if column is not None and not isinstance(source, Tensor):
        check_source(source, column)
    if isinstance(source, Tensor):
        stream, source = _as_ids(source, "the tensor given")[:max_tokens], "the tensor given"
    elif Path(source).suffix.lower() == ".safetensors":
        stream = _stored_ids(Path(source))[:max_tokens]
    elif tokenizer is None:
        raise UserError(
            f"{source} is text and the model's folder has no tokenizer; put the tokenizer files there, "
            "or give token ids in a .safetensors file, or calibrate on `self`"
        )
    else:
        stream = _tokenize(read_documents(source, column), tokenizer, max_tokens, str(source), notify)
    _check_ids(stream, vocab_size, source)
    return stream


def starts_with_bos(document: Document) -> bool:
    """Decide whether a document gets BOS: a row's text does, a plain stream does not; a chat template writes its own.

    The tokenizer adds it, with its other special tokens, if it has one. Text that a model writes for its own
    calibration also starts with BOS (`calibration.first_tokens`).
    """
    return not document.plain and not document.messages


def window_bos(source: str | Path | Tensor, tokenizer: Any, vocab_size: int | None = None) -> int | None:
    """Return the BOS that every window of `source` begins with: the one that the tokenizer puts before a document.

    Models are trained with it: on WikiText-2 Gemma 3 270M has a perplexity of 31 with it and of 140 without. It
    takes the place of a window's first token, which is never scored, so the tokens that are scored stay the same.
    Return None for a tokenizer that adds none, and for token ids, which are taken as they are.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or isinstance(source, Tensor) or Path(source).suffix.lower() == ".safetensors":
        return None
    ids = tokenizer("a", add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    if list(ids[:1]) != [bos]:
        return None
    _check_ids(torch.tensor([bos]), vocab_size, "the tokenizer's BOS")
    return int(bos)


def windows(
    stream: Tensor, seq_len: int, count: int | None = None, seed: int | None = None, bos: int | None = None
) -> Tensor:
    """Return `count` disjoint windows of `stream` [tokens] as [count, seq_len], in the order of the text.

    With a seed they are at random places (from a separate generator), without one they follow each other from the
    start. count=None takes all that fit. `bos`, unless None, takes the place of the first token of each. Raises
    UserError for a stream too short for that many.
    """
    tokens = stream.numel()
    if seq_len < 1 or (count is not None and count < 1):
        raise UserError(f"seq_len is {seq_len} and count is {count}; wanted at least 1 of each")
    fit = tokens // seq_len
    count = max(fit, 1) if count is None else count
    if count > fit:
        raise UserError(
            f"the text has {tokens} tokens; {count} windows of {seq_len} need {count * seq_len}; "
            f"give more text, or {f'at most {fit} samples' if fit else 'a shorter window'}"
        )
    starts = torch.arange(count) * seq_len
    if seed is not None:
        # The tokens left over become gaps of random length, so any set of disjoint windows is possible.
        generator = torch.Generator().manual_seed(seed)
        starts += torch.randint(tokens - count * seq_len + 1, (count,), generator=generator).sort().values
    chosen = stream[starts[:, None] + torch.arange(seq_len)]
    if bos is not None:
        chosen[:, 0] = bos
    return chosen


def _tokenize(
    documents: Iterator[Document],
    tokenizer: Callable[..., Any],
    max_tokens: int | None,
    source: str,
    notify: Callable[[str], None],
) -> Tensor:
    parts: list[Tensor] = []
    rows = total = 0
    skipped: Counter[str] = Counter()
    for document in documents:
        rows += 1
        try:
            text = _chat(document, tokenizer) if document.messages else document.text
        except _RefusedChatError as error:
            skipped[str(error)] += 1
            continue
        if not text:  # an empty row is no document: it would leave a lone special token
            skipped["no text in them"] += 1
            continue
        # verbose=False: no warning that a stream is longer than the model's context
        special = starts_with_bos(document)
        for piece in _pieces(text):
            ids = tokenizer(piece, add_special_tokens=special, truncation=False, verbose=False)
            parts.append(torch.tensor(ids["input_ids"], dtype=torch.int64))
            total += len(parts[-1])
            special = False
            if max_tokens is not None and total >= max_tokens:
                break
        if max_tokens is not None and total >= max_tokens:
            break
    why = "; ".join(f"{number} with {reason}" for reason, number in skipped.items())
    passed = f"{skipped.total()} of {rows} rows are skipped: {why}"
    if total == 0:
        said = f" ({passed})" if skipped else ""
        raise UserError(f"{source} holds no text: it gives 0 tokens{said}; give a source with text in it")
    if skipped:
        notify(f"{source}: {passed}")
    return torch.cat(parts)[:max_tokens]


def _pieces(text: str) -> Iterator[str]:
    """Cut a document over 8 MiB as a plain file is, at a line end or space; anywhere in one that has neither."""
    start, piece = 0, len(text) if len(text) <= WHOLE_BYTES else PIECE_BYTES
    while start < len(text):
        end = start + piece
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or max(text.rfind(" ", start, end), 0) or end
            end = end if end > start else start + piece
        yield text[start:end]
        start = end


class _RefusedChatError(Exception):
    """A conversation that the chat template refuses, such as one in which two users follow each other."""


def _chat(document: Document, tokenizer: Any) -> str:
    """The conversation as text, by the tokenizer's chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{document.where} is a conversation, and the model's tokenizer has no chat template; put "
            "chat_template.jinja into the model's folder, or give text, or name a column of text with --column"
        )
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template([dict(message) for message in document.messages], tokenize=False)
    except TemplateError as error:
        raise _RefusedChatError(f"a conversation that the chat template refuses ({error})") from None
    except (TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise UserError(
            f"{document.where}: the tokenizer's chat template fails on it: {error}; remove the row"
        ) from None
    return text


def _stored_ids(path: Path) -> Tensor:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path} does not exist; give a .safetensors file of token ids")
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            name = "input_ids" if "input_ids" in names else names[0] if len(names) == 1 else None
            if name is None:
                raise UserError(f"{path} holds the tensors {names}; name the token ids input_ids")
            ids: Tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); write it again") from None
    return _as_ids(ids, f"{path}: {name}")


def _as_ids(ids: Tensor, what: str) -> Tensor:
    no_integers = ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool
    if no_integers or ids.ndim not in (1, 2):
        raise UserError(f"{what} is {ids.dtype} {list(ids.shape)}; wanted integer token ids, 1-D or 2-D")
    if ids.numel() == 0:
        raise UserError(f"{what} is empty; give at least one token id")
    return ids.to("cpu", torch.int64).flatten()


def _check_ids(stream: Tensor, vocab_size: int | None, source: str | Path) -> None:
    low, high = int(stream.min()), int(stream.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        wanted = "ids from 0" if vocab_size is None else f"0 to {vocab_size - 1}, the model's vocabulary"
        raise UserError(
            f"{source} gives token ids from {low} to {high}; wanted {wanted}; "
            "use the tokenizer that belongs to the model"
        )
