"""How does text become one stream of token ids? `token_stream(source, tokenizer) -> int64 [tokens]`.

A source is one of

    notes.txt            one plain stream, no special tokens (so is any other file that decodes as UTF-8)
    stories.jsonl        a document a line: {"text": "..."} or a bare JSON string (.json is read the same way)
    stories.parquet      a document a row, in the string column `text`
    folder/              its .txt, .jsonl and .parquet files, recursively, in the order of their paths
    ids.safetensors      token ids, 1-D or 2-D integers, named `input_ids` or the only tensor
    name[:config][@split][#revision]
                         a dataset of the Hugging Face hub, streamed; the split is `train` unless given,
                         as in `Salesforce/wikitext:wikitext-2-raw-v1@test`. A path that exists wins.

Documents are tokenized one by one with the tokenizer's own special tokens and concatenated. Bytes are
taken as they are: line ends are not translated; only a UTF-8 byte order mark is dropped.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitquilt.errors import UserError

IN_A_FOLDER = (".jsonl", ".parquet", ".txt")
# A source that ends so is a file even when it does not exist: a typing error must not become a download.
_FILE_NAME = re.compile(r"\.(txt|md|jsonl?|parquet|safetensors|csv|tsv|arrow|gz|zip|zst)$", re.IGNORECASE)

# A plain file up to this size is tokenized in one go, so that figures are those of the whole text. A
# larger one is tokenized in pieces cut after a line end: the tokenizer takes about 160 bytes of memory per
# byte of text (5.0 GB for 31 MB, measured), nothing is read beyond what is wanted, and a cut changes at
# most a token or two (1 to 7 more tokens in 8.8 to 17.5 million for 7 cuts, measured).
WHOLE_BYTES = 8 * 2**20
PIECE_BYTES = 2**20

_HUB_ID = re.compile(
    r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<config>[\w.+-]+))?"
    r"(?:@(?P<split>[\w.-]+))?(?:#(?P<revision>[\w./-]+))?"
)
# JSON can spell half a character ("\ud83d"), which no tokenizer reads.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_NEED_DATASETS = "needs a package that is not installed; run: pip install 'bitquilt[datasets]'"


class Document(NamedTuple):
    """A piece of text; `plain` text is tokenized without special tokens."""

    text: str
    plain: bool


def token_stream(
    source: str | Path | Tensor,
    tokenizer: Callable[..., Any] | None,
    max_tokens: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The first `max_tokens` token ids of `source` (all without it) as int64 [tokens], on the CPU.

    `source` is read only as far as needed, or is the ids themselves as a tensor. UserError: unreadable or
    empty source, text without a tokenizer, ids outside `[0, vocab_size)`."""
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; wanted at least 1")
    if isinstance(source, Tensor):
        stream, source = _as_ids(source, "the tensor given")[:max_tokens], "the tensor given"
    elif Path(source).suffix.lower() == ".safetensors":
        stream = _stored_ids(Path(source))[:max_tokens]
    elif tokenizer is None:
        raise UserError(
            f"{source} is text and there is no tokenizer to read it with; put the tokenizer files beside "
            "the model, or give token ids in a .safetensors file, or calibrate on `self`"
        )
    else:
        stream = _tokenize(read_documents(source), tokenizer, max_tokens, str(source))
    _check_ids(stream, vocab_size, source)
    return stream


def read_documents(source: str | Path) -> Iterator[Document]:
    """The documents of `source` in order, read lazily; a plain file over 8 MiB comes in several pieces.

    UserError: no such source, an empty file or folder, bytes that are not UTF-8 (with their offset), a
    broken JSON line (with its number), a document without text."""
    files = _files(source)
    if files is None:
        yield from _read_hub(str(source))
        return
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty; give a file with text in it")
        kind = file.suffix.lower()
        if kind in (".jsonl", ".json"):
            yield from _read_jsonl(file)
        elif kind == ".parquet":
            yield from _read_parquet(file)
        else:
            yield from _read_plain(file)


def windows(stream: Tensor, seq_len: int, count: int | None = None, seed: int | None = None) -> Tensor:
    """`count` windows of `stream` [tokens] as [count, seq_len]: disjoint, in the order of the text.

    With a seed they lie at random places (of a generator of their own), without one they follow each other
    from the start; count=None takes all that fit. UserError: a stream too short for that many."""
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
        # The tokens left over are dealt out at random as gaps, so any set of disjoint windows can come up.
        generator = torch.Generator().manual_seed(seed)
        starts += torch.randint(tokens - count * seq_len + 1, (count,), generator=generator).sort().values
    return stream[starts[:, None] + torch.arange(seq_len)]


def content_hash(source: str | Path) -> str:
    """SHA-256 (hex) of what `source` holds: of the file's bytes; for a folder, of its files' hashes and
    paths in it. For a hub id, of the id as it resolves: only `#revision` pins what lies behind it."""
    files = _files(source)
    if files is None:
        return hashlib.sha256(json.dumps(_hub_id(str(source))).encode()).hexdigest()
    root = Path(source)
    if root.is_file():
        return _file_hash(root)
    listing = "".join(f"{_file_hash(file)}  {file.relative_to(root).as_posix()}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def _files(source: str | Path) -> list[Path] | None:
    """The files of a source that is on this machine; None when it is a hub id."""
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = (file for file in path.rglob("*") if file.suffix.lower() in IN_A_FOLDER and file.is_file())
        visible = [file for file in found if not any(p.startswith(".") for p in file.relative_to(path).parts)]
        if not visible:
            raise UserError(f"{path} is a folder without {', '.join(IN_A_FOLDER)} files; give one with some")
        return sorted(visible, key=lambda file: file.relative_to(path).as_posix())
    looks_local = isinstance(source, Path) or _FILE_NAME.search(source) is not None
    if looks_local or not _HUB_ID.fullmatch(str(source)):
        raise UserError(
            f"{source} does not exist; give a file, a folder or a dataset of the hub, "
            "written name[:config][@split][#revision]"
        )
    return None


def _read_plain(path: Path) -> Iterator[Document]:
    size = path.stat().st_size
    piece = size + 1 if size <= WHOLE_BYTES else PIECE_BYTES
    offset, held = 0, b""
    with path.open("rb") as file:
        while block := file.read(piece):
            held += block
            cut = len(held) if file.tell() == size else held.rfind(b"\n") + 1 or held.rfind(b" ")
            if cut < 1:
                continue
            text = _decode(held[:cut], path, offset)
            yield Document(text.removeprefix("\ufeff") if offset == 0 else text, plain=True)
            offset, held = offset + cut, held[cut:]


def _decode(raw: bytes, path: Path, offset: int) -> str:
    bad = raw.find(b"\0")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = error.start if bad < 0 else min(bad, error.start)
    if bad >= 0:
        raise UserError(
            f"{path} is not text: byte 0x{raw[bad]:02x} at offset {offset + bad} is not UTF-8 text; "
            "give UTF-8 text, .jsonl, .parquet, or token ids in .safetensors"
        )
    return text


def _read_jsonl(path: Path) -> Iterator[Document]:
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _decode(raw, path, offset).removeprefix("\ufeff" if number == 1 else "")
            offset += len(raw)
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: broken JSON ({error.msg} at column {error.colno}); "
                    'wanted one document a line, as {"text": "..."} or a bare string'
                ) from None
            yield Document(_text_of(value, f"{path}, line {number}"), plain=False)


def _text_of(value: object, where: str) -> str:
    text = value.get("text") if isinstance(value, dict) else value
    if isinstance(text, str):
        if half := _HALF_CHARACTER.search(text):
            raise UserError(f"{where}: {half[0]!r} is half a character; drop it from the text")
        return text
    if isinstance(value, dict):
        fields = ", ".join(f"{key} ({type(held).__name__})" for key, held in value.items()) or "none"
        got, fix = f"the fields {fields}", 'rename the one with the text to "text"'
    else:
        got, fix = f"a {type(value).__name__}", 'write {"text": "..."} or a bare string'
    raise UserError(f'{where}: no string under "text", found {got}; {fix}')


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading parquet {_NEED_DATASETS}") from None
    try:
        with ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                fields = ", ".join(f"{field.name} ({field.type})" for field in table.schema_arrow) or "none"
                raise UserError(f"{path}: no column text, found {fields}; rename the right one to text")
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=["text"]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield Document(_text_of({"text": value}, f"{path}, row {row}"), plain=False)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a whole parquet file ({error}); write it again") from None


def _read_hub(source: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source} is no path here; reading it as a hub dataset {_NEED_DATASETS}") from None
    hub = _hub_id(source)
    try:
        where = {"split": hub["split"], "revision": hub["revision"]}
        rows = datasets.load_dataset(hub["name"], hub["config"], **where, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield Document(_text_of(row, f"{source}, row {number}"), plain=False)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{source} is no path here, and the hub dataset {hub['name']} (config {hub['config']}, split "
            f"{hub['split']}) cannot be read: {error}; check the name, or give a local file"
        ) from error


def _hub_id(source: str) -> dict[str, str | None]:
    match = _HUB_ID.fullmatch(source)
    assert match is not None, source  # _files has refused every other form
    return match.groupdict() | {"split": match["split"] or "train"}


def _tokenize(
    documents: Iterator[Document], tokenizer: Callable[..., Any], max_tokens: int | None, source: str
) -> Tensor:
    parts: list[Tensor] = []
    total = 0
    for document in documents:
        if not document.text:  # an empty row is no document: it would leave a lone special token
            continue
        special = not document.plain
        # verbose=False: a stream is meant to be longer than the model's context, that is no news.
        ids = tokenizer(document.text, add_special_tokens=special, truncation=False, verbose=False)
        parts.append(torch.tensor(ids["input_ids"], dtype=torch.int64))
        total += len(parts[-1])
        if max_tokens is not None and total >= max_tokens:
            break
    if total == 0:
        raise UserError(f"{source} holds no text: it gives 0 tokens; give a source with text in it")
    return torch.cat(parts)[:max_tokens]


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


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
